"""Six requests open at once, across several series, and something goes wrong: nothing is lost, doubled, or attributed to another
request, and a second load completes the files. Real sockets; the bench and its checks are in `overlap.py`.

``OVERLAP=200`` in the environment plays more random jobs.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.ib.pacing.ledger import open_ledger
from ktrdr_pipelines.loading.report import Fetched
from ktrdr_pipelines.orchestration.runs.instance import open_instance, provided_file
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import CommandEnvironment, StartGateway
from ktrdr_pipelines_tests.fakes import window
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import poll
from ktrdr_pipelines_tests.load_forks import CommandForks, Ended
from ktrdr_pipelines_tests.postgres_server import throw_away_cluster
from ktrdr_pipelines_tests.scenarios.overlap import (
    NOW,
    SYMBOLS,
    Mix,
    Mixer,
    OverlapBench,
    Relay,
    Result,
    Trial,
    count_sent,
    error_about,
    id_of,
    series_of,
)

pytestmark = pytest.mark.slow

FOUR = SYMBOLS[:4]
REQUESTS = 7
"""Of each series."""
TRIALS = int(os.environ.get("OVERLAP", "4"))
_162 = "Historical Market Data Service error message:"
QUICK: dict[str, Any] = {"request_timeout_s": 0.6, "probe_timeout_s": 0.6}


@pytest.fixture
def bench(tmp_path: Path) -> OverlapBench:
    return OverlapBench(tmp_path)


def complete(bench: OverlapBench, start_gateway: StartGateway, symbols: tuple[str, ...] = FOUR) -> None:
    """A load from a gateway without faults: then every file is the truth."""
    result = bench.load(start_gateway(clock=NOW.timestamp).port, symbols)
    assert all(verdict.is_exact for verdict in result.verdicts.values()), result.verdicts
    assert result.failed == set()


NTH = (9,)
"""By then six are open: the first of each series goes alone."""

LOST: dict[str, tuple[FaultRule, ...]] = {
    "the socket is dropped before an answer": (FaultRule("drop_after", nth=NTH, after_bytes=0),),
    "the socket is dropped within an answer": (FaultRule("drop_after", nth=NTH, after_bytes=3000),),
    "dropped three times": (FaultRule("drop_after", nth=(6, 12, 18), after_bytes=500),),
    "connected and silent": (FaultRule("hang", nth=NTH, seconds=2.0),),
    "restart": (FaultRule("restart", nth=NTH, seconds=0.5),),
    "1100, 1102, answers at the end": (FaultRule("link_down", nth=NTH, seconds=0.4),),
    "1100, 1101, answers lost": (FaultRule("link_down", nth=NTH, seconds=0.3, back=1101, meanwhile="lost"),),
    "2105, 2106, answers lost": (FaultRule("farm_down", nth=NTH, seconds=0.3, meanwhile="lost"),),
    "restart during an outage": (
        FaultRule("farm_down", nth=NTH, seconds=0.5, meanwhile="empty"),
        FaultRule("drop_after", nth=(10,), after_bytes=0),
    ),
    "one answer never": (FaultRule("silent", nth=NTH),),
    "one answer after it was given up": (FaultRule("late", nth=NTH),),
    "pacing once": (FaultRule("pacing", nth=NTH),),
    "420 once": (FaultRule("error", nth=NTH, code=420, text="Invalid Real-time Query: pacing violation"),),
    "pacing and a drop": (FaultRule("pacing", nth=NTH), FaultRule("drop_after", nth=(11,), after_bytes=0)),
    "late, slow and out of order": (
        FaultRule("slow", nth=(5, 9, 13), seconds=0.3),
        FaultRule("slow", nth=(6, 14, 20), seconds=0.1),
        FaultRule("out_of_order", nth=(7, 8), rows=9),
        FaultRule("duplicate", nth=(9, 10), rows=5),
    ),
}


@pytest.mark.parametrize("rules", LOST.values(), ids=LOST)
def test_transient_trouble_with_six_requests_open_costs_nothing(
    start_gateway: StartGateway, bench: OverlapBench, rules: tuple[FaultRule, ...]
) -> None:
    """Every bar of four series arrives in the same run, at most the open requests are repeated, and no retry holds up others."""
    gateway = start_gateway(rules, clock=NOW.timestamp, latency_s=0.02)
    result = bench.load(gateway.port, FOUR, **QUICK)
    assert result.failed == set(), {symbol: result.errors_of(symbol) for symbol in result.failed}
    assert all(verdict.is_exact for verdict in result.verdicts.values())
    assert any(record.faults for record in gateway.requests), "the fault never arose: the test is void"
    assert count_sent(gateway) <= result.requests
    drops = sum(len(rule.nth) for rule in rules if rule.kind not in ("silent", "late", "pacing", "error", "slow"))
    assert result.requests <= len(FOUR) * REQUESTS + 2 * 6 * drops + 6, result.requests
    complete(bench, start_gateway)


def test_overlapping_requests_cost_no_more_than_one_at_a_time(start_gateway: StartGateway, tmp_path: Path) -> None:
    counts = []
    for open_requests in (1, 6):
        bench = OverlapBench(tmp_path / str(open_requests))
        gateway = start_gateway(clock=NOW.timestamp, latency_s=0.005)
        assert bench.load(gateway.port, FOUR, open_requests=open_requests).failed == set()
        counts.append(count_sent(gateway))
    assert counts == [len(FOUR) * REQUESTS] * 2


def test_one_of_ten_series_without_permission_and_one_unknown_fail_alone(
    start_gateway: StartGateway, bench: OverlapBench
) -> None:
    """One clear line each; not repeated for each of its windows."""
    symbols = (*SYMBOLS, "NVDA", "ZZZZ")
    rules = [FaultRule("error", symbol="KO", code=162, text=f"{_162}No market data permissions for NYSE STK")]
    gateway = start_gateway(rules, clock=NOW.timestamp, latency_s=0.005)
    result = bench.load(gateway.port, symbols, unknown="ZZZZ")
    assert result.failed == {"KO", "ZZZZ"}
    assert any("permissions" in error for error in result.errors_of("KO"))
    assert sum(record.symbol == "KO" for record in gateway.requests) <= 3
    assert all(verdict.is_exact for symbol, verdict in result.verdicts.items() if symbol != "KO")
    (line,) = result.errors_of("ZZZZ")
    assert "ZZZZ" in line
    complete(bench, start_gateway, symbols[:-1])


# ---------------------------------------------------------------------------------------------------- odd messages


def shuffled(answers: list[bytes], chance: Random) -> list[bytes]:
    return chance.sample(answers, len(answers))


def twice(answers: list[bytes], chance: Random) -> list[bytes]:
    return shuffled(answers * 2, chance)


def with_errors_for_others(answers: list[bytes], chance: Random) -> list[bytes]:
    """Before and after each answer a false "no data" for an id of no request, or of one that was answered already."""
    no_data = f"{_162}HMDS query returned no data: AAPL@SMART Trades"
    mixed = []
    for answer in shuffled(answers, chance):
        mixed += [error_about(99_999, 162, no_data), answer, error_about(id_of(answer), 162, no_data)]
        mixed += [error_about(id_of(answer), 366, f"No historical data query found for ticker id:{id_of(answer)}")]
    return mixed


@pytest.mark.parametrize("mix", [shuffled, twice, with_errors_for_others])
def test_answers_in_any_order_and_number_go_to_their_requests(
    start_gateway: StartGateway, bench: OverlapBench, mix: Mix
) -> None:
    """Six answers collected and sent in another order, in pieces; each twice; with errors for ids that are not open."""
    gateway = start_gateway(clock=NOW.timestamp)
    with Mixer(gateway.port, mix) as mixer:
        result = bench.load(mixer.port, FOUR)
    assert result.failed == set()
    assert all(verdict.is_exact for verdict in result.verdicts.values())
    assert count_sent(gateway) == result.requests == len(FOUR) * REQUESTS


def test_one_answer_of_a_batch_that_never_comes_costs_its_own_retry_only(
    start_gateway: StartGateway, bench: OverlapBench
) -> None:
    dropped: list[bytes] = []

    def without_one(answers: list[bytes], chance: Random) -> list[bytes]:
        if not dropped and len(answers) > 2:
            dropped.append(answers.pop(1))
        return shuffled(answers, chance)

    gateway = start_gateway(clock=NOW.timestamp)
    with Mixer(gateway.port, without_one) as mixer:
        result = bench.load(mixer.port, FOUR, **QUICK)
    assert dropped
    assert result.failed == set()
    assert result.requests == len(FOUR) * REQUESTS + 1


# ---------------------------------------------------------------------------------------------------- random jobs


@pytest.mark.timeout(60 + 15 * TRIALS)
def test_random_faults_lose_nothing(tmp_path: Path) -> None:
    """One to three faults, one to eight series: a series fails for a reason, what it lost is reported, and the next load has all
    that the faults cost."""
    for seed in range(TRIALS):
        trial = Trial.of(seed)
        first, second, least = trial.play(tmp_path / str(seed))
        assert trial.permanent <= first.failed, (seed, trial)
        assert second.failed == set(), (seed, trial, {s: second.errors_of(s) for s in second.failed})
        assert all(verdict.is_exact for verdict in second.verdicts.values()), (seed, trial)
        assert first.requests + second.requests >= least


# ---------------------------------------------------------------------------------------------------- disk and database


class FillingDisk(Disk):
    """Has no space left for ``full_writes`` writes, after ``free_writes`` others: a write then ends in the middle."""

    def __init__(self, free_writes: int, full_writes: int) -> None:
        self.free_writes, self.full_writes, self.writes = free_writes, full_writes, 0

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.writes += 1
        if self.free_writes < self.writes <= self.free_writes + self.full_writes:
            if len(data) > 20:
                os.write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize(("free", "full"), [(12, 1), (13, 2), (20, 10**9)])
def test_a_disk_that_fills_up_during_an_append_costs_the_windows_that_were_not_written(
    start_gateway: StartGateway, tmp_path: Path, free: int, full: int
) -> None:
    bench = OverlapBench(tmp_path, store=Store(tmp_path / "data", disk=FillingDisk(free, full)))
    result = bench.load(start_gateway(clock=NOW.timestamp, latency_s=0.005).port, FOUR)
    assert result.failed, "the disk was never full: the test is void"
    for symbol in result.failed:
        assert all("space" in error for error in result.errors_of(symbol)), result.errors_of(symbol)
    complete(OverlapBench(tmp_path), start_gateway)


@contextmanager
def switched_database() -> Iterator[tuple[Relay, str]]:
    """A PostgreSQL server that can go away, and the URL of its database."""

    def connect() -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(folder / ".s.PGSQL.5432"))
        return server

    with throw_away_cluster("ledger") as folder, Relay(connect) as switch:
        yield switch, f"postgresql+psycopg://ktrdr@127.0.0.1:{switch.port}/ledger"


@pytest.mark.postgres
def test_a_ledger_in_postgresql_that_goes_away_in_the_middle_is_waited_for(
    start_gateway: StartGateway, bench: OverlapBench
) -> None:
    """While it is away nothing is sent; the retries bring the rest, and each request is in the ledger once."""
    with switched_database() as (switch, url):
        gateway = start_gateway(clock=NOW.timestamp, latency_s=0.02)

        def on_event(_symbol: str, event: Any) -> None:
            if isinstance(event, Fetched) and event.done == 2 and not switch.is_off:
                sent = count_sent(gateway)
                switch.switch_off()
                time.sleep(0.3)
                assert count_sent(gateway) <= sent + 6
                switch.switch_on()

        result = bench.load(gateway.port, FOUR, on_event=on_event, ledger_url=url)
        assert result.failed == set(), {symbol: result.errors_of(symbol) for symbol in result.failed}
        assert any("ledger" in waiting.reason for waiting in result.waits)
        with open_ledger(url, f"127.0.0.1:{gateway.port}", bench.clock) as ledger:
            assert ledger.snapshot().pauses == ()
    complete(bench, start_gateway)


@pytest.mark.postgres
def test_a_ledger_in_postgresql_that_stays_away_costs_windows_and_sends_nothing(
    start_gateway: StartGateway, bench: OverlapBench
) -> None:
    with switched_database() as (switch, url):
        gateway = start_gateway(clock=NOW.timestamp, latency_s=0.02)
        sent: list[int] = []

        def on_event(_symbol: str, event: Any) -> None:
            if isinstance(event, Fetched) and event.done == 2 and not switch.is_off:
                switch.switch_off()
                sent.append(count_sent(gateway))

        result: Result = bench.load(gateway.port, FOUR, on_event=on_event, ledger_url=url, retry_waits_s=(1.0,))
        assert result.failed == set(FOUR)
        assert count_sent(gateway) <= sent[0] + 6
        for symbol in FOUR:
            assert all("ledger" in error for error in result.errors_of(symbol))
    complete(bench, start_gateway)


# ---------------------------------------------------------------------------------------------------- Dagster's records


SLOW = ("ib-load", "AAPL", "1h", "--mode", "full", "--start", "2023-01-01", "--end", "2023-06-01")


class SlowLoad:
    """`ktrdr ib-load` of five months from a slow gateway."""

    def __init__(self, forks: CommandForks, environment: dict[str, str], folder: Path) -> None:
        self._forks, self._environment = forks, environment
        self.csv = folder / "data" / "AAPL_1h.csv"
        self._expected = len(expected_bars(series_of("AAPL"), window("2023-01-01", "2023-06-01")))

    def disturb(self, disturb: Callable[[], object]) -> Ended:
        """Load, and call ``disturb`` once the first bars are in the file."""
        pid = self._forks.start(*SLOW, environment=self._environment)
        poll(self.csv.exists, 60)
        disturb()
        return self._forks.wait(pid)

    def complete(self) -> None:
        """Load again: every bar is there then."""
        ended = self._forks.run(*SLOW, environment=self._environment)
        assert ended.returncode == 0, ended
        assert len(self.csv.read_text().splitlines()) == 1 + self._expected


@pytest.fixture
def slow_load(
    start_gateway: StartGateway, command_forks: CommandForks, command_environment: CommandEnvironment, tmp_path: Path
) -> SlowLoad:
    port = start_gateway([FaultRule("slow", seconds=0.5)]).port
    return SlowLoad(command_forks, command_environment(port), tmp_path)


def assert_one_clear_line(ended: Ended) -> None:
    """About Dagster's records, with what to do; no traceback."""
    assert ended.returncode == StoreError.exit_code, ended
    assert "Traceback" not in ended.stderr
    assert "Bars in the CSV are kept" in ended.stderr.splitlines()[-1]


