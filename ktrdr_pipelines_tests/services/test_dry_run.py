"""The dry run: the plan of the load's machine, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.services.dry_run import plan_series
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1h"])
SPAN = window("2024-01-01", "2024-03-01")


@pytest.fixture
def loaded(make_settings: Callable[..., Settings], unused_port: int) -> Settings:
    """January and February are held; the sidecar notes, as after a load that was killed, that February is unfinished."""
    settings = make_settings(unused_port)
    store, history = open_store(settings.data_dir), FakeHistory.of(AAPL, SPAN)
    load = Load(
        AAPL, SPAN, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC, now=lambda: utc("2024-06-15")
    )
    list(run_load(load))
    assert load.report.status == "success"
    store.note_unfinished(AAPL, utc("2024-02-01"), None, now=datetime.now(UTC))
    return settings


@pytest.mark.parametrize("has_gateway", [True, False])
def test_the_plan_of_a_future_ends_with_its_contract(
    has_gateway: bool, start_gateway: StartGateway, make_settings: Callable[..., Settings], unused_port: int
) -> None:
    """IB reports the expiry of a future that was never loaded. Without a gateway the plan goes on until now."""
    settings = make_settings(start_gateway().port if has_gateway else unused_port)
    settings.universe_path.parent.mkdir(parents=True, exist_ok=True)
    settings.universe_path.write_text("series:\n  - {symbol: ESZ4, sec_type: FUT, exchange: CME, timeframes: [1d]}\n")
    request = LoadRequest("ESZ4", TIMEFRAMES["1d"], Mode.FULL, utc("2024-06-01"), None)
    dry = plan_series(request, settings=settings)
    assert (dry.requests[-1].window.end < utc("2025-06-01")) == (len(dry.requests) == 1) == has_gateway


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("end", "requests"), [("2024-03-01", 0), ("2024-04-01", 1)])
def test_a_dry_run_writes_nothing_into_the_sidecar(loaded: Settings, end: str, requests: int) -> None:
    """A load would note in the sidecar what it leaves unfinished. The dry run is not a load that was broken off."""
    before = read_files(loaded.data_dir)
    request = LoadRequest("AAPL", AAPL.timeframe, Mode.FULL, SPAN.start, utc(end))
    dry = plan_series(request, settings=loaded)
    assert len(dry.requests) == len(dry.gaps) == requests
    assert all(gap.reason == "after the last held bar" for gap in dry.gaps)
    assert read_files(loaded.data_dir) == before
