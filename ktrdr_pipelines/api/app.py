"""The REST API put together, and served: routes, refusals, the guard, the queue of loads."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

import click
import uvicorn
from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from ktrdr_pipelines.api import error_responses, models, routes_data, routes_ib
from ktrdr_pipelines.api.coalesce import Turnstile
from ktrdr_pipelines.api.loads import Loads
from ktrdr_pipelines.api.security import Guard, check_binding
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.orchestration.runs.dagster_services import DagsterServices
from ktrdr_pipelines.settings import Settings, load_settings

PREFIX = "/api/v1"
_DESCRIPTION = """\
Historical bars from Interactive Brokers, as one clean CSV per series. Times are ISO 8601, UTC; start is included, end is not.
Every failure has the shape `{"error": {"kind", "message", "advice"}}`.
"""


def create_app(settings: Settings, loads: Loads) -> FastAPI:
    """The API without its guard. The caller starts ``loads``, which end with its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.loads = loads
        app.state.is_ending = False
        # Few at a time: each connects, and client ids are few; or reads a whole file.
        app.state.gateway_questions = Turnstile(width=2, waiting=200)
        # Bounded in time: what users ask when other questions hang never waits for those.
        app.state.state_questions = Turnstile(width=3, waiting=200)
        app.state.file_questions = Turnstile(width=2, waiting=200)
        # Each may wait for the gateway or for Dagster; those that wait for a load look at it now and then.
        app.state.load_questions = Turnstile(width=4, waiting=1000)
        try:
            yield
        finally:
            loads.stop()

    app = FastAPI(
        title="ktrdr pipelines",
        version=version("ktrdr-pipelines"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        responses={
            422: {"model": models.Refusal, "description": "Invalid input."},
            "4XX": {"model": models.Refusal, "description": "Refused: invalid input, or not allowed."},
            "5XX": {"model": models.Refusal, "description": "Failed: the gateway, its bars, the disk, or a bug."},
        },
    )
    app.state.settings = settings
    error_responses.install(app)
    known_only = [Depends(error_responses.refuse_unknown_parameters)]
    for router in (routes_ib.router, routes_data.router):
        app.include_router(router, prefix=PREFIX, dependencies=known_only)
    return app


def guarded(app: FastAPI, *, host: str, token: str) -> ASGIApp:
    """``app`` behind its guard, which knows the ``host`` that it listens on."""
    check_binding(host, token)
    return Guard(app, host=host, token=token)


def serve(host: str, port: int) -> int:
    """Serve until interrupted.

    Raises:
        InputError: the address cannot be used, or may not be without a token, or another server uses this Dagster home.
        StoreError: the Dagster home cannot be written.
    """
    settings = load_settings()
    loads = Loads(settings, DagsterServices(settings, notify=lambda text: click.echo(f"ktrdr serve: {text}")))
    app = create_app(settings, loads)
    application = guarded(app, host=host, token=settings.api_token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen()  # from here on the port is ours; until then another one could bind it too
    except (OSError, UnicodeError) as error:
        listener.close()
        raise InputError(
            f"{host}:{port} cannot be used: {getattr(error, 'strerror', None) or error}",
            doing="serving the REST API",
            advice="Choose another --port or --host.",
        ) from None
    config = uvicorn.Config(
        application, log_level="info", server_header=False, timeout_graceful_shutdown=5, lifespan="on"
    )
    shown = f"http://{f'[{host}]' if ':' in host.strip('[]') else host}:{port}"
    server = _Server(config, app, f"REST API at {shown}{PREFIX}, described at {shown}/docs (Ctrl-C ends it)")
    # A container's engine ends it with SIGTERM, a user with Ctrl-C; uvicorn ends in order and raises the signal once more.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listener, suppress(KeyboardInterrupt):
        loads.start()
        try:
            server.run(sockets=[listener])
        finally:
            loads.stop()
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Prints ``ready`` once it answers. When it ends, requests that wait for a load are answered with the load's state."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, ready: str) -> None:
        super().__init__(config)
        self._app, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        click.echo(self._ready)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.is_ending = True
        await super().shutdown(sockets=sockets)
