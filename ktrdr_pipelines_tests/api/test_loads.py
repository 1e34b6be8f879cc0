"""Promises of loads over the REST API: Dagster runs like all others, none lost, none made twice, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest

from ktrdr_pipelines.api.loads import QUEUE_LIMIT, Loads
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.partitions import Recorded
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.orchestration.runs.dagster_services import DagsterServices
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.queries import PartitionRecord
from ktrdr_pipelines.settings import Settings, as_environment
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.api.conftest import OpenApi, make_loads, problem_of, serving, settings_in
from ktrdr_pipelines_tests.conftest import StartGateway

pytestmark = pytest.mark.slow

LOAD = "/api/v1/data/load"
Served = tuple[str, Settings, GatewayThread]


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with its Dagster, which costs half a minute of CPU to start: one test uses it, for all promises."""
    with run_in_thread(SyntheticMarket(), judge=False) as gateway:
        settings = settings_in(tmp_path_factory.mktemp("served"), gateway.port, tail_sensor=False)
        with serving(settings, Loads(settings, DagsterServices(settings))) as address:
            yield address, settings, gateway


def until(met: Callable[[], bool], within_s: float = 120) -> None:
    """Look again and again, without busy waiting."""
    deadline = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.2)


def end_of(address: str, run_id: str) -> dict[str, Any]:
    """The state of a load when it is over."""
    seen: list[dict[str, Any]] = []

    def is_over() -> bool:
        seen.append(httpx.get(f"{address}/data/load/{run_id}", timeout=30).raise_for_status().json())
        return seen[-1]["status"] not in ("queued", "running")

    until(is_over)
    return seen[-1]


# -- with all processes --------------------------------------------------------------------------------------------------


def check_two_hundred_requests_at_once(served: Served) -> None:
    """All get the specification's result, requests for one thing share its load, and IB is asked once for each. The bars are in
    the CSV, the run and its partition in Dagster, under the id that was answered."""
    address, settings, gateway = served
    bodies = [
        {"symbol": symbol, "timeframe": "1d", "mode": "full", "start_date": "2022-01-01", "end_date": "2023-01-01"}
        for symbol in ("MSFT", "SPY")
    ]
    before = len(gateway.requests)

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=170, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(client.post(f"{address}/data/load", json=bodies[n % 2]) for n in range(200)))

    answers = asyncio.run(ask_all())
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    assert {name: answers[0].json()[name] for name in (
        "status", "fetched_bars", "cached_before", "merged_file", "gaps_analyzed", "segments_fetched", "ib_requests_made",
    )} == {
        "status": "success", "fetched_bars": 251, "cached_before": False,
        "merged_file": str(settings.data_dir / "MSFT_1d.csv"), "gaps_analyzed": 1, "segments_fetched": 1,
        "ib_requests_made": 1,
    }  # fmt: skip
    assert len((settings.data_dir / "MSFT_1d.csv").read_text().splitlines()) == 252
    assert len(gateway.requests) - before == 2
    run_ids = {answer.json()["run_id"] for answer in answers}
    assert len(run_ids) == 2
    with open_instance(settings) as instance:
        runs = [instance.get_run_by_id(run_id) for run_id in run_ids]
    assert [(run.status, run.tags["ktrdr/origin"]) for run in runs if run] == [(dg.DagsterRunStatus.SUCCESS, "api")] * 2
    with PartitionRecord(settings) as record:
        assert record.read(Series(stock("MSFT"), parse_timeframe("1d")), ["2022"]) == {"2022": Recorded.COMPLETE}


def check_a_choice_of_contract(served: Served) -> None:
    """202 with an id and where to look, then the result. Dagster did not know the series before. Another choice for the same
    symbol is refused: it is never answered with the first one's bars."""
    address, settings, _ = served
    body: dict[str, object] = {
        "symbol": "AMBG", "timeframe": "1d", "mode": "full", "start": "2024-01-01", "end": "2024-03-01",
    }  # fmt: skip
    answer = httpx.post(f"{address}/data/load", json={**body, "con_id": 900002, "wait": False}, timeout=170)
    assert answer.status_code == 202, answer.text
    run_id = answer.json()["run_id"]
    assert answer.headers["location"] == f"{LOAD}/{run_id}"
    assert answer.json()["status"] in ("queued", "running")
    other = httpx.post(f"{address}/data/load", json={**body, "sec_type": "STK", "exchange": "NYSE"}, timeout=60)
    assert other.status_code == 422
    assert "conId 900002" in problem_of(other)["message"]
    state = end_of(address, run_id)
    assert (state["status"], state["con_id"], state["problem"]) == ("success", 900002, None)
    assert (state["requests_done"], state["requests_planned"]) == (1, 1)
    assert state["bars"] == state["result"]["fetched_bars"] > 0
    assert state["result"]["run_ids"] == [run_id]
    sidecar = json.loads((settings.data_dir / "AMBG_1d.meta.json").read_text())
    assert sidecar["instrument"]["con_id"] == 900002


