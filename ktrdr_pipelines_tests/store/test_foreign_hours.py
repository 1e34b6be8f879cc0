"""Foreign files and the trading calendar: bars that no session has room for are not adopted."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.csv_format import HEADER, render_stamps
from ktrdr_pipelines.store.store import Store

NOW = datetime(2024, 9, 1, tzinfo=UTC)
SPY_1H = Series(stock("SPY", primary_exchange="ARCA"), parse_timeframe("1h"))
REASON = "outside the trading hours of SPY, regular hours"
FOREIGN_HEADER = b"date,open,high,low,close,volume\n"
ROW = "1,2,1,1,5"


def rows(stamps: list[str]) -> bytes:
    return "".join(f"{stamp},{ROW}\n" for stamp in stamps).encode()


def held(store: Store, series: Series) -> list[str]:
    return render_stamps(store.held_opens(series))


ON_THE_HOUR = [f"2024-06-0{day}T{hour}:00:00Z" for day in (3, 4) for hour in range(13, 20)]
"""Two days of a regular-hours file that stamps the first bar on the hour; IB stamps it 13:30."""
STRAY = ["2024-06-04T10:00:00Z", "2024-06-08T15:00:00Z"]
"""Before the market, and on a Saturday."""
GOOD = [stamp for stamp in ON_THE_HOUR if "T13" not in stamp]


def test_bars_outside_every_session_are_not_adopted_and_are_shown(tmp_path: Path) -> None:
    """Each with its line and its reason, like any other bad row; the file stays as it is."""
    store, other = Store(tmp_path / "data"), tmp_path / "old.csv"
    other.write_bytes(FOREIGN_HEADER + rows([*ON_THE_HOUR, *STRAY]))
    adopted = store.adopt(SPY_1H, other, now=NOW)
    assert [(fault.line, fault.why) for fault in adopted.dropped] == [(n, REASON) for n in (2, 9, 16, 17)]
    assert adopted.rows == len(GOOD)
    assert held(store, SPY_1H) == GOOD


def test_at_first_use_they_are_left_out_of_the_csv_kept_in_the_copy_and_reported(tmp_path: Path) -> None:
    """The series' own file, made by another program."""
    store, content = Store(tmp_path), FOREIGN_HEADER + rows([*ON_THE_HOUR, *STRAY])
    store.csv_path(SPY_1H).write_bytes(content)
    prepared = store.prepare(SPY_1H, now=NOW)
    assert held(store, SPY_1H) == GOOD
    assert prepared.adopted is not None
    assert prepared.adopted.backup is not None
    assert prepared.adopted.backup.read_bytes() == content
    report = "; ".join(prepared.describe())
    assert "4 refused" in report
    assert REASON in report


def test_a_file_written_like_ours_loses_what_would_be_held_twice_and_nothing_else(tmp_path: Path) -> None:
    """It may be ours and have lost its sidecar. A bar that shares time with an expected one costs a request, which brings that
    one; any other bar may have come from IB, so it stays and is reported."""
    store = Store(tmp_path)
    store.csv_path(SPY_1H).write_bytes(HEADER + rows(sorted([*ON_THE_HOUR, *STRAY])))
    prepared = store.prepare(SPY_1H, now=NOW)
    assert held(store, SPY_1H) == sorted([*GOOD, *STRAY])
    assert "2 refused" in "; ".join(prepared.describe())
    assert len(list(tmp_path.glob("*.bak-*"))) == 1

    store.csv_path(SPY_1H).write_bytes(HEADER + rows(sorted([*GOOD, *STRAY])))
    store.sidecar_path(SPY_1H).unlink()
    (notice,) = Store(tmp_path).prepare(SPY_1H, now=NOW).describe()
    assert all(part in notice for part in ("kept 2 bars", REASON, "2024-06-04T10:00:00Z"))


def test_a_user_who_declares_that_it_was_made_elsewhere_is_believed(tmp_path: Path) -> None:
    """`ktrdr adopt` of the series' own CSV leaves them all out, whatever the file looks like."""
    store = Store(tmp_path)
    store.csv_path(SPY_1H).write_bytes(HEADER + rows(sorted([*ON_THE_HOUR, *STRAY])))
    adopted = store.adopt(SPY_1H, store.csv_path(SPY_1H), now=NOW)
    assert len(adopted.dropped) == 4
    assert adopted.backup is not None
    assert held(store, SPY_1H) == GOOD


