"""The expiry of a future: after it no bar is expected, missing or requested."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.automation.due import HeldEnds, Tails
from ktrdr_pipelines.services.gaps import inspect_series
from ktrdr_pipelines.settings import load_settings
from ktrdr_pipelines.store.sidecar import Pinned
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, utc, window
from ktrdr_pipelines_tests.loading.test_load import load

ESZ4 = Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES", hours=Hours.EXTENDED)
"""The code of the contract does not fix its decade."""


def history_until_expiry(series: Series, since: str, expires: str = "20241220") -> FakeHistory:
    """A gateway that reports the expiry in the contract details only."""
    until = (
        "2025-01-01" if series.timeframe.name == "1mo" else "2024-12-20T14:30"
    )  # the month is labelled with its last day
    history = FakeHistory.of(series, window(since, until))
    pin = history.pin
    history.pin = lambda instrument, call=None: replace(pin(instrument, call), last_trade_date=expires)  # type: ignore[method-assign]
    return history


@pytest.mark.parametrize(
    ("name", "since"), [("1h", "2024-11-25"), ("1d", "2024-06-03"), ("1w", "2024-06-03"), ("1mo", "2024-06-03")]
)
def test_nothing_is_asked_after_the_date_that_ib_names(tmp_path: Path, name: str, since: str) -> None:
    """Before its first load IB is asked for the expiry; later it is in the sidecar, for loads, tail sensor and `ktrdr gaps`."""
    series = Series(ESZ4, TIMEFRAMES[name])
    store, span = Store(tmp_path / "data"), window(since, "2026-11-01")
    history = history_until_expiry(series, since)
    job, _ = load(store, history, series, span, now=utc("2026-11-01"))
    assert (job.report.status, job.report.missing_bars) == ("success", 0)
    assert opens_of(store.read_bars(series)).tolist() == history.truth.tolist()
    assert max(request.window.end for request in history.requests) < utc("2025-01-03")

    later, asked = utc("2026-11-16"), len(history.requests)
    again, _ = load(store, history, series, window(since, "2026-11-16"), now=later, recheck_last=True)
    assert (len(history.requests), again.report.missing_bars) == (asked, 0)
    settings = load_settings(data_dir=store.data_dir)
    assert Tails(settings, HeldEnds(store.data_dir), later).find_due(series, int(history.truth[-1])) is None
    assert missing_after(store, series, utc("2024-12-20"), later) == 0


def missing_after(store: Store, series: Series, at: datetime, now: datetime) -> int:
    with peek(store, series, now=now) as (view, _):
        holding = inspect_series(series, view, file=Path("x.csv"), earliest=utc("2024-01-01"), now=now, recorded={})
    return sum(gap.bars for gap in holding.missing if gap.window.end > at)


def test_without_an_expiry_date_bars_are_requested_up_to_now(tmp_path: Path) -> None:
    """Then there is no evidence about the newest bars: they stay missing."""
    series = Series(ESZ4, TIMEFRAMES["1d"])
    history = history_until_expiry(series, "2024-06-03", expires="")
    job, _ = load(Store(tmp_path / "data"), history, series, window("2024-06-03", "2025-06-01"), now=utc("2025-06-01"))
    assert (job.report.proven_empty, job.report.missing_bars > 100) == (0, True)
    assert any("not there yet" in notice for notice in job.report.notices)
    assert max(request.window.end for request in history.requests) > utc("2025-05-01")


@pytest.mark.parametrize(
    ("last_trade_date", "start"),
    [
        ("20241220", "2025-01-01"),
        ("20241227", "2025-01-04"),
        ("20241231", "2025-01-08"),
        ("", None),
        ("2024", None),
        ("soon", None),
    ],
)
def test_a_month_is_waited_for_and_a_week_at_least(last_trade_date: str, start: str | None) -> None:
    after = Pinned.of(replace(ESZ4, last_trade_date=last_trade_date)).after_expiry
    assert (after.start if after else None) == (utc(start) if start else None)
