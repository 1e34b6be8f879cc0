"""Fixtures shared by the tests: a simulated gateway on a real socket, settings that point at it and at throw-away folders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hypothesis import settings as hypothesis_settings

from ktrdr_pipelines.ib.ledger import Ledger, open_ledger
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.ledger_tools import LOGIN, HandClock
from ktrdr_pipelines_tests.load_forks import ForkServer, LoadForks

# Two shared cores: a slow moment is no failure.
hypothesis_settings.register_profile("ktrdr", deadline=None)
hypothesis_settings.load_profile("ktrdr")

StartGateway = Callable[..., GatewayThread]
LoadAt = Callable[[int], LoadForks]
Ktrdr = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never see the developer's settings, and never write to the project's own data or Dagster home."""
    for name in os.environ:
        if name.startswith(("IB_", "KTRDR_", "DAGSTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("KTRDR_IN_CONTAINER", "false")  # simulated gateways are on this machine, wherever the tests run


@pytest.fixture
def start_gateway() -> Iterator[StartGateway]:
    """Start simulated gateways that end with the test; by default they do not judge pacing, which costs real seconds."""
    with ExitStack() as running:

        def start(faults: Iterable[FaultRule] = (), **options: Any) -> GatewayThread:
            options = {"judge": False, **options}
            market = options.pop("market", None) or SyntheticMarket()
            return running.enter_context(run_in_thread(market, faults=tuple(faults), **options))

        yield start


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A process whose children load, warm after its first one."""
    folder = tmp_path_factory.mktemp("forks")
    server = ForkServer(folder)
    with run_in_thread(SyntheticMarket(), judge=False) as gateway:
        first = LoadForks(server, gateway.port, folder)
        assert first.wait(first.start("AAPL", "1h", "2024-02-05", "2024-02-10")) == 0
    server.warm_up()
    yield server
    server.close()


@pytest.fixture
def load_at(fork_server: ForkServer, tmp_path: Path) -> Callable[[int], LoadForks]:
    """Loads against the gateway on a port, each in a process that can be killed, all in the test's folder."""
    return lambda port: LoadForks(fork_server, port, tmp_path)


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings for a gateway's port with throw-away folders, and retries that do not wait."""

    def make(port: int, **overrides: object) -> Settings:
        return load_settings(
            **{
                "ib_port": port,
                "data_dir": tmp_path / "data",
                "dagster_home": tmp_path / "home",
                "ib_retry_waits_s": (0.01, 0.01, 0.01),
                "ib_request_timeout_s": 20.0,
                **overrides,
            }
        )

    return make


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real Dagster instance on disk, thrown away after the test."""
    home = tmp_path / "instance"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as made:
        yield made


@pytest.fixture
def clock() -> HandClock:
    """A clock that only the test moves."""
    return HandClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: HandClock) -> Iterator[Ledger]:
    """A pacing ledger of that clock, in a folder of the test's own."""
    opened = open_ledger(tmp_path, LOGIN, clock)
    yield opened
    opened.close()


@pytest.fixture
def unused_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ktrdr(tmp_path: Path, unused_port: int) -> Ktrdr:
    """Run `ktrdr` in an empty folder; by default no gateway answers."""

    def run(*arguments: str, port: int = unused_port, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("IB_", "KTRDR_", "DAGSTER_"))} | {
            "IB_PORT": str(port),
            "KTRDR_IN_CONTAINER": "false",
            "KTRDR_DATA_DIR": str(tmp_path / "data"),
            "DAGSTER_HOME": str(tmp_path / "home"),
            "IB_RETRY_WAITS": "",
            **settings,
        }
        command = [sys.executable, "-m", "ktrdr_pipelines.cli", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90)

    return run
