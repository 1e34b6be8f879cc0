"""Files that something else made: every layout seen in the wild, and everything that must be refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ktrdr_pipelines.bars.schema import bars_from_columns, opens_of
from ktrdr_pipelines.domain.instruments import Hours, Series, forex, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, parse_timeframe
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.foreign import read_foreign, read_stamp
from ktrdr_pipelines.store.store import Store

NOW = datetime(2025, 6, 1, 12, 30, tzinfo=UTC)
MSFT_1H = Series(stock("MSFT", hours=Hours.EXTENDED), parse_timeframe("1h"))
MSFT_1D = Series(stock("MSFT"), parse_timeframe("1d"))
EURUSD_1H = Series(forex("EURUSD"), parse_timeframe("1h"))

EXPECTED = bars_from_columns(
    [int(pd.Timestamp(f"2025-05-22T{h:02}:00:00Z").timestamp()) for h in (8, 9, 10)],
    [1.0, 2.0, 3.0],
    [1.5, 2.5, 3.5],
    [0.5, 1.5, 2.5],
    [1.25, 2.25, 3.25],
    [10.0, 20.0, 30.0],
)
ROWS = ["1.0,1.5,0.5,1.25,10", "2.0,2.5,1.5,2.25,20", "3.0,3.5,2.5,3.25,30"]
NORMAL = HEADER + render_rows(EXPECTED)


def lay_out(header: str, stamp: str, end: str = "\n") -> bytes:
    """A file with ``header`` and the three rows, each stamp in the form ``stamp``."""
    rows = [f"{stamp.format(h=h)},{row}" for h, row in zip((8, 9, 10), ROWS, strict=True)]
    return (end.join([header, *rows]) + end).encode()


SPACED = "2025-05-22 {h:02}:00:00+00:00"
OHLCV = "open,high,low,close,volume"

LAYOUTS = {
    "timestamp and offset": lay_out(f"timestamp,{OHLCV}", SPACED),
    "date and offset": lay_out(f"date,{OHLCV}", SPACED),
    "unnamed index": lay_out(f",{OHLCV}", SPACED),
    "datetime and T": lay_out(f"datetime,{OHLCV}", "2025-05-22T{h:02}:00:00Z"),
    "capitals": lay_out("Date,Open,High,Low,Close,Volume", SPACED),
    "without seconds": lay_out(f"timestamp,{OHLCV}", "2025-05-22T{h:02}:00Z"),
    "fractions of nothing": lay_out(f"timestamp,{OHLCV}", "2025-05-22 {h:02}:00:00.000000+0000"),
    "spaces": lay_out(f"timestamp, {OHLCV.replace(',', ', ')}", " 2025-05-22 {h:02}:00:00 +00:00 "),
    "windows line ends": lay_out(f"timestamp,{OHLCV}", SPACED, "\r\n"),
    "old mac line ends": lay_out(f"timestamp,{OHLCV}", SPACED, "\r"),
    "byte-order mark": b"\xef\xbb\xbf" + lay_out(f"timestamp,{OHLCV}", SPACED),
    "no last newline": NORMAL[:-1],
    "normal with windows line ends": NORMAL.replace(b"\n", b"\r\n"),
    "normal with byte-order mark": b"\xef\xbb\xbf" + NORMAL,
    "blank lines at the end": NORMAL + b"\n\n",
    "blank lines before": b"\n" + NORMAL,
    "quoted": b'"' + lay_out(f"timestamp,{OHLCV}", SPACED).replace(b",", b'","').replace(b"\n", b'"\n"')[:-1],
    "unsorted": b"\n".join(NORMAL.splitlines()[i] for i in (0, 3, 1, 2)) + b"\n",
    "equal duplicates": NORMAL + NORMAL.splitlines()[2] + b"\n",
    "other zone": b"timestamp,open,high,low,close,volume\n"
    + "\n".join(f"2025-05-22 {h:02}:00:00-04:00,{row}" for h, row in zip((4, 5, 6), ROWS, strict=True)).encode(),
    "other order": b"date,volume,close,low,high,open\n"
    + "\n".join(
        f"{SPACED.format(h=h)},{','.join(reversed(row.split(',')))}" for h, row in zip((8, 9, 10), ROWS, strict=True)
    ).encode(),
    "extra columns": b"date,open,high,low,close,volume,average,barCount\n"
    + "\n".join(f"{SPACED.format(h=h)},{row},1.1,99" for h, row in zip((8, 9, 10), ROWS, strict=True)).encode(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_file_becomes_a_normal_one_at_first_use(layout: str, tmp_path: Path) -> None:
    """Looking at it is enough: same bars, normal bytes, the original kept beside it."""
    path = tmp_path / "MSFT_1h.csv"
    path.write_bytes(LAYOUTS[layout])
    store = Store(tmp_path, clock=lambda: NOW)
    pd.testing.assert_frame_equal(store.read_bars(MSFT_1H), EXPECTED)
    assert path.read_bytes() == NORMAL
    assert (tmp_path / "MSFT_1h.csv.bak-20250601T123000Z").read_bytes() == LAYOUTS[layout]
    assert store.read_sidecar(MSFT_1H).answered == ()
    assert store.verify(MSFT_1H) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepare_reports_what_was_adopted(layout: str, tmp_path: Path) -> None:
    """`prepare` reports it once; the second time there is nothing to do."""
    (tmp_path / "MSFT_1h.csv").write_bytes(LAYOUTS[layout])
    store = Store(tmp_path)
    adopted = store.prepare(MSFT_1H, now=NOW).adopted
    assert adopted is not None
    assert (adopted.rows, adopted.dropped) == (3, ())
    assert store.prepare(MSFT_1H, now=NOW).adopted is None


def test_columns_left_out_are_named(tmp_path: Path) -> None:
    """Extra columns are no reason to refuse, but users should know that they are gone."""
    rows = read_foreign(LAYOUTS["extra columns"], MSFT_1H, "x.csv")
    assert rows.notices == ("columns left out: average, barCount",)
    assert read_foreign(LAYOUTS["unsorted"], MSFT_1H, "x.csv").notices == ("rows were not in order: sorted",)
    assert read_foreign(LAYOUTS["equal duplicates"], MSFT_1H, "x.csv").notices[-1] == "1 equal duplicates removed"


def test_a_normal_file_is_left_alone(tmp_path: Path) -> None:
    """Adopting what needs no adopting changes no byte and makes no backup."""
    path = tmp_path / "MSFT_1h.csv"
    path.write_bytes(NORMAL)
    before = path.stat()
    adopted = Store(tmp_path).adopt(MSFT_1H, now=NOW)
    assert (adopted.rows, adopted.backup) == (3, None)
    assert path.stat().st_ino == before.st_ino
    assert [p.name for p in tmp_path.iterdir() if "bak" in p.name] == []


def test_intraday_stamps_without_a_zone_are_refused_unless_declared_to_be_utc(tmp_path: Path) -> None:
    """A guessed zone shifts a whole file; the user decides."""
    naive = lay_out(f"date,{OHLCV}", "2025-05-22 {h:02}:00:00")
    path = tmp_path / "MSFT_1h.csv"
    path.write_bytes(naive)
    store = Store(tmp_path, clock=lambda: NOW)
    for act in (
        lambda: store.read_bars(MSFT_1H),
        lambda: store.prepare(MSFT_1H, now=NOW),
        lambda: store.write(MSFT_1H, EXPECTED, answered=None, source="live", now=NOW),
    ):
        with pytest.raises(DataError, match=r"line 2.*no time zone") as caught:
            act()
        assert "--assume-utc" in caught.value.advice
    assert path.read_bytes() == naive
    assert store.adopt(MSFT_1H, assume_utc=True, now=NOW).rows == 3
    assert path.read_bytes() == NORMAL


DAYS = bars_from_columns([1_704_153_600, 1_704_240_000], [1.0, 2.0], [1.5, 2.5], [0.5, 1.5], [1.25, 2.25], [10.0, 20.0])


@pytest.mark.parametrize(
    "stamp",
    [
        "2024-01-0{d}",
        "2024-01-0{d} 00:00:00",
        "2024-01-0{d}T00:00:00Z",
        "2024-01-0{d} 00:00:00-05:00",
        "2024-01-0{d} 00:00:00+09:00",
    ],
)
def test_a_daily_bar_keeps_the_date_that_is_written(stamp: str) -> None:
    """The session date is what counts: midnight in New York is not five o'clock, in Tokyo not the day before."""
    text = f"date,{OHLCV}\n" + "\n".join(f"{stamp.format(d=d)},{row}" for d, row in zip((2, 3), ROWS, strict=False))
    pd.testing.assert_frame_equal(read_foreign(text.encode(), MSFT_1D, "x.csv").bars, DAYS)


