"""Promises of `import ktrdr_pipelines as ktrdr`: light to import, usable inside a running event loop, honest about holes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

import ktrdr_pipelines as ktrdr
from ktrdr_pipelines.errors import DataError, GatewayUnreachable, InputError, TransientError
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines_tests.conftest import StartGateway

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
    import_module("ktrdr_pipelines.series_load")
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


def test_holes_are_told_and_can_be_made_an_error(make_settings: MakeSettings, unused_port: int) -> None:
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
