"""Promises of the route of a load, for runs of other entry points: what Dagster recorded of them."""

from __future__ import annotations

import uuid
from pathlib import Path

import dagster as dg
import pytest

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.partitions import partition_from_key
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.liveness import executing
from ktrdr_pipelines.services.load import load_series
from ktrdr_pipelines_tests.api.conftest import OpenApi, problem_of, settings_in
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.holding import execute

DAILY = TIMEFRAMES["1d"]
AAPL, NOSUCH = Series(stock("AAPL"), DAILY), Series(stock("NOSUCH"), DAILY)
ROUTE = "/api/v1/data/load/"


@pytest.mark.slow
def test_runs_of_every_entry_point_are_reported(open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path) -> None:
    """A command's load; a sensor's run of two series, of which one failed; Dagster's own, of a process that is gone."""
    settings = settings_in(tmp_path, start_gateway().port)
    client = open_api(settings)
    done = load_series(LoadRequest.parse("AAPL", "1d", "full", start="2022-01-01", end="2024-01-01"), settings=settings)
    found = client.get(ROUTE + done.run_ids[0]).json()
    assert found["started_at"] and found["ended_at"] and found["accepted_at"]
    assert {k: v for k, v in found.items() if not k.endswith("_at")} == {
        "run_id": done.run_ids[0], "status": "success", "origin": "cli", "mode": "full", "failures": [],
        "series": [{"symbol": "AAPL", "timeframe": "1d", "partitions_completed": ["2022", "2023"]}],
        "partitions": {"first": "2022", "last": "2023"},
    }  # fmt: skip

    year = partition_from_key(DAILY, "2021")
    request = request_run([AAPL, NOSUCH], year, year, Mode.FULL, origin="sensor", run_key="test")
    with open_instance(settings) as instance:
        ended = execute(settings, [AAPL, NOSUCH], instance, request)
        job = build_definitions(settings, [AAPL]).resolve_implicit_global_asset_job_def()
        gone = instance.create_run_for_job(job, asset_selection=frozenset([asset_key(AAPL)])).run_id
        with executing(instance, gone):
            pass
        instance.report_dagster_event(
            dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name=job.name), gone
        )
        foreign = instance.create_run_for_job(dg.GraphDefinition(name="of_somebody_else").to_job()).run_id
    found = client.get(ROUTE + ended.run_id).json()
    assert (found["status"], found["origin"], found["partitions"]) == (
        "partial", "sensor", {"first": "2021", "last": "2021"},
    )  # fmt: skip
    assert [(each["symbol"], each["partitions_completed"]) for each in found["series"]] == [
        ("AAPL", ["2021"]), ("NOSUCH", []),
    ]  # fmt: skip
    (failure,) = found["failures"]
    assert failure["kind"] == "permanent"
    assert "NOSUCH" in failure["error"]

    found = client.get(ROUTE + gone).json()
    assert (found["status"], found["origin"]) == ("failed", "dagster")
    assert "process that executed this run is gone" in found["failures"][0]["error"]
    for unknown in (foreign, str(uuid.uuid4()), "\x00"):
        assert problem_of(client.get(ROUTE + unknown.replace("\x00", "%00")))["kind"] == "not_found"
