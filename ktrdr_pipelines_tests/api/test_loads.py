"""Promises of loads over the REST API: Dagster runs like all others, none lost, none made twice, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import httpx
import pytest

from ktrdr_pipelines.api.loads import LoadOrder, Loads, QueueFull
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.partitions import Recorded
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.queries import PartitionRecord
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.api.conftest import problem_of, serving, settings_in
from ktrdr_pipelines_tests.conftest import StartGateway

pytestmark = pytest.mark.slow

SYMBOLS = ("AAPL", "MSFT", "SPY", "GOOG")
QUEUE_LIMIT = 4
Served = tuple[str, Settings, GatewayThread]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests here, because its worker takes seconds to start. Each test loads series of its own."""
    with run_in_thread(SyntheticMarket(), judge=False) as gateway:
        settings = settings_in(tmp_path_factory.mktemp("served"), gateway.port)
        with serving(settings, queue_limit=QUEUE_LIMIT) as address:
            yield address, settings, gateway


def until(met: Callable[[], bool]) -> None:
    """Look again and again, without busy waiting; a minute at most."""
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def end_of(address: str, run_id: str) -> dict[str, object]:
    """The state of a load when it is over."""
    seen: list[dict[str, object]] = []

    def is_over() -> bool:
        seen.append(httpx.get(f"{address}/data/load/{run_id}").raise_for_status().json())
        return seen[-1]["status"] not in ("queued", "running")

    until(is_over)
    return seen[-1]


def test_a_load_that_is_waited_for_answers_the_specified_fields(served: Served) -> None:
    """200 with the specification's result; the bars are in the CSV; the run and its partition are in Dagster."""
    address, settings, _ = served
    body = {"symbol": "MSFT", "timeframe": "1d", "mode": "full", "start_date": "2022-01-01", "end_date": "2023-01-01"}
    answer = httpx.post(f"{address}/data/load", json=body, timeout=60).raise_for_status().json()
    assert {name: answer[name] for name in (
        "status", "fetched_bars", "cached_before", "merged_file", "gaps_analyzed", "segments_fetched", "ib_requests_made",
    )} == {
        "status": "success", "fetched_bars": 251, "cached_before": False,
        "merged_file": str(settings.data_dir / "MSFT_1d.csv"), "gaps_analyzed": 1, "segments_fetched": 1,
        "ib_requests_made": 1,
    }  # fmt: skip
    assert len((settings.data_dir / "MSFT_1d.csv").read_text().splitlines()) == 252
    with open_instance(settings) as instance:
        run = instance.get_run_by_id(answer["run_id"])
    assert run is not None
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert run.tags["ktrdr/origin"] == "api"
    with PartitionRecord(settings) as record:
        assert record.read(Series(stock("MSFT"), parse_timeframe("1d")), ["2022"]) == {"2022": Recorded.COMPLETE}
    again = httpx.post(f"{address}/data/load", json=body, timeout=60).raise_for_status().json()
    assert (again["fetched_bars"], again["ib_requests_made"]) == (0, 0)


def test_a_load_that_is_not_waited_for_tells_how_far_it_is(served: Served) -> None:
    """202 with an id and where to look; then the progress, and at last the result."""
    address, _, _ = served
    body = {
        "symbol": "AAPL",
        "timeframe": "1h",
        "mode": "full",
        "start": "2024-01-01",
        "end": "2024-03-01",
        "wait": False,
    }
    answer = httpx.post(f"{address}/data/load", json=body)
    assert answer.status_code == 202
    run_id = answer.json()["run_id"]
    assert answer.headers["location"] == f"/api/v1/data/load/{run_id}"
    assert answer.json()["status"] in ("queued", "running")
    state = end_of(address, run_id)
    assert (state["status"], state["requests_done"], state["requests_planned"]) == ("success", 2, 2)
    assert state["bars"] == state["result"]["fetched_bars"] > 0  # type: ignore[index]
    assert state["result"]["run_ids"] == [run_id]  # type: ignore[index]


def test_what_ib_does_not_know_is_404_and_says_so(served: Served) -> None:
    """The refusal of a load that could not begin; its record says the same."""
    address, _, _ = served
    answer = httpx.post(f"{address}/data/load", json={"symbol": "NOSUCH", "timeframe": "1d"}, timeout=60)
    assert answer.status_code == 404
    assert "NOSUCH" in problem_of(answer)["message"]
    state = end_of(address, answer.headers["location"].rpartition("/")[2])
    assert (state["status"], state["problem"]["kind"]) == ("failed", "permanent")  # type: ignore[index]


def test_an_ambiguous_symbol_is_refused_with_all_candidates_and_a_choice_loads_the_one_meant(served: Served) -> None:
    """Nothing is loaded on a guess. Two choices at once are two loads: the second is never answered with the first one's bars."""
    address, settings, _ = served
    body: dict[str, object] = {
        "symbol": "AMBG", "timeframe": "1d", "mode": "full", "start": "2024-01-01", "end": "2024-03-01",
    }  # fmt: skip
    refused = httpx.post(f"{address}/data/load", json=body, timeout=60)
    assert refused.status_code == 422
    assert all(words in problem_of(refused)["message"] for words in ("900001", "HOLDINGS", "900002", "GROWTH FUND"))
    assert "con_id" in problem_of(refused)["advice"]
    assert not (settings.data_dir / "AMBG_1d.csv").exists()
    first = httpx.post(f"{address}/data/load?wait=false", json={**body, "con_id": 900002}).json()
    other = httpx.post(f"{address}/data/load", json={**body, "sec_type": "STK", "exchange": "NYSE"}, timeout=60)
    state = end_of(address, first["run_id"])
    assert (state["status"], state["con_id"]) == ("success", 900002)
    assert other.status_code == 422
    assert "conId 900002" in problem_of(other)["message"]
    sidecar = json.loads((settings.data_dir / "AMBG_1d.meta.json").read_text())
    assert sidecar["instrument"]["con_id"] == 900002