def test_what_ib_sent_stays_whatever_the_calendar_expects(tmp_path: Path) -> None:
    """Also when the file is edited afterwards, or adopted, or its sidecar is damaged."""
    store = Store(tmp_path)
    opens = np.array([int(datetime.fromisoformat(s).timestamp()) for s in sorted([*ON_THE_HOUR, *STRAY])])
    ones = np.ones(len(opens))
    store.write(SPY_1H, bars_from_columns(opens, ones, ones, ones, ones, ones), answered=None, source="paper", now=NOW)
    everything = held(store, SPY_1H)
    assert len(everything) == 16
    path = store.csv_path(SPY_1H)
    path.write_bytes(path.read_bytes() + b"2024-06-10T10:00:00Z,not,a,bar\n")
    assert store.prepare(SPY_1H, now=NOW).adopted is not None
    assert held(store, SPY_1H) == everything
    store.adopt(SPY_1H, path, now=NOW)
    store.sidecar_path(SPY_1H).write_text("{damaged")
    path.write_bytes(path.read_bytes().replace(b"timestamp", b"date"))
    Store(tmp_path).prepare(SPY_1H, now=NOW)
    assert held(Store(tmp_path), SPY_1H) == everything


def test_local_stamps_that_were_declared_to_be_utc_are_refused_as_a_whole(tmp_path: Path) -> None:
    """Of New York's 09:30 to 15:00 read as UTC two fall into the session: they would be kept at wrong times."""
    store, other = Store(tmp_path / "data"), tmp_path / "old.csv"
    local = [f"2024-06-03 {clock}" for clock in ("09:30", *(f"{hour}:00" for hour in range(10, 16)))]
    other.write_bytes(FOREIGN_HEADER + rows(local))
    with pytest.raises(DataError, match="5 of 7 bars lie outside the trading hours") as caught:
        store.adopt(SPY_1H, other, now=NOW, assume_utc=True)
    assert "another zone" in caught.value.advice
    assert not store.csv_path(SPY_1H).exists()


def test_daily_bars_of_days_without_trading_are_not_adopted(tmp_path: Path) -> None:
    """A Saturday, a Sunday and Christmas."""
    store, other = Store(tmp_path / "data"), tmp_path / "old.csv"
    series = Series(SPY_1H.instrument, parse_timeframe("1d"))
    days = ["2023-12-22", "2023-12-23", "2023-12-24", "2023-12-25", "2023-12-26"]
    other.write_bytes(FOREIGN_HEADER + rows(days))
    adopted = store.adopt(series, other, now=NOW)
    assert {(fault.line, fault.why) for fault in adopted.dropped} == {
        (line, "outside the trading days of SPY") for line in (3, 4, 5)
    }
    assert held(store, series) == ["2023-12-22T00:00:00Z", "2023-12-26T00:00:00Z"]


@pytest.mark.parametrize(
    ("series", "stamps"),
    [
        (Series(SPY_1H.instrument, parse_timeframe("1w")), ["2024-06-02", "2024-06-14", "2024-06-22"]),
        (Series(SPY_1H.instrument, parse_timeframe("1mo")), ["2024-04-01", "2024-05-31", "2024-06-30"]),
        (Series(forex("EURUSD"), parse_timeframe("1h")), ["2024-06-03T21:00:00Z", "2024-06-04T21:15:00Z"]),
        (Series(Instrument("ODD", "STK", "SMART", "EUR"), parse_timeframe("1h")), ["2024-06-08T03:00:00Z"]),
        (Series(SPY_1H.instrument, parse_timeframe("1d")), ["1949-01-01"]),
    ],
    ids=["any day of a week", "any day of a month", "both names of a forex bar", "no calendar", "before calendars"],
)
def test_what_the_calendar_cannot_rule_out_is_adopted(series: Series, stamps: list[str], tmp_path: Path) -> None:
    """Labels differ between gateways, and not every market has a calendar."""
    store, other = Store(tmp_path / "data"), tmp_path / "old.csv"
    other.write_bytes(FOREIGN_HEADER + rows(stamps))
    adopted = store.adopt(series, other, now=NOW)
    assert (adopted.rows, adopted.dropped) == (len(stamps), ())


def test_years_of_seconds_are_judged_in_parts(tmp_path: Path) -> None:
    """Far apart, so that all seconds between them would not fit into memory."""
    series = Series(SPY_1H.instrument, parse_timeframe("1s"))
    store, other = Store(tmp_path / "data"), tmp_path / "old.csv"
    other.write_bytes(FOREIGN_HEADER + rows(["2004-06-03T14:00:00Z", "2004-06-05T14:00:00Z", "2024-06-03T14:00:01Z"]))
    adopted = store.adopt(series, other, now=NOW)
    assert [fault.line for fault in adopted.dropped] == [3]
