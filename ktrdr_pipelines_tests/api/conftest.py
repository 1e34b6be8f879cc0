"""Fixtures: the API over ASGI and on a socket, in throw-away folders."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
import pytest
import uvicorn
from fastapi.testclient import TestClient

from ktrdr_pipelines.api.app import create_app, guarded
from ktrdr_pipelines.api.loads import QUEUE_LIMIT, Loads
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.settings import Settings, load_settings

BASE = "http://127.0.0.1:8000"
OpenApi = Callable[..., TestClient]


def settings_in(folder: Path, port: int = 1, **overrides: object) -> Settings:
    """Settings with folders in ``folder``; by default no gateway answers."""
    return load_settings(
        **{
            "in_container": False,
            "ib_host": "127.0.0.1",
            "ib_port": port,
            "data_dir": folder / "data",
            "dagster_home": folder / "home",
            "ib_retry_waits_s": (0.01,),
            "ib_request_timeout_s": 20.0,
            **overrides,
        }
    )


class NoDagster:
    """Instead of Dagster's web server and daemon: none is started, and no run is ever executed."""

    def start(self, at_each_look: object = None) -> None:
        pass

    def stop(self) -> None:
        pass

    def address(self) -> str:
        return "http://dagster.invalid"


def queue_by_hand(settings: Settings) -> Callable[[str, LoadRun], str]:
    """What puts a run into Dagster's records as one that was not started, without the events of its partitions."""

    def submit(_url: str, run: LoadRun) -> str:
        run_id = str(uuid.uuid4())
        with open_instance(settings) as instance:
            instance.add_run(
                dg.DagsterRun(
                    job_name="__ASSET_JOB",
                    run_id=run_id,
                    run_config=run.run_config(),
                    status=dg.DagsterRunStatus.NOT_STARTED,
                    tags=run.tags(),
                    asset_selection=frozenset({asset_key(run.series)}),
                )
            )
        return run_id

    return submit


def make_loads(settings: Settings, *, queue_limit: int = QUEUE_LIMIT) -> Loads:
    """Loads that are accepted and never executed."""
    return Loads(settings, NoDagster(), queue_limit=queue_limit, submit_run=queue_by_hand(settings))  # type: ignore[arg-type]


@pytest.fixture
def open_api(tmp_path: Path) -> Iterator[OpenApi]:
    """Open the API over ASGI, as it would listen on ``host``."""
    with ExitStack() as running:

        def open_it(settings: Settings | None = None, *, host: str = "127.0.0.1", token: str = "") -> TestClient:
            settings = settings or settings_in(tmp_path)
            loads = make_loads(settings)
            application = guarded(create_app(settings, loads), host=host, token=token)
            running.callback(loads.stop)
            return running.enter_context(TestClient(application, base_url=BASE, raise_server_exceptions=False))

        yield open_it


@contextmanager
def serving(settings: Settings, loads: Loads) -> Iterator[str]:
    """The API on a socket of this machine; yields the address of its routes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    application = guarded(create_app(settings, loads), host="127.0.0.1", token="")
    loads.start()
    server = uvicorn.Server(uvicorn.Config(application, log_level="error", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.02)
    try:
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1"
    finally:
        server.should_exit = True
        thread.join(60)
        loads.stop()
        listener.close()
        assert not thread.is_alive()


def problem_of(response: object) -> dict[str, str]:
    """The error of a refusal, after checking that it has the one shape."""
    body = response.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"kind", "message", "advice"}
    assert all(isinstance(value, str) for value in body["error"].values())
    assert body["error"]["message"]
    assert "Traceback" not in str(body)
    return dict(body["error"])
