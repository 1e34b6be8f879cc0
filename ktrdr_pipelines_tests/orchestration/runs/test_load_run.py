"""A run has the whole request, and its tags choose its partitions; a Dagster that does not answer is a transient error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.load_request import Choice, LoadRequest, Mode
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError, TransientError
from ktrdr_pipelines.orchestration.assets import op_name
from ktrdr_pipelines.orchestration.load_config import LoadConfig
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.orchestration.runs.submission import submit_run
from ktrdr_pipelines_tests.fakes import utc, window

BRK = Series(stock("BRK B"), TIMEFRAMES["1h"])
REQUEST = LoadRequest("BRK B", BRK.timeframe, Mode.BACKFILL, None, utc("2024-02-05"), Choice("STK", con_id=72063691))


def make_run(start: str, end: str) -> LoadRun:
    return LoadRun(BRK, REQUEST, window(start, end), utc("2023-12-20"), "api")


def test_the_asset_gets_the_request_that_was_made() -> None:
    """Choice of contract and oldest time included; the request of another series is refused."""
    config = LoadConfig(**make_run("2024-01-02", "2024-01-05").run_config()["ops"][op_name(BRK)]["config"])  # type: ignore[index]
    assert config.request(BRK) == REQUEST
    assert config.oldest == "2023-12-20T00:00:00Z"
    with pytest.raises(InputError, match="BRK B"):
        config.request(Series(stock("AAPL"), BRK.timeframe))


def test_a_run_without_a_request_loads_everything_missing_in_its_partitions() -> None:
    """As the UI starts it."""
    assert LoadConfig().request(BRK) == LoadRequest("BRK B", BRK.timeframe, Mode.FULL)


def test_tags_choose_the_partitions() -> None:
    """One partition, or the first and the last of a range."""
    common = {"ktrdr/origin": "api", "ktrdr/mode": "backfill", "ktrdr/series": "BRK_B_1h", "ktrdr/work": "backfill"}
    assert make_run("2024-01-02", "2024-01-05").tags() == {**common, "dagster/partition": "2024-01-01"}
    assert make_run("2024-01-02", "2024-03-05").tags() == {
        **common,
        "dagster/asset_partition_range_start": "2024-01-01",
        "dagster/asset_partition_range_end": "2024-03-01",
    }


def test_a_tail_goes_first_in_the_queue() -> None:
    """And is not counted among the backfills, of which only some run at once."""
    run = make_run("2024-01-02", "2024-01-05")
    tags = replace(run, request=replace(run.request, mode=Mode.TAIL)).tags()
    assert int(tags["dagster/priority"]) > 0
    assert "ktrdr/work" not in tags


def test_a_dagster_that_does_not_answer_is_transient(unused_port: int) -> None:
    """The load was not accepted; asking again may help."""
    with pytest.raises(TransientError, match="BRK B"):
        submit_run(f"http://127.0.0.1:{unused_port}", make_run("2024-01-02", "2024-01-05"))