@pytest.mark.long
def test_loads_with_all_processes(served: Served, subtests: pytest.Subtests) -> None:
    """Requests at once share their loads; a choice of contract loads a new series whose progress can be followed."""
    with subtests.test("two hundred requests at once"):
        check_two_hundred_requests_at_once(served)
    with subtests.test("a choice of contract"):
        check_a_choice_of_contract(served)


@contextmanager
def served_by_command(settings: Settings, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`ktrdr serve` in a process of its own, when it answers."""
    command = [sys.executable, "-m", "ktrdr_pipelines.cli", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, **as_environment(settings)}, cwd=settings.data_dir)

    def is_answering() -> bool:
        assert server.poll() is None
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/docs", timeout=5).status_code == 200
        return False

    try:
        until(is_answering)
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def kill_workers(settings: Settings) -> int:
    """Kill each process that executes a run of this Dagster home; how many there were."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            of_home = f"DAGSTER_HOME={settings.dagster_home}".encode() in (process / "environ").read_bytes().split(
                b"\0"
            )
            if of_home and b"spawn_main" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
    return killed


@pytest.mark.long
def test_what_was_accepted_survives_the_kill_of_server_and_worker(
    start_gateway: StartGateway, tmp_path: Path, unused_port: int
) -> None:
    """The next server takes up the load that was running and the one behind it. A load whose worker is killed is tried once
    more; then it fails alone, with its reason."""
    gateway = start_gateway([FaultRule(kind="silent", symbol="SPY")])
    settings = settings_in(tmp_path, gateway.port, tail_sensor=False, ib_request_timeout_s=600.0)
    settings.data_dir.mkdir()
    address = f"http://127.0.0.1:{unused_port}/api/v1"

    def ask(symbol: str) -> str:
        body = {
            "symbol": symbol,
            "timeframe": "1d",
            "mode": "full",
            "start": "2019-01-01",
            "end": "2020-01-01",
            "wait": False,
        }
        return str(httpx.post(f"{address}/data/load", json=body, timeout=170).raise_for_status().json()["run_id"])

    def state_of(run_id: str) -> dict[str, Any]:
        return dict(httpx.get(f"{address}/data/load/{run_id}", timeout=30).raise_for_status().json())

    def count_asked() -> int:
        return sum(request.symbol == "SPY" for request in gateway.requests)

    with served_by_command(settings, unused_port) as server:
        running = ask("SPY")
        until(lambda: count_asked() == 1)
        behind = ask("GOOG")
        assert state_of(running)["status"] == "running"
        server.kill()
        assert kill_workers(settings)
    with served_by_command(settings, unused_port):
        until(lambda: count_asked() == 2, within_s=170)
        state = state_of(running)
        assert (state["run_id"], state["status"], state["result"]) == (running, "running", None)
        assert kill_workers(settings)
        state = end_of(address, running)
        assert (state["status"], state["problem"]["kind"]) == ("failed", "transient")
        assert "unexpectedly" in state["problem"]["message"]
        assert end_of(address, behind)["status"] == "success"


# -- without Dagster's processes -----------------------------------------------------------------------------------------