def test_a_daily_bar_with_a_time_of_day_is_refused() -> None:
    """05:00 UTC may be New York's midnight or not: it is not guessed."""
    text = f"date,{OHLCV}\n2024-01-02 05:00:00+00:00,{ROWS[0]}\n"
    with pytest.raises(DataError, match="session's date"):
        read_foreign(text.encode(), MSFT_1D, "x.csv")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("2025-05-22 11:00:00+00:00,1,1,nan,1,5", "a price is not a finite number"),
        ("2025-05-22 11:00:00+00:00,1,1,,1,5", "a price is not a finite number"),
        ("2025-05-22 11:00:00+00:00,1,1,1,1,", "volume is not a finite number"),
        ("2025-05-22 11:00:00+00:00,1,0.5,1,1,5", "high is below"),
        ("2025-05-22 11:00:00+00:00,0,1,0,1,5", "not positive"),
        ("2025-05-22 11:00:00+00:00,1,1,1,1,-5", "volume is negative"),
        ("2025-05-22 11:07:00+00:00,1,1,1,1,5", "grid"),
        ("2025-05-22 11:00:00.5+00:00,1,1,1,1,5", "whole second"),
        ("2025-02-30 11:00:00+00:00,1,1,1,1,5", "no such time"),
        ("22/05/2025 11:00,1,1,1,1,5", "no timestamp"),
        ("2025-05-22 11:00:00+00:00,1,1,1,1", "5 fields where the header has 6"),
        ("2025-05-22 11:00:00+00:00,1,1,1,1,5,6", "7 fields"),
        ("2025-05-22 11:00:00+00:00,1,1,one,1,5", "not a finite number"),
        ('2025-05-22 11:00:00+00:00,"1,1,1,1,5', "nothing"),
        ("\x00\x00\x00", "1 fields"),
    ],
)
def test_bad_rows_are_dropped_and_shown_with_their_lines(line: str, why: str, tmp_path: Path) -> None:
    """The good part is kept, the bad line is reported by number, text and reason."""
    lines = lay_out(f"date,{OHLCV}", SPACED).decode().splitlines()
    content = "\r\n".join([*lines[:3], line, *lines[3:]])
    (tmp_path / "MSFT_1h.csv").write_text(content, newline="")
    adopted = Store(tmp_path).adopt(MSFT_1H, now=NOW)
    if why == "nothing":  # a stray quote swallows no lines, and a number is a number
        assert (adopted.rows, adopted.dropped) == (4, ())
        return
    assert adopted.rows == 3
    (fault,) = adopted.dropped
    assert fault.line == 4
    assert why in fault.why


