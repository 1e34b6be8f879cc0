"""How many requests a load needs, counted on the simulated gateway's log: real sockets, real pacing, the clock moved.

The planner's own tests show that these numbers are minimal; here the gateway counts what was sent, and checks the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.history import GatewayAddress, IBHistory
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.simulator.server import GatewayThread
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import TIMEOUTS, MovingClock, run_load, utc, window

AAPL = stock("AAPL")


@pytest.fixture
def run(tmp_path: Path, start_gateway: StartGateway) -> Callable[..., int]:
    """Run one load and count the history requests in the gateway's log; the pacing rules are judged by the gateway."""
    clock = MovingClock()
    gateway: GatewayThread = start_gateway(judge=True, clock=clock.now_s)
    store = Store(tmp_path / "data")

    def load(
        series: Series, span: Window, limits: HistoryLimits = HistoryLimits.CLASSIC, *, recheck_last: bool = False
    ) -> int:
        before = len(gateway.requests)
        address = GatewayAddress("127.0.0.1", gateway.port, state_dir=tmp_path, library="ib_insync", **TIMEOUTS)
        with IBHistory(address, sleep=clock.sleep, clock=clock) as history:
            job = Load(
                series,
                span,
                store=store,
                history=lambda: history,
                limits=limits,
                now=lambda: utc("2026-06-15"),
                recheck_last=recheck_last,
            )
            list(run_load(job))
        assert (job.report.status, job.report.missing_bars) == ("success", 0)
        assert gateway.violations == []
        wanted = expected_bars(series, span).opens
        assert set(wanted.tolist()) <= set(opens_of(store.read_bars(series)).tolist())
        asked = [request for request in gateway.requests[before:] if request.kind != "cancel"]
        assert job.report.ib_requests_made == len(asked)
        return len(asked)

    return load


@pytest.mark.parametrize("limits", HistoryLimits)
@pytest.mark.parametrize(
    ("series", "span", "classic", "current"),
    [
        (Series(AAPL, TIMEFRAMES["1h"]), window("2023-01-01", "2025-01-01"), 24, 2),
        (Series(AAPL, TIMEFRAMES["1d"]), window("2015-01-01", "2025-01-01"), 10, 1),
        (Series(AAPL, TIMEFRAMES["1m"]), window("2024-03-01", "2024-05-01"), 42, 2),
        (Series(forex("EURUSD"), TIMEFRAMES["1h"]), window("2024-01-01", "2024-07-01"), 6, 1),
    ],
    ids=["two years of 1h", "ten years of 1d", "two months of 1m", "half a year of forex 1h"],
)
def test_a_full_load_needs_the_fewest_requests(
    run: Callable[..., int], series: Series, span: Window, classic: int, current: int, limits: HistoryLimits
) -> None:
    assert run(series, span, limits) == (classic if limits is HistoryLimits.CLASSIC else current)
    assert run(series, span, limits) == 0


@pytest.mark.parametrize("missing", ["a week at the end", "nine sessions in the middle"])
def test_bars_that_fit_in_one_request_are_one_request(run: Callable[..., int], missing: str) -> None:
    series = Series(AAPL, TIMEFRAMES["1h"])
    span = window("2024-01-01", "2024-03-01")
    if missing == "a week at the end":
        run(series, Window(span.start, utc("2024-02-22")))
        assert run(series, span, recheck_last=True) == 1
    else:
        run(series, Window(span.start, utc("2024-01-17")))
        run(series, Window(utc("2024-01-30"), span.end))
        assert run(series, span) == 1