def test_what_cannot_begin_is_refused_and_no_run_is_made(
    open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """What IB does not know is 404; an ambiguous symbol is refused with all candidates, and nothing is loaded on a guess."""
    settings = settings_in(tmp_path, start_gateway().port)
    client = open_api(settings)
    answer = client.post(LOAD, json={"symbol": "NOSUCH", "timeframe": "1d"})
    assert answer.status_code == 404
    assert "NOSUCH" in problem_of(answer)["message"]
    refused = client.post(LOAD, json={"symbol": "AMBG", "timeframe": "1d", "start": "2024-01-01"})
    assert refused.status_code == 422
    assert all(words in problem_of(refused)["message"] for words in ("900001", "HOLDINGS", "900002", "GROWTH FUND"))
    assert "con_id" in problem_of(refused)["advice"]
    assert not (settings.data_dir / "universe.yaml").exists()
    with open_instance(settings) as instance:
        assert not instance.get_runs(limit=1)


def test_as_many_loads_wait_as_the_queue_takes(tmp_path: Path) -> None:
    """The others get 503, busy and Retry-After, and are no runs; the state of each has how many are before it. An equal load is
    accepted all along, as the one that waits."""
    assert QUEUE_LIMIT == 256
    settings = settings_in(tmp_path)
    bodies = [
        {"symbol": symbol, "timeframe": "1d", "mode": "full", "start": f"{year}-01-01", "wait": False}
        for year in range(2010, 2020)
        for symbol in ("AAPL", "MSFT")
    ]
    with serving(settings, make_loads(settings, queue_limit=5)) as address:

        async def ask_all() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=None)) as client:
                return await asyncio.gather(*(client.post(f"{address}/data/load", json=body) for body in bodies))

        answers = asyncio.run(ask_all())
        accepted = [answer.json() for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert (len(accepted), len(refused)) == (5, 15)
        for answer in refused:
            assert problem_of(answer)["kind"] == "busy"
            assert int(answer.headers["retry-after"]) > 0
        states = [httpx.get(f"{address}/data/load/{state['run_id']}").json() for state in accepted]
        assert sorted(state["loads_before"] for state in states) == [0, 1, 2, 3, 4]
        again = httpx.post(
            f"{address}/data/load", json=bodies[answers.index(next(a for a in answers if a.status_code == 202))]
        )
        assert again.json()["run_id"] in {state["run_id"] for state in accepted}
    with open_instance(settings) as instance:
        assert instance.get_runs_count() == 5


def test_the_records_of_a_load_have_its_progress_its_retry_and_its_end(open_api: OpenApi, tmp_path: Path) -> None:
    """A run's tag has the progress; a killed run is queued until its retry is there, and then the load is both runs; one that was
    canceled, lost, or ended by a bug is failed, with a reason."""
    settings = settings_in(tmp_path)
    client = open_api(settings)
    year = iter(range(2010, 2020))

    def accept() -> str:
        body = {"symbol": "AAPL", "timeframe": "1d", "mode": "full", "start": f"{next(year)}-01-01", "wait": False}
        answer = client.post(LOAD, json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["run_id"])

    def state_of(run_id: str) -> dict[str, Any]:
        return dict(client.get(f"{LOAD}/{run_id}").json())

    with open_instance(settings) as instance:

        def run_of(run_id: str) -> dg.DagsterRun:
            run = instance.get_run_by_id(run_id)
            assert run is not None
            return run

        run_id = accept()
        start = dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name="__ASSET_JOB")
        instance.report_dagster_event(start, run_id)
        waits = {"requests_planned": 7, "requests_done": 3, "bars": 600, "waiting_for": "pacing", "waiting_until": None}
        instance.add_run_tags(run_id, {"ktrdr/progress": json.dumps(waits)})
        state = state_of(run_id)
        assert state["status"] == "running"
        assert {name: state[name] for name in waits} == waits
        assert (state["windows_failed"], state["loads_before"], state["result"]) == (0, None, None)

        instance.report_run_failed(run_of(run_id))
        instance.add_run_tags(run_id, {"dagster/will_retry": "true"})
        assert state_of(run_id)["status"] == "queued"
        retry = accept()
        instance.add_run_tags(run_id, {"dagster/auto_retry_run_id": retry})
        instance.add_run_tags(retry, {"dagster/max_retries": "0"})  # as the retry of a run has it in effect
        assert (state_of(run_id)["status"], state_of(run_id)["run_id"]) == ("queued", run_id)
        instance.report_run_failed(run_of(retry))
        assert (state_of(run_id)["status"], state_of(run_id)["problem"]["kind"]) == ("failed", "transient")

        canceled = accept()
        instance.report_run_canceled(run_of(canceled))
        assert "canceled" in state_of(canceled)["problem"]["message"]


def test_a_server_that_ends_accepts_nothing(tmp_path: Path) -> None:
    """The refusal is the one of a full queue."""
    settings = settings_in(tmp_path)
    loads = make_loads(settings)
    with serving(settings, loads) as address:
        loads.stop()
        answer = httpx.post(f"{address}/data/load", json={"symbol": "AAPL", "timeframe": "1d", "start": "2024-01-01"})
    assert (answer.status_code, problem_of(answer)["kind"]) == (503, "busy")


def test_one_server_at_a_time_uses_a_dagster_home(tmp_path: Path) -> None:
    """Two would start two daemons, which Dagster does not support."""
    settings = settings_in(tmp_path)
    first, second = make_loads(settings), make_loads(settings)
    first.start()
    try:
        with pytest.raises(Exception, match="another REST API"):
            second.start()
    finally:
        first.stop()
    second.start()
    second.stop()


def test_a_load_with_nothing_to_do_is_answered_at_once_and_is_no_run(
    open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """A backfill of what is held already."""
    settings = settings_in(tmp_path, start_gateway().port)
    settings.data_dir.mkdir()
    (settings.data_dir / "AAPL_1d.csv").write_text(
        "timestamp,open,high,low,close,volume\n2024-01-02T00:00:00Z,10,11,9,10,5\n2024-01-03T00:00:00Z,10,11,9,10,5\n"
    )
    body = {"symbol": "AAPL", "timeframe": "1d", "mode": "backfill", "start": "2024-01-02"}
    answer = open_api(settings).post(LOAD, json=body)
    assert answer.status_code == 200
    assert (answer.json()["run_id"], answer.json()["run_ids"], answer.json()["fetched_bars"]) == (None, [], 0)
