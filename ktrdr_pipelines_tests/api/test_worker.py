"""Promises of the process that executes loads: each load gets its own end, exactly one, whoever is interrupted or dies when."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrdr_pipelines.api.loads import LoadOrder, LoadRecord, Loads
from ktrdr_pipelines.api.worker import Teller
from ktrdr_pipelines_tests.api.conftest import settings_in

ENDS = ("done", "refused")


@pytest.fixture
def loads(tmp_path: Path) -> Iterator[Loads]:
    """A queue whose worker is an odd one."""
    queue = Loads(settings_in(tmp_path), worker_command=(sys.executable, "-m", "ktrdr_pipelines_tests.api.odd_worker"))
    queue.start()
    yield queue
    queue.stop()


def execute(loads: Loads, *symbols: str) -> list[LoadRecord]:
    """Loads of ``symbols``, when they are over."""
    records = [loads.submit(LoadOrder(symbol, "1d", "full"))[0] for symbol in symbols]
    for record in records:
        loads.ended(record).result(20)
    return records


def test_no_load_is_told_the_end_of_another(loads: Loads, caplog: pytest.LogCaptureFixture) -> None:
    """What a worker says once more of a load that is over is told in the log, and is not taken for the next load's."""
    with caplog.at_level(logging.ERROR):
        records = execute(loads, "AAPL", "MSFT", "SPY")
    assert [(record.status, record.result and record.result["of"], record.run_ids) for record in records] == [
        ("success", record.order.symbol, [record.run_id]) for record in records
    ]
    assert records[0].run_id in caplog.text


def test_a_worker_that_dies_or_talks_nonsense_fails_its_load_and_no_other(loads: Loads) -> None:
    """Nobody waits for ever: the load says that it ended unexpectedly, those behind it are executed."""
    nonsense, after, dies, last = execute(loads, "NONSENSE", "AAPL", "DIES", "MSFT")
    assert [record.status for record in (nonsense, after, dies, last)] == ["failed", "success", "failed", "success"]
    for record in (nonsense, dies):
        assert record.problem is not None
        assert "ended unexpectedly" in record.problem["message"]


def test_a_load_whose_worker_was_killed_is_tried_once_more(loads: Loads) -> None:
    """As another run; whoever waits for it waits on."""
    stumbles, after = execute(loads, "STUMBLES", "AAPL")
    assert [(record.status, record.attempts) for record in (stumbles, after)] == [("success", 2), ("success", 1)]
    assert stumbles.run_ids != [stumbles.run_id]
    (dies,) = execute(loads, "DIES")
    assert (dies.status, dies.attempts) == ("failed", 2)


def test_a_worker_whose_server_was_killed_ends_in_order() -> None:
    """What it would tell interrupts the load once, as the end of its input does, and is no failure of it."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as out:
        teller = Teller(out)
        teller.tell("planned", requests=1)
        os.close(reading)
        with pytest.raises(KeyboardInterrupt):
            teller.tell("fetched", done=1)
        teller.tell("refused")


def test_an_interruption_at_any_place_costs_at_most_the_load_that_is_going() -> None:
    """Every command gets exactly one end under its own run id, wherever the interruption hits."""
    script = [sys.executable, "-m", "ktrdr_pipelines_tests.api.interrupted_worker"]
    told = json.loads(subprocess.run(script, check=True, capture_output=True, timeout=60).stdout)
    interrupted: Counter[str] = Counter()
    for events in told:
        assert [event["run_id"] for event in events if event["event"] in ENDS] == ["1", "2", "3"], events
        hit = [event["run_id"] for event in events if "interrupted" in event.get("message", "")]
        assert len(hit) <= 1, events
        interrupted.update(hit)
    assert set(interrupted) == {"1", "2", "3"}
    assert interrupted.total() < len(told)
