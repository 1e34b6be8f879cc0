"""What a killed load leaves behind: a whole CSV, true claims, one request to repeat at most, and nothing going on for ever.

Real processes and SIGKILL, a real Dagster instance, a simulated gateway on a real socket whose log tells what was asked.
``KILLS=200`` in the environment (`make kills`) deals more blows.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.orchestration import dead_runs
from ktrdr_pipelines.orchestration.active import find_active_runs
from ktrdr_pipelines.orchestration.assets import GATEWAY_POOL
from ktrdr_pipelines.orchestration.dead_runs import OWNER_TAG, owner_tag, reap_dead_runs
from ktrdr_pipelines.orchestration.instance import open_instance
from ktrdr_pipelines.partitions import partition_at
from ktrdr_pipelines.series import TIMEFRAMES, Series, Window, stock
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.gateway import RequestRecord
from ktrdr_pipelines.store.series_store import Store
from ktrdr_pipelines_tests.conftest import Ktrdr, StartGateway
from ktrdr_pipelines_tests.fakes import utc
from ktrdr_pipelines_tests.ledger_tools import poll
from ktrdr_pipelines_tests.load_forks import ROOT, LoadForks

MakeSettings = Callable[..., Settings]

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "24"))
KILLED_WITHIN_S = 0.8
"""Every fourth blow falls so soon after the process began, the others so soon after its first request."""
AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
FIRST = "2008-01-01"


# ---------------------------------------------------------------------------------------------------- killed loads


class Witness:
    """Looks at the files of a series after each blow, without the store: what a trader would read."""

    def __init__(self, data_dir: Path) -> None:
        self.csv, self.sidecar = data_dir / "AAPL_1h.csv", data_dir / "AAPL_1h.meta.json"
        self.expected = expected_bars(AAPL_1H, Window(utc(FIRST), utc("2024-01-01"))).opens
        self.rows: dict[str, str] = {}

    def look(self) -> list[str]:
        """What is wrong now."""
        if not self.csv.exists():
            return ["the CSV is gone"] if self.rows else []
        text = self.csv.read_text()
        header, *lines = text.splitlines()
        rows = {line.partition(",")[0]: line for line in lines}
        stamps = list(rows)
        wrong = []
        if header != "timestamp,open,high,low,close,volume" or not text.endswith("\n"):
            wrong.append("the CSV has no header, or no newline at its end")
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
            wrong.append("the sidecar takes bars for proven not to exist")
        return wrong


def count_again(requests: list[RequestRecord], before: list[RequestRecord]) -> int:
    """How many of ``requests`` ask for what was answered before. Loads ask from old to new."""
    assert {r.kind for r in (*requests, *before)} <= {"history"}
    furthest = max((r.last for r in before), default=0)
    return sum(r.last <= furthest for r in requests)


def add_months(month: str, months: int) -> str:
    return f"{np.datetime64(month[:7], 'M') + np.timedelta64(months, 'M')}-01"


def unfinished_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs() if not run.is_finished]


def held_slots(instance: dg.DagsterInstance) -> int:
    return len(instance.event_log_storage.get_concurrency_info(GATEWAY_POOL).claimed_slots)


@pytest.mark.timeout(30 + 10 * KILLS)
def test_loads_killed_at_random_instants_lose_nothing(
    start_gateway: StartGateway, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """After each SIGKILL the CSV is whole and has every row of before, each claim of the sidecar holds, and the next load asks
    at most the interrupted request again. In the end the file is the truth, and Dagster has no run and no slot of the dead."""
    gateway, chance = start_gateway(), random.Random(20240105)
    witness = Witness(tmp_path / "data")
    wrong: list[str] = []
    repeated = 0
    with LoadForks(gateway.port, tmp_path) as forks:
        assert forks.wait(forks.start("AAPL", "1h", FIRST, "2008-02-01")) == 0
        forks.warm_up()
        witness.look()
        for blow in range(KILLS):
            seen, last = len(gateway.requests), max(witness.rows)
            # Two months that are held and more to come than one load can do in time.
            pid = forks.start("AAPL", "1h", max(FIRST, add_months(last, -2)), add_months(last, 24))
            if blow % 4:
                poll(lambda seen=seen: len(gateway.requests) > seen)
            ended = select.select([], [], [], chance.uniform(0.0, KILLED_WITHIN_S))  # until the blow
            assert ended == ([], [], [])
            os.kill(pid, signal.SIGKILL)
            assert forks.wait(pid) == -signal.SIGKILL, "the load was over before the blow: it needs more to do"
            again = count_again(gateway.requests[seen:], gateway.requests[:seen])
            repeated += again
            wrong += [f"blow {blow}: {what}" for what in witness.look()]
            if again > 1:
                listed = "; ".join(f"{r.end} {r.duration}" for r in gateway.requests[seen - 1 :])
                wrong.append(f"blow {blow}: {again} requests were asked again: after {listed}")
        seen, end = len(gateway.requests), add_months(max(witness.rows), 3)
        assert forks.wait(forks.start("AAPL", "1h", FIRST, end)) == 0, (tmp_path / "loads.log").read_text()[-2000:]
        wrong += witness.look()
        repeated += count_again(gateway.requests[seen:], gateway.requests[:seen])
        made = len(gateway.requests)
        assert forks.wait(forks.start("AAPL", "1h", FIRST, end)) == 0
        assert len(gateway.requests) == made, "something was left to ask for"
    print(f"{KILLS} kills, {made} requests, {repeated} of them asked again, {len(witness.rows)} rows, {len(wrong)} wrong")
    assert not wrong, '\n'.join(wrong)
    assert len(witness.rows) > KILLS * 140 / 2, "the loads hardly came forward: the test proved nothing"
    assert repeated <= KILLS
    assert make_truth(start_gateway, tmp_path / "truth", end) == witness.csv.read_bytes()
    with open_instance(make_settings(gateway.port)) as instance:
        assert unfinished_runs(instance) == []
        assert held_slots(instance) == 0


def make_truth(start_gateway: StartGateway, folder: Path, end: str) -> bytes:
    """The CSV of one load that nobody disturbs."""
    folder.mkdir()
    with LoadForks(start_gateway().port, folder) as forks:
        assert forks.wait(forks.start("AAPL", "1h", FIRST, end)) == 0
    return (folder / "data" / "AAPL_1h.csv").read_bytes()
