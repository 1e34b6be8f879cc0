"""Promises of `ktrdr serve` where it cannot serve: one line with the reason, the exit code, and no other output."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ktrdr_pipelines_tests.api.conftest import make_loads, settings_in
from ktrdr_pipelines_tests.conftest import Ktrdr

pytestmark = pytest.mark.slow


def test_a_second_server_on_one_home_says_so(ktrdr: Ktrdr, tmp_path: Path, unused_port: int) -> None:
    """Input, since another home or ending the first is up to the user."""
    first = make_loads(settings_in(tmp_path))
    first.start()
    try:
        done = ktrdr("serve", "--port", str(unused_port))
    finally:
        first.stop()
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "another REST API serves" in done.stderr


def test_a_home_that_cannot_be_written_says_so(ktrdr: Ktrdr, unused_port: int) -> None:
    """The disk refuses. (/proc refuses even root.)"""
    done = ktrdr("serve", "--port", str(unused_port), DAGSTER_HOME="/proc/ktrdr")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (7, "", 1)
    assert "cannot be written" in done.stderr


def test_a_port_in_use_says_so(ktrdr: Ktrdr) -> None:
    """Before anything else is touched."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = ktrdr("serve", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "cannot be used" in done.stderr