def test_of_two_different_bars_with_one_stamp_neither_is_kept(tmp_path: Path) -> None:
    """Both lines are shown, each naming the other; the bar is requested again."""
    lines = NORMAL.decode().splitlines()
    rows = read_foreign("\n".join([*lines, lines[2].replace("2.25", "2.0")]).encode(), MSFT_1H, "x.csv")
    assert opens_of(rows.bars).tolist() == [opens_of(EXPECTED)[0], opens_of(EXPECTED)[2]]
    assert [(fault.line, fault.why) for fault in rows.dropped] == [
        (3, "another bar has the same timestamp (line 5)"),
        (5, "another bar has the same timestamp (line 3)"),
    ]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"PK\x03\x04\0\0\0", "not a text file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "line 1 is not UTF-8"),
        (b"timestamp,open\n\xff\xfe\xfa", "line 2 is not UTF-8"),
        (b"<!DOCTYPE html>\n<html></html>", "HTML"),
        (b'{"bars": []}', "JSON"),
        (b"hello world\n", "no column timestamp, open, high, low, close"),
        (b"date,price\n2025-05-22,5\n", "no column open, high, low, close"),
        (b"open,high,low,close,volume\n1,1,1,1,1\n", "no column timestamp"),
        (NORMAL[len(HEADER) :], "no column"),
        (b"date,open,high,low,close,close,volume\n", "2 columns called close"),
        (b"\n\n", "is empty"),
        (b"date,open,high,low,close,volume\nx,1,1,1,1,1\n", "no usable bar; line 2"),
        (b"date,open,high,low,close,volume\n2025-05-22T11:00:00Z,1,1,nan,1,1\n", "no usable bar; line 2"),
    ],
)
def test_what_is_no_bar_file_is_refused_and_left_alone(content: bytes, named: str, tmp_path: Path) -> None:
    """One line naming the file and what to do; not a byte changed, no copies made."""
    path = tmp_path / "MSFT_1h.csv"
    path.write_bytes(content)
    store = Store(tmp_path, clock=lambda: NOW)
    for act in (
        lambda: store.read_bars(MSFT_1H),
        lambda: store.extent(MSFT_1H),
        lambda: store.write(MSFT_1H, EXPECTED, answered=None, source="live", now=NOW),
    ):
        with pytest.raises(DataError, match=named) as caught:
            act()
        assert "MSFT_1h.csv" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.advice
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["MSFT_1h.csv"]


