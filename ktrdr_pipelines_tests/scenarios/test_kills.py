"""Killed loads leave a whole CSV, true claims, at most one request to repeat, and no unfinished run.

Real processes and SIGKILL, a real Dagster instance, a simulated gateway on a real socket, whose log lists the requests.
``KILLS=200`` in the environment (`make kills`) kills more often.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.partitions import partition_at
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.liveness import executing
from ktrdr_pipelines.orchestration.runs.queries import find_active_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.gateway import RequestRecord
from ktrdr_pipelines.simulator.server import GatewayThread
from ktrdr_pipelines_tests.conftest import LoadAt, StartGateway
from ktrdr_pipelines_tests.fakes import utc
from ktrdr_pipelines_tests.holding import make_dead_run, make_run
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import poll
from ktrdr_pipelines_tests.load_forks import ROOT, LoadForks

MakeSettings = Callable[..., Settings]

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "4"))
OPEN_REQUESTS = 6
"""The default of KTRDR_OPEN_REQUESTS: what a kill can cost."""
KILLS_PER_SERIES = 25
"""With more, a series would reach the present."""
SYMBOLS = ("AAPL", "MSFT", "SPY", "IBM", "KO", "JPM", "INTC", "AMD")
KILLED_WITHIN_S = 0.6
"""Every fourth kill is so soon after the start of the process, the others so soon after its first request."""
AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
FIRST = "2008-01-01"


# ---------------------------------------------------------------------------------------------------- killed loads


class FileCheck:
    """Checks the files of a series after each kill, without the store: as a trader would read them."""

    def __init__(self, data_dir: Path, symbol: str) -> None:
        self.csv, self.sidecar = data_dir / f"{symbol}_1h.csv", data_dir / f"{symbol}_1h.meta.json"
        self.expected = expected_bars(AAPL_1H, Window(utc(FIRST), utc("2024-01-01"))).opens
        self.rows: dict[str, str] = {}

    def look(self) -> list[str]:
        """All faults now."""
        if not self.csv.exists():
            return ["the CSV is gone"] if self.rows else []
        text = self.csv.read_text()
        text = text[: text.rindex("\n") + 1]  # a kill during an append leaves part of a row, which readers ignore
        header, *lines = text.splitlines()
        rows = {line.partition(",")[0]: line for line in lines}
        stamps = list(rows)
        wrong = []
        if header != "timestamp,open,high,low,close,volume":
            wrong.append("the CSV has no header")
        if any(line.count(",") != 5 or not all(map(float, line.split(",")[1:])) for line in lines):
            wrong.append("a row does not parse")
        if len(rows) != len(lines) or stamps != sorted(stamps):
            wrong.append("stamps do not strictly increase")
        if any(rows.get(stamp) != line for stamp, line in self.rows.items()):
            wrong.append(f"rows are gone or changed: {len(self.rows)} before, {len(rows)} now")
        self.rows = rows
        return wrong + self._find_false_claims(np.array([np.datetime64(s[:-1]) for s in stamps]).astype(np.int64))

    def _find_false_claims(self, held: np.ndarray) -> list[str]:
        if not self.sidecar.exists():
            return []
        known = json.loads(self.sidecar.read_text())
        wrong = []
        for span in known["answered"]:
            window = Window(utc(span["start"][:-1]), utc(span["end"][:-1]))
            claimed = self.expected[(self.expected >= window.start_s) & (self.expected < window.end_s)]
            if not np.isin(claimed, held).all():
                wrong.append(f"the sidecar claims {window}, which is not held")
        for key, mark in known["partitions"].items():
            month = partition_at(AAPL_1H.timeframe, utc(key)).window
            if mark["rows"] > ((held >= month.start_s) & (held < month.end_s)).sum():
                wrong.append(f"the sidecar counts {mark['rows']} rows in {key}, which are not there")
        if known["proven_empty"]:
            wrong.append("the sidecar records bars as absent")
        return wrong


def count_again(requests: list[RequestRecord], before: list[RequestRecord]) -> int:
    """How many of ``requests`` are for bars that were answered before. Loads go from old to new."""
    assert {r.kind for r in (*requests, *before)} <= {"history"}
    furthest = max((r.last for r in before), default=0)
    return sum(r.last <= furthest for r in requests)


def add_months(month: str, months: int) -> str:
    return f"{np.datetime64(month[:7], 'M') + np.timedelta64(months, 'M')}-01"


def unfinished_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs() if not run.is_finished]


def messages_of_runs(instance: dg.DagsterInstance) -> list[str]:
    return [entry.user_message for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.long
def test_loads_killed_at_random_instants_lose_nothing(
    start_gateway: StartGateway, load_at: LoadAt, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """After each SIGKILL the CSV is whole and has every earlier row, each claim of the sidecar is true, and the next load repeats
    at most the interrupted request. In the end the file is the truth, and Dagster has no unfinished run and no claimed slot."""
    gateway, chance = start_gateway(), random.Random(20240105)
    forks = load_at(gateway.port)
    for done in range(0, KILLS, KILLS_PER_SERIES):
        symbol = SYMBOLS[done // KILLS_PER_SERIES]
        kill_loads_of(symbol, min(KILLS_PER_SERIES, KILLS - done), gateway, forks, chance, tmp_path)
    with open_instance(make_settings(gateway.port)) as instance:
        assert unfinished_runs(instance) == []


def kill_loads_of(
    symbol: str, kills: int, gateway: GatewayThread, forks: LoadForks, chance: random.Random, folder: Path
) -> None:
    files = FileCheck(folder / "data", symbol)
    wrong: list[str] = []
    repeated = 0

    def asked() -> list[RequestRecord]:
        return [r for r in gateway.requests if r.symbol == symbol]

    assert forks.wait(forks.start(symbol, "1h", FIRST, "2008-02-01")) == 0
    files.look()
    for kill in range(kills):
        before, last = asked(), max(files.rows)
        # Two months that are held and more to come than one load can do in time.
        pid = forks.start(symbol, "1h", max(FIRST, add_months(last, -2)), add_months(last, 24))
        if kill % 4:
            poll(lambda before=before: len(asked()) > len(before))
        ended = select.select([], [], [], chance.uniform(0.0, KILLED_WITHIN_S))
        assert ended == ([], [], [])
        os.kill(pid, signal.SIGKILL)
        assert forks.wait(pid) == -signal.SIGKILL, "the load ended before the kill: it needs more to do"
        again = count_again(asked()[len(before) :], before)
        repeated += again
        wrong += [f"kill {kill}: {what}" for what in files.look()]
        if again > OPEN_REQUESTS:
            wrong.append(f"kill {kill}: {again} requests were repeated")
    before, end = asked(), add_months(max(files.rows), 3)
    assert forks.wait(forks.start(symbol, "1h", FIRST, end)) == 0, (folder / "loads.log").read_text()[-2000:]
    wrong += files.look()
    repeated += count_again(asked()[len(before) :], before)
    made = len(asked())
    assert forks.wait(forks.start(symbol, "1h", FIRST, end)) == 0
    assert len(asked()) == made, "bars were still missing"
    # The truth: one undisturbed load, with long requests.
    (folder / "truth").mkdir(exist_ok=True)
    options = {"folder": str(folder / "truth"), "limits": "current"}
    assert forks.wait(forks.start(symbol, "1h", FIRST, end, **options)) == 0
    truth = (folder / "truth" / "data" / files.csv.name).read_bytes()
    print(f"{symbol}: {kills} kills, {made} requests, {repeated} of them repeated, {len(files.rows)} rows, {wrong}")
    assert not wrong, "\n".join(wrong)
    assert len(files.rows) > kills * 140 / 2, "the loads made hardly any progress: the test is void"
    assert repeated <= OPEN_REQUESTS * kills
    assert truth == files.csv.read_bytes()


# ---------------------------------------------------------------------------------------------------- Dagster's record


@contextmanager
def killed(command: Sequence[str], gateway: GatewayThread, folder: Path) -> Iterator[None]:
    """Start ``command`` as a user does, kill it while the gateway keeps it waiting for an answer."""
    seen = len(gateway.requests)
    with (folder / "command.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(gateway, folder), cwd=folder, stdout=log, stderr=log)
        try:
            poll(lambda: len(gateway.requests) > seen or process.poll() is not None, 60)
            yield
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL, (folder / "command.log").read_text()


def environment(gateway: GatewayThread, folder: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "IB_PORT": str(gateway.port),
        "KTRDR_DATA_DIR": str(folder / "data"),
        "DAGSTER_HOME": str(folder / "home"),
    }


def ktrdr_command(symbol: str = "AAPL") -> list[str]:
    return [sys.executable, "-m", "ktrdr_pipelines.cli", "ib-load", symbol, "1h", "--mode", "full", "--start", "2024-02-05",
            "--end", "2024-02-10"]  # fmt: skip


def materialize_command(symbol: str = "AAPL") -> list[str]:
    return [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "ktrdr_pipelines.definitions", "--select",
            f"ohlcv/{symbol}_1h", "--partition", "2024-02-01"]  # fmt: skip


@pytest.mark.parametrize("command", [ktrdr_command(), materialize_command()], ids=["ktrdr", "materialize"])
def test_a_killed_command_leaves_no_run_and_no_slot_to_whoever_comes_next(
    start_gateway: StartGateway, load_at: LoadAt, make_settings: MakeSettings, tmp_path: Path, command: list[str]
) -> None:
    """The next load goes on at once, and shows the killed run and its partition as failed."""
    gateway = start_gateway([FaultRule(kind="silent", nth=(1,))])
    with open_instance(make_settings(gateway.port)) as instance:
        with killed(command, gateway, tmp_path):
            (run,) = unfinished_runs(instance)
            assert run.status is dg.DagsterRunStatus.STARTED
        assert len(unfinished_runs(instance)) == 1, "who noticed?"
        forks = load_at(gateway.port)
        assert forks.wait(forks.start("MSFT", "1h", "2024-02-05", "2024-02-10")) == 0
        assert unfinished_runs(instance) == []
        dead = instance.get_run_by_id(run.run_id)
        assert dead is not None
        assert dead.status is dg.DagsterRunStatus.FAILURE
        assert instance.get_status_by_partition(
            asset_key(AAPL_1H), ["2024-02-01"], define_partitions(AAPL_1H.timeframe, make_settings(gateway.port))
        )["2024-02-01"].value == "FAILED"  # fmt: skip


def test_a_materialization_does_not_wait_for_a_killed_load(
    start_gateway: StartGateway, load_at: LoadAt, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """`dagster asset materialize` right after a killed load: no wait for a daemon, no person needed."""
    gateway = start_gateway([FaultRule(kind="silent", nth=(1,))])
    forks = load_at(gateway.port)
    pid = forks.start("AAPL", "1h", "2024-02-05", "2024-02-10")
    poll(lambda: len(gateway.requests) == 1, 60)
    os.kill(pid, signal.SIGKILL)
    forks.wait(pid)
    done = subprocess.run(
        materialize_command("MSFT"), env=environment(gateway, tmp_path), cwd=tmp_path, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    with open_instance(make_settings(gateway.port)) as instance:
        assert unfinished_runs(instance) == []


def test_a_load_that_waits_for_another_of_its_series_goes_on_when_that_is_killed(
    start_gateway: StartGateway, load_at: LoadAt, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Nobody else is there to notice: the one who waits has to."""
    gateway = start_gateway([FaultRule(kind="silent", nth=(1,))])
    forks = load_at(gateway.port)
    with open_instance(make_settings(gateway.port)) as instance:
        holder = forks.start("AAPL", "1h", "2024-02-05", "2024-02-10")
        poll(lambda: len(gateway.requests) == 1, 60)
        waiter = forks.start("AAPL", "1h", "2024-02-05", "2024-02-10")
        poll(lambda: any("another load of AAPL 1h" in text for text in messages_of_runs(instance)), 60)
        os.kill(holder, signal.SIGKILL)
        assert forks.wait(waiter) == 0
        assert unfinished_runs(instance) == []
    assert (tmp_path / "data" / "AAPL_1h.csv").exists()


def test_a_sensor_s_tick_reaps_runs_of_dead_processes_only(instance: dg.DagsterInstance) -> None:
    """This process' run goes on, a dead one's has failed."""
    mine, _ = make_run(instance), make_dead_run(instance)
    with executing(instance, mine.run_id):
        assert find_active_runs(instance).find(AAPL_1H) == mine.run_id
    assert {run.run_id for run in unfinished_runs(instance)} == {mine.run_id}