def test_a_run_whose_record_is_deleted_meanwhile_keeps_its_bars(
    slow_load: SlowLoad, make_settings: Callable[..., Settings]
) -> None:
    def delete_runs() -> None:
        with open_instance(make_settings(1)) as instance:
            for run in instance.get_runs():
                instance.delete_run(run.run_id)

    assert_one_clear_line(slow_load.disturb(delete_runs))
    slow_load.complete()


def test_a_dagster_home_that_is_removed_meanwhile_costs_no_bar(slow_load: SlowLoad, tmp_path: Path) -> None:
    assert_one_clear_line(slow_load.disturb(lambda: (tmp_path / "home").rename(tmp_path / "gone")))
    slow_load.complete()


@pytest.mark.postgres
def test_a_database_of_dagster_that_goes_away_for_a_moment_costs_nothing(slow_load: SlowLoad, tmp_path: Path) -> None:
    """Dagster tries again. (For longer than a minute: one line, as for the home.)"""
    with switched_database() as (switch, _):
        (tmp_path / "home").mkdir()
        url = f"postgresql+psycopg2://ktrdr@127.0.0.1:{switch.port}/ledger"
        config = provided_file("dagster_home/dagster.yaml").read_text()
        storage = f"\nstorage:\n  postgres:\n    postgres_url: {url}\n"
        (tmp_path / "home" / "dagster.yaml").write_text(config + storage)

        def go_away() -> None:
            switch.switch_off()
            time.sleep(0.3)
            switch.switch_on()

        ended = slow_load.disturb(go_away)
        assert ended.returncode == 0, ended
        slow_load.complete()