def test_an_empty_file_counts_as_none(tmp_path: Path) -> None:
    """As after ``touch``: no reason to stop."""
    (tmp_path / "MSFT_1h.csv").write_bytes(b"")
    store = Store(tmp_path)
    assert len(store.read_bars(MSFT_1H)) == 0
    assert store.write(MSFT_1H, EXPECTED, answered=None, source="live", now=NOW).rows_added == 3
    assert (tmp_path / "MSFT_1h.csv").read_bytes() == NORMAL


def test_forex_files_may_leave_the_volume_out() -> None:
    """Where the kind has no volume, an empty field, -1 and a missing column are all "none"."""
    stamp = "2025-05-22T08:00:00Z"
    for header, row in [(OHLCV, "1,1,1,1,"), (OHLCV, "1,1,1,1,-1"), ("open,high,low,close", "1,1,1,1")]:
        rows = read_foreign(f"timestamp,{header}\n{stamp},{row}\n".encode(), EURUSD_1H, "x.csv")
        assert rows.bars["volume"].tolist() == [0.0]
        assert rows.dropped == ()


def test_another_file_is_added_to_what_is_held(tmp_path: Path) -> None:
    """Held bars win, conflicts are reported, nothing is claimed, and the other file stays as it is."""
    store = Store(tmp_path / "data")
    held = EXPECTED.iloc[[1]].reset_index(drop=True).assign(close=2.0)
    store.write(MSFT_1H, held, answered=None, source="live", now=NOW)
    other = tmp_path / "download.csv"
    other.write_bytes(LAYOUTS["date and offset"])
    adopted = store.adopt(MSFT_1H, other, now=NOW)
    assert adopted.rows == 2
    assert adopted.backup is None
    assert [fault.text for fault in adopted.dropped] == ["2025-05-22T09:00:00Z,2.0,2.5,1.5,2.25,20"]
    assert store.read_bars(MSFT_1H)["close"].tolist() == [1.25, 2.0, 3.25]
    assert store.read_sidecar(MSFT_1H).answered == ()
    assert store.verify(MSFT_1H) == []
    assert other.read_bytes() == LAYOUTS["date and offset"]


def test_backups_never_replace_each_other(tmp_path: Path) -> None:
    """Two adoptions in one second leave two originals."""
    path = tmp_path / "MSFT_1h.csv"
    store = Store(tmp_path)
    for layout in ("date and offset", "capitals"):
        path.write_bytes(LAYOUTS[layout])
        store.adopt(MSFT_1H, now=NOW)
    assert (tmp_path / "MSFT_1h.csv.bak-20250601T123000Z").read_bytes() == LAYOUTS["date and offset"]
    assert (tmp_path / "MSFT_1h.csv.bak-20250601T123000Z-1").read_bytes() == LAYOUTS["capitals"]


def test_a_write_adopts_first(tmp_path: Path) -> None:
    """The gaps of an adopted file are gaps like any other: new bars join the old ones."""
    (tmp_path / "MSFT_1h.csv").write_bytes(LAYOUTS["date and offset"])
    more = EXPECTED.assign(timestamp=EXPECTED["timestamp"] + pd.Timedelta(hours=2))
    written = Store(tmp_path).write(MSFT_1H, more, answered=None, source="simulator", now=NOW)
    assert (written.rows_added, written.rows_revised) == (2, 1)
    assert written.prepared.adopted is not None
    assert written.prepared.adopted.rows == 3


@pytest.mark.parametrize(
    "text", ["2025-W01-1", "20250522", "1747900800", "2025-05-22T25:00:00Z", "2025-05-22T08:00:00+25:00"]
)
def test_stamps_that_python_might_read_otherwise_are_refused(text: str) -> None:
    """Week dates, compact dates and epoch seconds are not guessed at."""
    with pytest.raises(ValueError, match="no "):
        read_stamp(text, is_intraday=True, assume_utc=True)


def test_a_write_cut_off_inside_a_number_loses_its_last_row_and_reports_it(tmp_path: Path) -> None:
    """A file of ours ends with a newline; without one its last line was cut, and half a number is no price."""
    store = Store(tmp_path)
    series = Series(stock("AAPL"), TIMEFRAMES["1d"])
    days = np.array([int(datetime(2024, 1, d, tzinfo=UTC).timestamp()) for d in (2, 3, 4)])
    bars = bars_from_columns(days, [100.5] * 3, [101.25] * 3, [99.75] * 3, [100.5] * 3, [12345] * 3)
    now = datetime(2024, 2, 1, tzinfo=UTC)
    store.write(series, bars, answered=None, source="paper", now=now)
    path = store.csv_path(series)
    path.write_bytes(path.read_bytes()[:-4])
    prepared = store.prepare(series, now=now)
    assert prepared.adopted is not None
    assert "cut off" in str(prepared.adopted.dropped[0])
    assert store.held_opens(series).tolist() == days[:2].tolist()
    assert prepared.adopted.backup is not None
