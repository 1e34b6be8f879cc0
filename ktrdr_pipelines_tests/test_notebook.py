"""Promises of `import ktrdr_pipelines as ktrdr`: light to import, usable inside an event loop, honest about missing bars."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, date, datetime
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ktrdr_pipelines as ktrdr
from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.errors import DataError, GatewayUnreachable, InputError, TransientError
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import FakeHistory, run_load, utc, window

MakeSettings = Callable[..., Settings]


def test_importing_the_package_imports_nothing_heavy() -> None:
    """The functions are there by name and documented; what they need comes with their first use."""
    code = "import sys, ktrdr_pipelines as k\nprint(dir(k), sorted({'dagster', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'load', 'read_bars'" in done.stdout
    assert done.stdout.rstrip().endswith(" []")
    for word in ("timestamp", "datetime64[us, UTC]", "volume", "currency", "Raises"):
        assert word in str(ktrdr.read_bars.__doc__)
    with pytest.raises(AttributeError):
        _ = ktrdr.nosuch


def test_the_name_load_stays_the_functions() -> None:
    """Whatever was imported before: there is a module of that name."""
    import_module("ktrdr_pipelines.loading.driver")
    assert callable(ktrdr.load)


@pytest.mark.slow
def test_a_notebook_loads_and_reads_inside_its_running_event_loop(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """As Jupyter runs every cell."""
    settings = make_settings(start_gateway().port)

    async def cell() -> pd.DataFrame:
        report = ktrdr.load("AAPL", "1h", "full", start=date(2024, 1, 2), end="2024-01-05", settings=settings)
        assert (report.status, report.fetched_bars) == ("success", 21)
        again = ktrdr.load(
            "AAPL", "1h", "full", start=pd.Timestamp("2024-01-02", tz="UTC"), end="2024-01-05", settings=settings
        )
        assert again.ib_requests_made == 0
        return ktrdr.read_bars("AAPL", "1h", datetime(2024, 1, 3, tzinfo=UTC), "2024-01-04", settings=settings)

    bars = asyncio.run(cell())
    assert list(bars.columns) == ["timestamp", "open", "high", "low", "close", "volume"]
    assert str(bars["timestamp"].dtype) == "datetime64[us, UTC]"
    assert len(bars) == 7
    assert bars["timestamp"].iloc[0] == pd.Timestamp("2024-01-03T14:30:00Z")
    assert bars["timestamp"].is_monotonic_increasing


@pytest.mark.slow
def test_a_window_that_failed_is_raised_after_the_others_were_kept(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """A script cannot take half a load for a whole one; what came is held, and its notes say how much."""
    gateway = start_gateway([FaultRule(kind="error", code=162, text="Unbekannter Fehler", nth=(2,))])
    settings = make_settings(gateway.port, ib_retry_waits_s=())
    with pytest.raises(TransientError, match="Unbekannter Fehler") as caught:
        ktrdr.load("AAPL", "1h", "full", start="2024-01-01", end="2024-04-01", settings=settings)
    assert "bars were loaded and kept" in caught.value.__notes__[-1]
    with pytest.warns(ktrdr.IncompleteBars, match=r"expected bars are not held\. `ktrdr gaps`"):
        assert len(ktrdr.read_bars("AAPL", "1h", "2024-01-01", "2024-04-01", settings=settings))


ROWS = "".join(f"2024-01-02T{at}Z,1.0,2.0,0.5,1.5,100\n" for at in ("14:30:00", "15:00:00", "17:00:00"))


def test_missing_bars_are_reported_and_can_be_made_an_error(make_settings: MakeSettings, unused_port: int) -> None:
    """16:00 is missing. The file is looked at, not adopted."""
    settings = make_settings(unused_port)
    settings.data_dir.mkdir()
    file = settings.data_dir / "AAPL_1h.csv"
    file.write_text("timestamp,open,high,low,close,volume\n" + ROWS)
    with pytest.warns(ktrdr.IncompleteBars, match="1 expected bars are not held"):
        assert len(ktrdr.read_bars("AAPL", "1h", settings=settings)) == 3
    with pytest.raises(DataError, match="not held"):
        ktrdr.read_bars("AAPL", "1h", missing="raise", settings=settings)
    assert len(ktrdr.read_bars("AAPL", "1h", "2024-01-02T15:00", "2024-01-02T16:00", settings=settings)) == 1
    assert len(ktrdr.read_bars("AAPL", "1h", missing="ignore", settings=settings)) == 3
    assert [path.name for path in settings.data_dir.iterdir()] == ["AAPL_1h.csv"]


def load_all(store: Store, history: FakeHistory, series: Series, span: Window) -> None:
    """As a run does it."""
    now = utc("2024-06-15")
    job = Load(
        series,
        span,
        store=store,
        history=lambda: history,
        limits=HistoryLimits.CLASSIC,
        now=lambda: now,
        recheck_last=False,
    )
    assert list(run_load(job))


def no_warning(settings: Settings, timeframe: str, start: str, end: str) -> int:
    """How many bars are read of a window that is complete."""
    with warnings.catch_warnings(action="error"):
        return len(ktrdr.read_bars("MSFT", timeframe, start, end, missing="raise", settings=settings))


def test_what_a_load_calls_complete_is_complete_to_a_reader(make_settings: MakeSettings, unused_port: int) -> None:
    """Before the start of history, and where IB leaves out the bars without trades, nothing is missing; a row that a user
    deletes is."""
    settings = make_settings(unused_port)
    store = Store(settings.data_dir)
    daily = Series(stock("MSFT"), TIMEFRAMES["1d"])
    young = FakeHistory.of(daily, window("2021-03-10", "2024-06-15"), head=utc("2021-03-10"))
    load_all(store, young, daily, window("2015-01-01", "2024-06-15"))
    assert no_warning(settings, "1d", "2015-01-01", "2024-06-15") == len(young.truth)

    minutes, span = Series(stock("MSFT"), TIMEFRAMES["1m"]), window("2024-03-04", "2024-03-16")
    thin = FakeHistory.of(minutes, span)
    trades = np.random.default_rng(0).random(len(thin.truth)) > 0.2
    trades[-1] = True  # of the newest bar nothing could show that it is not only late
    thin.truth = thin.truth[trades]
    load_all(store, thin, minutes, span)
    assert store.read_sidecar(minutes).sparse
    assert no_warning(settings, "1m", "2024-03-04", "2024-03-16") == len(thin.truth)

    path = store.csv_path(minutes)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:100] + lines[101:]))
    with pytest.raises(DataError, match="not held"):
        no_warning(settings, "1m", "2024-03-04", "2024-03-16")


@pytest.mark.parametrize("day", [0, 4, 6])
def test_a_week_is_held_by_whatever_day_it_is_labelled(make_settings: MakeSettings, unused_port: int, day: int) -> None:
    """Also at the edge of the window that is read, where its label lies outside."""
    settings = make_settings(unused_port)
    weekly = Series(stock("MSFT"), TIMEFRAMES["1w"])
    opens = expected_bars(weekly, window("2023-01-01", "2024-01-01")).opens
    mondays = opens - (opens // 86400 + 3) % 7 * 86400
    one = np.ones(len(opens))
    rows = bars_from_columns(mondays + day * 86400, one, one + 1, one - 0.5, one, one)
    Store(settings.data_dir).write(weekly, rows, answered=None, source="paper", now=utc("2024-06-01"))
    settings.universe_path.write_text("series:\n  - {symbol: MSFT, timeframes: [1w]}\n")
    whole = no_warning(settings, "1w", "2023-02-01", "2023-12-01")
    halves = [
        no_warning(settings, "1w", "2023-02-01", "2023-06-14"),
        no_warning(settings, "1w", "2023-06-14", "2023-12-01"),
    ]
    assert sum(halves) == whole > 40


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: ktrdr.read_bars("AAPL", "1h", settings=s), "nothing is held of AAPL 1h"),
        (lambda s: ktrdr.read_bars("NOSUCH", "1h", settings=s), "not in the universe"),
        (lambda s: ktrdr.read_bars("../x", "1h", settings=s), "is not a symbol"),
        (lambda s: ktrdr.read_bars("AAPL", "7m", settings=s), "unknown timeframe"),
        (lambda s: ktrdr.read_bars("AAPL", "1h", "2024-02-01", "2024-01-01", settings=s), "is not before end"),
        (lambda s: ktrdr.read_bars("AAPL", "1h", datetime(2024, 1, 1), settings=s), "has no time zone"),  # noqa: DTZ001
        (lambda s: ktrdr.read_bars("AAPL", "1h", pd.NaT, settings=s), "has no time zone"),
        (lambda s: ktrdr.read_bars("AAPL", "1h", 1704067200, settings=s), "is not a date"),  # type: ignore[arg-type]
        (lambda s: ktrdr.read_bars("AAPL", "1h", missing="?", settings=s), "unknown missing"),  # type: ignore[arg-type]
        (lambda s: ktrdr.load("AAPL", "1h", "sideways", settings=s), "unknown mode"),  # type: ignore[arg-type]
        (lambda s: ktrdr.load("AAPL", "1h", start="2099-01-01", settings=s), "in the future"),
    ],
)
def test_what_cannot_be_meant_is_an_input_error(
    make_settings: MakeSettings, unused_port: int, call: Callable[[Settings], object], words: str
) -> None:
    """With the reason; and nothing held at all is not an empty answer."""
    with pytest.raises(InputError, match=words):
        call(make_settings(unused_port))


def test_no_gateway_is_an_error_of_its_own(make_settings: MakeSettings, unused_port: int, tmp_path: Path) -> None:
    """And makes no file."""
    with pytest.raises(GatewayUnreachable):
        ktrdr.load("AAPL", "1h", start="2024-03-01", end="2024-03-05", settings=make_settings(unused_port))
    assert not list(tmp_path.rglob("*.csv"))
