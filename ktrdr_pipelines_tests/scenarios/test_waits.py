"""Whatever a load waits for, it says so within two seconds and ends within two seconds on SIGINT and SIGTERM.

Real processes in every state that a load can wait in. The end has a generous limit here, since test machines are slow; the
two seconds to the line are checked with a moved clock in `loading/test_unanswered.py`. What was loaded is kept, the run is over
in Dagster, locks and client ids are free.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from filelock import FileLock

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.ib.pacing.ledger import open_ledger
from ktrdr_pipelines.ib.pacing.sqlite_backend import ledger_path
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread
from ktrdr_pipelines_tests.conftest import CommandEnvironment, StartGateway
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import poll
from ktrdr_pipelines_tests.ib.scripted_gateway import ScriptedGateway
from ktrdr_pipelines_tests.load_forks import CommandForks

pytestmark = pytest.mark.slow

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
ENDS_WITHIN_S = 6.0
"""Two seconds, on a machine that does three other things."""
COMMAND = ("ib-load", "AAPL", "1h", "--mode", "full", "--start", "2023-01-01", "--end", "2024-01-01")


@dataclass
class Place:
    """Where a state is made: the folders of the load, and what makes gateways."""

    folder: Path
    start_gateway: StartGateway
    stack: ExitStack

    def gateway(self, *rules: FaultRule) -> GatewayThread:
        return self.start_gateway(rules, latency_s=0.01)

    def lock(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stack.enter_context(FileLock(path, timeout=0))

    def login_ledger(self, port: int) -> Path:
        folder = self.folder / "home" / "ib"
        with open_ledger(folder, f"127.0.0.1:{port}") as ledger:
            ledger.snapshot()
        return ledger_path(folder, f"127.0.0.1:{port}")


@dataclass(frozen=True)
class State:
    """``make`` brings a load into the state and returns the port of its gateway; ``shown`` is part of the line that it prints."""

    make: Callable[[Place], int]
    shown: str
    retry_waits: str = "15,30,60"
    has_run: bool = True
    """Whether the load is a run in Dagster by then."""


def _faulty(*rules: FaultRule) -> Callable[[Place], int]:
    return lambda place: place.gateway(*rules).port


def _connect_in_silence(place: Place) -> int:
    return place.stack.enter_context(ScriptedGateway(hello=None)).port


def _series_lock(place: Place) -> int:
    place.lock(place.folder / "data" / ".AAPL_1h.load.lock")
    return place.gateway().port


def _write_lock(place: Place) -> int:
    place.lock(place.folder / "data" / ".AAPL_1h.lock")
    return place.gateway().port


def _new_home(place: Place) -> int:
    place.lock(place.folder / "home" / ".initialising.lock")
    return place.gateway().port


def _locked_ledger(place: Place) -> int:
    port = place.gateway().port
    database = sqlite3.connect(place.login_ledger(port), isolation_level=None)
    place.stack.enter_context(closing(database))
    database.execute("BEGIN IMMEDIATE")
    return port


def _pause_of_all(place: Place) -> int:
    port = place.gateway().port
    place.login_ledger(port)
    with open_ledger(place.folder / "home" / "ib", f"127.0.0.1:{port}") as ledger:
        ledger.penalise("the gateway answered 162 (pacing violation)", 300.0)
    return port


LATER = tuple(range(2, 100))

STATES = {
    "the first connection": State(_connect_in_silence, "the gateway at"),
    "an answer": State(_faulty(FaultRule("silent", nth=LATER)), "IB's answer"),
    "a retry": State(_faulty(FaultRule("error", text="unexpected failure", nth=LATER)), "retry 1 of 3"),
    "an outage of a farm": State(_faulty(FaultRule("farm_down", nth=(2,), seconds=60)), "outage"),
    "an outage of the link": State(
        _faulty(FaultRule("link_down", nth=(2,), seconds=60, back=1101, meanwhile="lost")), "outage"
    ),
    "a gateway that restarts": State(_faulty(FaultRule("restart", nth=(2,), seconds=60)), "restarting"),
    "a gateway that hangs": State(_faulty(FaultRule("hang", nth=(2,), seconds=60)), "IB's answer"),
    "a pacing pause": State(_pause_of_all, "pacing: pause of all processes"),
    "the series lock": State(_series_lock, "another load of AAPL 1h"),
    "the write lock": State(_write_lock, "another process that writes AAPL_1h.csv"),
    "a locked ledger": State(_locked_ledger, "the pacing ledger"),
    "a home that is initialised": State(_new_home, "another process that initialises", has_run=False),
}


@contextmanager
def alone(folder: Path, start_gateway: StartGateway) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(folder, start_gateway, stack)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_wait_is_shown_and_ends_with_the_program(
    start_gateway: StartGateway,
    command_forks: CommandForks,
    command_environment: CommandEnvironment,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    state: State,
    number: signal.Signals,
) -> None:
    """The line appears, without a terminal; the command ends with exit code 130 and one line; the run is over."""
    with alone(tmp_path, start_gateway) as place:
        port = state.make(place)
        environment = command_environment(port, IB_RETRY_WAITS=state.retry_waits)
        pid = command_forks.start(*COMMAND, environment=environment)
        poll(lambda: state.shown in command_forks.stderr_of(pid), 60)
        begun_s = time.monotonic()
        os.kill(pid, number)
        ended = command_forks.wait(pid)
        took_s = time.monotonic() - begun_s
    assert ended.returncode == 130, ended
    assert took_s < ENDS_WITHIN_S
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == "ktrdr: interrupted; what was loaded is kept"
    assert not list((tmp_path / "home").glob("ib/client_ids_*/*.owner")), "a client id is still leased"
    FileLock(tmp_path / "data" / ".AAPL_1h.load.lock", timeout=0).acquire().lock.release()
    with open_instance(make_settings(port)) as instance:
        statuses = [run.status for run in instance.get_runs()]
        assert statuses == [dg.DagsterRunStatus.FAILURE] * state.has_run
        if state.has_run:
            (run,) = instance.get_runs()
            assert any(state.shown in entry.user_message for entry in instance.all_logs(run.run_id)), (
                "not in the run log"
            )
