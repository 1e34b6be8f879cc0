"""Fixtures shared by the tests: a simulated gateway on a real socket, settings that point at it and at throw-away folders."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from filelock import FileLock
from hypothesis import settings as hypothesis_settings

from ktrdr_pipelines.ib.pacing.ledger import Ledger, open_ledger
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import LOGIN, HandClock
from ktrdr_pipelines_tests.load_forks import (
    CommandForks,
    Ended,
    ForkServer,
    LoadForks,
    Ready,
    make_ready,
    outer_environment,
)

# Two shared cores: a slow moment is no failure.
# The same examples each time, so that a change that passed passes again; KTRDR_EXPLORE=1 looks for new ones.
hypothesis_settings.register_profile("ktrdr", deadline=None, derandomize=not os.environ.get("KTRDR_EXPLORE"))
hypothesis_settings.load_profile("ktrdr")

# A script's background job ignores these signals, and so would every process that a test starts: handlers are not handed on.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

StartGateway = Callable[..., GatewayThread]
LoadAt = Callable[[int], LoadForks]
Ktrdr = Callable[..., Ended]
CommandEnvironment = Callable[..., dict[str, str]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each worker's share, as `--dist worksteal` deals them out at first, begins with tests marked as long: begun late, one of
    them keeps everybody waiting for it."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.get_closest_marker("long")]
    others = iter([item for item in items if not item.get_closest_marker("long")])
    if workers == 1 or len(items) < 100 * workers:
        return
    shares = [(len(items) + n) // workers for n in range(workers)]
    first = [long[n::workers] for n in range(workers)]
    items[:] = [
        item
        for mine, share in zip(first, shares, strict=True)
        for item in (*mine, *itertools.islice(others, share - len(mine)))
    ]


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
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """Made once, for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "ready"
    with FileLock(shared / "ready.lock"):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp("ready")
            with run_in_thread(SyntheticMarket(), judge=False) as gateway:
                make_ready(unfinished, gateway.port)
            unfinished.rename(folder)
    return Ready(folder)


@pytest.fixture(scope="session")
def fork_server(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A process whose children load."""
    server = ForkServer(tmp_path_factory.mktemp("forks"), ready.modules(ours=True))
    yield server
    server.close()


@pytest.fixture(scope="session")
def command_server(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A process whose children are commands."""
    server = ForkServer(tmp_path_factory.mktemp("commands"), ready.modules(ours=False))
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
def instance(ready: Ready, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real Dagster instance on disk, thrown away after the test."""
    home = tmp_path / "instance"
    for folder in ("history", "schedules"):  # to initialise them takes half a second
        shutil.copytree(ready.home / folder, home / folder)
    with dg.DagsterInstance.local_temp(str(home)) as made:
        yield made


@pytest.fixture
def clock() -> HandClock:
    """A clock that only the test moves."""
    return HandClock()


@pytest.fixture
def open_here() -> Iterator[Callable[..., Ledger]]:
    """`open_ledger`; what it opens is closed with the test."""
    with ExitStack() as opened:
        yield lambda *arguments: opened.enter_context(open_ledger(*arguments))


@pytest.fixture
def ledger(open_here: Callable[..., Ledger], tmp_path: Path, clock: HandClock) -> Ledger:
    """A pacing ledger of that clock, in a folder of the test's own."""
    return open_here(tmp_path, LOGIN, clock)


@pytest.fixture
def unused_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def command_environment(tmp_path: Path, unused_port: int) -> CommandEnvironment:
    """What `ktrdr` finds in its environment: everything in the test's folder; by default no gateway answers."""

    def make(port: int = unused_port, **settings: str) -> dict[str, str]:
        return outer_environment() | {
            "IB_PORT": str(port),
            "KTRDR_IN_CONTAINER": "false",
            "KTRDR_DATA_DIR": str(tmp_path / "data"),
            "DAGSTER_HOME": str(tmp_path / "home"),
            "IB_RETRY_WAITS": "",
            **settings,
        }

    return make


@pytest.fixture
def command_forks(command_server: ForkServer, tmp_path: Path) -> CommandForks:
    """Commands in the test's folder, each in a process of its own that had its imports done, but for this project's."""
    return CommandForks(command_server, tmp_path)


@pytest.fixture
def ktrdr(command_forks: CommandForks, command_environment: CommandEnvironment) -> Ktrdr:
    """Run `ktrdr` in a process of its own."""

    def run(*arguments: str, **options: Any) -> Ended:
        return command_forks.run(*arguments, environment=command_environment(**options))

    return run


@pytest.fixture
def started_ktrdr(command_environment: CommandEnvironment, tmp_path: Path) -> Ktrdr:
    """Run `ktrdr` as a person does: the same, slower by seconds."""

    def run(*arguments: str, **options: Any) -> Ended:
        command = [sys.executable, "-m", "ktrdr_pipelines.cli", *arguments]
        done = subprocess.run(
            command, env=command_environment(**options), cwd=tmp_path, capture_output=True, text=True, timeout=90
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run
