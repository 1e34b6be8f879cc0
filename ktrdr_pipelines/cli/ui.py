"""Runs the Dagster UI with its daemon as one child process group, and reloads it when the universe changes (`ui_reload.py`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import click

from ktrdr_pipelines.cli.ui_reload import UniverseWatch
from ktrdr_pipelines.errors import InputError, TransientError
from ktrdr_pipelines.orchestration.automation.schedules import check_cron_expressions
from ktrdr_pipelines.orchestration.runs.dagster_services import find_address, published
from ktrdr_pipelines.orchestration.runs.instance import open_instance, provided_file
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
from ktrdr_pipelines.settings import as_environment, load_settings

READY_WITHIN_S = 120
LOOK_EVERY_S = 1.0


def serve_ui(host: str, port: int) -> int:
    """Serve until interrupted; returns the exit code. Initialises the home before several processes open it at once."""
    settings = load_settings()
    check_cron_expressions(settings)
    _check_address(host, port)
    if found := find_address(settings):
        raise InputError(
            f"a Dagster UI and daemon of this DAGSTER_HOME run already: {found}/assets",
            doing="opening the UI",
            advice="Use that one, or end it first: Dagster supports one daemon.",
        )
    with open_instance(settings) as instance:
        reap_dead_runs(instance)
    environment = {**os.environ, **as_environment(settings), "PWD": str(settings.dagster_home)}
    workspace = str(provided_file("workspace.yaml"))
    command = [sys.executable, "-m", "dagster", "dev", "-w", workspace, "-h", host, "-p", str(port)]
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        if child is not None and child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)

    url = f"http://{host}:{port}"
    watch = UniverseWatch(settings, host, port)
    # Before the child starts: a child that inherits ignored signals (in a shell's background job) could not be stopped.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Started in the home: a `.env` in the current directory would override DAGSTER_HOME (docs/dagster_facts.md, 1).
    child = subprocess.Popen(command, env=environment, cwd=settings.dagster_home, start_new_session=True)
    if _wait_until_ready(child, f"{url}/server_info"):
        click.echo(f"Dagster UI at {url}/assets (Ctrl-C ends it)")
    elif child.poll() is None:
        stop()
        raise TransientError(f"the Dagster UI did not answer within {READY_WITHIN_S} s", advice="See its output above.")
    with published(settings, url):
        return _wait_for_end(child, watch)


def _wait_for_end(child: subprocess.Popen[bytes], watch: UniverseWatch) -> int:
    """The exit code of ``child``; changes of the universe are applied meanwhile."""
    while True:
        try:
            return child.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            if change := watch.look():
                click.echo(f"ktrdr ui: {change}")


def _check_address(host: str, port: int) -> None:
    """Raises:
    InputError: the address cannot be listened on, or ``host`` is empty or unprintable."""
    if not host.isprintable():
        raise InputError(f"{host[:40]!r} is not a valid --host", advice="Omit it, or give an address.")
    if not host.strip():
        raise InputError(
            "an empty --host would be every address of this machine", advice="Omit it, or give an address."
        )
    with socket.socket() as probe:
        # As the web server does: a port that was closed a moment ago can be used again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            raise InputError(
                f"cannot listen on {host[:60]}:{port}: {getattr(error, 'strerror', None) or error}",
                doing="opening the UI",
                advice="Choose another --port or --host.",
            ) from None


def _wait_until_ready(child: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False
