"""The Dagster that executes loads is found where one runs on this home, and no other is taken for it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.orchestration.runs import dagster_services
from ktrdr_pipelines.orchestration.runs.dagster_services import DagsterServices, find_address, published
from ktrdr_pipelines.settings import Settings


@contextmanager
def answering(body: dict[str, str]) -> Iterator[str]:
    """A web server with that answer; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    made = make_settings(1)
    made.dagster_home.mkdir(parents=True)
    return made


def test_a_published_web_server_is_found_while_it_answers(settings: Settings) -> None:
    """Not before, not after, and not where something else answers at its address."""
    assert find_address(settings) == ""
    with answering({"dagster_webserver_version": "1"}) as url:
        with published(settings, url):
            assert find_address(settings) == url
            assert DagsterServices(settings).address() == url
        assert find_address(settings) == ""
    with published(settings, url):
        assert find_address(settings) == ""
    with answering({"name": "something else"}) as other, published(settings, other):
        assert find_address(settings) == ""


def test_the_address_of_a_process_that_is_gone_is_not_used(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port may be another project's by now."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = replace(dagster_services.current_owner(), pid=gone.pid)
    with answering({"dagster_webserver_version": "1"}) as url:
        monkeypatch.setattr(dagster_services, "current_owner", lambda: owner)
        with published(settings, url):
            assert find_address(settings) == ""


def test_a_configured_dagster_is_never_started(settings: Settings) -> None:
    """Whether it answers or not."""
    elsewhere = settings.model_copy(update={"dagster_url": "http://webserver.invalid:3000"})
    services = DagsterServices(elsewhere, notify=pytest.fail)
    services.start()
    assert services.address() == "http://webserver.invalid:3000"
    services.stop()


def test_stopped_services_start_nothing(settings: Settings) -> None:
    """A load that comes late is refused."""
    services = DagsterServices(settings, notify=pytest.fail)
    services.stop()
    with pytest.raises(TransientError):
        services.address()