def test_two_hundred_requests_at_once_load_each_series_once(served: Served) -> None:
    """All are answered, requests for one thing share its load, and IB is asked once for each."""
    address, settings, gateway = served
    orders = [
        {"symbol": symbol, "timeframe": "1d", "mode": "full", "start": f"{year}-01-01", "end": f"{year + 1}-01-01"}
        for year in (2015,)
        for symbol in SYMBOLS
    ]
    before = len(gateway.requests)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=90, limits=limits) as client:
            return await asyncio.gather(
                *(client.post(f"{address}/data/load", json=orders[n % len(orders)]) for n in range(200))
            )

    answers = asyncio.run(ask_all())
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    assert {answer.json()["status"] for answer in answers} == {"success"}
    run_ids = {answer.json()["run_id"] for answer in answers}
    assert len(run_ids) == len(orders)
    assert len(gateway.requests) - before == len(orders)
    with open_instance(settings) as instance:
        runs = [instance.get_run_by_id(run_id) for run_id in run_ids]
    assert {run.status for run in runs if run} == {dg.DagsterRunStatus.SUCCESS}
    assert None not in runs


def test_two_hundred_different_loads_at_once_are_queued_or_refused_and_none_is_lost(served: Served) -> None:
    """As many as the queue takes are accepted, the others get 503, busy and Retry-After; every accepted one ends."""
    address, _, _ = served

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(
                client.post(
                    f"{address}/data/load?wait=false",
                    json={"symbol": SYMBOLS[n % 4], "timeframe": "1d", "mode": "full",
                          "start": f"{1990 + n // 10}-01-01", "end": f"{1990 + n // 10}-{2 + n % 10:02}-01"},
                )
                for n in range(200)
            ))  # fmt: skip

    answers = asyncio.run(ask_all())
    accepted = [answer for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(accepted) + len(refused) == 200
    assert QUEUE_LIMIT <= len({answer.json()["run_id"] for answer in accepted}) < 200
    for answer in refused:
        assert problem_of(answer)["kind"] == "busy"
        assert int(answer.headers["retry-after"]) > 0
    assert httpx.get(f"{address}/data").status_code == 200  # it goes on answering meanwhile
    assert {end_of(address, answer.json()["run_id"])["status"] for answer in accepted} == {"success"}


def order(end: str) -> LoadOrder:
    return LoadOrder("SPY", "1d", "full", "2019-01-01T00:00:00Z", end)


@pytest.mark.long
def test_what_was_accepted_is_loaded_by_the_next_server(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A server that ends in the middle of a load leaves it, and those behind it, to the next one. A load under which
    the worker dies is tried once more; then it fails alone, and says so."""
    gateway = start_gateway([FaultRule(kind="silent", symbol="SPY")])
    settings = settings_in(tmp_path, gateway.port)
    first = Loads(settings)
    first.start()
    going, _ = first.submit(order("2020-01-01T00:00:00Z"))
    behind, _ = first.submit(LoadOrder("GOOG", "1d", "full", "2021-01-01T00:00:00Z", "2021-03-01T00:00:00Z"))
    until(lambda: bool(gateway.requests))
    first.stop()
    asked = len(gateway.requests)
    second = Loads(settings)
    second.start()
    try:
        found = second.find(going.run_id)
        assert found is not None
        # The same request may not be sent again so soon; on a slow machine it is late enough, and silent again.
        until(lambda: found.waiting_for is not None or len(gateway.requests) > asked)
        assert found.status == "running"
        assert second._worker is not None
        asked = len(gateway.requests)
        os.kill(second._worker.pid, signal.SIGKILL)
        until(lambda: found.attempts == 3 and (found.waiting_for is not None or len(gateway.requests) > asked))
        assert found.status == "running"
        os.kill(second._worker.pid, signal.SIGKILL)
        second.ended(found).result(60)
        assert found.status == "failed"
        assert found.problem is not None
        assert "unexpectedly" in found.problem["message"]
        waiting = second.find(behind.run_id)
        assert waiting is not None
        second.ended(waiting).result(60)
        assert waiting.status == "success"
    finally:
        second.stop()
    third = Loads(settings)
    third.start()
    try:
        kept = third.find(behind.run_id)
        assert kept is not None
        assert kept.result == waiting.result
    finally:
        third.stop()


def test_one_server_at_a_time_uses_a_dagster_home(tmp_path: Path) -> None:
    """Two would take up each other's loads."""
    settings = settings_in(tmp_path)
    first, second = Loads(settings), Loads(settings)
    first.start()
    try:
        with pytest.raises(Exception, match="another REST API"):
            second.start()
    finally:
        first.stop()
    second.start()
    second.stop()


def test_an_ending_server_accepts_nothing(tmp_path: Path) -> None:
    """What is not accepted is said so."""
    loads = Loads(settings_in(tmp_path))
    loads.start()
    loads.stop()
    with pytest.raises(QueueFull, match="ending"):
        loads.submit(order("2020-01-01T00:00:00Z"))
