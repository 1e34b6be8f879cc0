"""The bytes of a CSV: rendering, parsing, bisecting (`csv_format.py`, `csv_scan.py`)."""

from __future__ import annotations

import os
import re
import struct
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.bars.schema import MOST, bars_from_columns, empty_bars, opens_of, row_rules
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import BugError
from ktrdr_pipelines.store import csv_scan
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    MalformedFile,
    parse_number,
    parse_rows,
    parse_stamps,
    render_number,
    render_rows,
    render_stamps,
    sample_column,
)
from ktrdr_pipelines.store.csv_scan import find_row, first_and_last_open, parse_range, scan_opens

T0 = 1_704_205_800  # 2024-01-02T14:30:00Z
RULES = row_rules(TIMEFRAMES["1m"])
ROW = b"2024-01-02T14:30:00Z,1.0,1.0,1.0,1.0,5\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-07, "0.0000001"),
        (1e16, "10000000000000000"),
        (123456789.12345678, "123456789.12345678"),
        (185.0, "185.0"),
        (0.1 + 0.2, "0.30000000000000004"),
        (-37.63, "-37.63"),
    ],
)
def test_numbers_are_shortest_decimals_without_exponents(value: float, text: str) -> None:
    """What other programs read is what was meant, to the last bit."""
    assert render_number(value) == text
    assert float(text) == value


def test_a_row_looks_as_documented() -> None:
    """Fixed-width UTC stamp, prices as decimals, whole volumes without a point, LF."""
    bars = bars_from_columns([T0, T0 + 60], [1e-7, 2], [1e16, 2.5], [1e-7, 1.5], [1, 2], [1200, 0.25])
    assert render_rows(bars) == (
        b"2024-01-02T14:30:00Z,0.0000001,10000000000000000,0.0000001,1.0,1200\n"
        b"2024-01-02T14:31:00Z,2.0,2.5,1.5,2.0,0.25\n"
    )


def test_years_beyond_four_digits_are_refused() -> None:
    """A wider stamp would break the bisecting."""
    with pytest.raises(BugError):
        render_stamps(np.array([253_402_300_800]))


_FINITE = st.floats(min_value=5e-324, max_value=MOST, exclude_max=True)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            _FINITE, _FINITE, _FINITE, _FINITE, st.floats(0, MOST, exclude_max=True).filter(lambda v: v != 2**31 - 1)
        ),
        max_size=8,
    )
)
def test_any_bars_come_back_bit_for_bit(rows: list[tuple[float, float, float, float, float]]) -> None:
    """Rendering and parsing are exact for every float that a market may have."""
    columns = np.array([(o, max(o, h, low, c), min(o, h, low, c), c, v) for o, h, low, c, v in rows]).reshape(-1, 5)
    bars = bars_from_columns(T0 + 60 * np.arange(len(rows)), *columns.T)
    parsed, faults = parse_rows(render_rows(bars), RULES)
    assert not faults
    pd.testing.assert_frame_equal(parsed, bars, check_exact=True)
    for row in range(len(rows)):
        assert struct.pack("d", parsed["open"][row]) == struct.pack("d", bars["open"][row])


@settings(max_examples=200, deadline=None)
@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59)))  # noqa: DTZ001 (hypothesis wants naive bounds)
def test_every_second_of_the_calendar_reads_as_datetime_reads_it(instant: datetime) -> None:
    """Leap years, centuries, ends of months: the standard library is the judge."""
    open_s = int(instant.replace(microsecond=0, tzinfo=UTC).timestamp())
    (text,) = render_stamps(np.array([open_s]))
    assert text == instant.replace(microsecond=0).isoformat() + "Z"
    parsed, good = parse_stamps(np.frombuffer(text.encode() + b",", np.uint8), np.array([0]))
    assert good.all()
    assert parsed[0] == open_s


@pytest.mark.parametrize(
    "stamp",
    [
        "2024-02-30T00:00:00Z", "2023-02-29T00:00:00Z", "2024-13-01T00:00:00Z", "2024-00-01T00:00:00Z", "2024-01-00T00:00:00Z",
        "2024-01-01T24:00:00Z", "2024-01-01T00:60:00Z", "2024-01-01T00:00:60Z", "0000-01-01T00:00:00Z", "2024-01-01 00:00:00Z",
        "2024-01-01T00:00:00+", "2024/01/01T00:00:00Z", "2024-01-01T0a:00:00Z", "2024-01-01T00:0", "",
    ],
)  # fmt: skip
def test_stamps_that_are_none_are_seen(stamp: str) -> None:
    """Nothing that merely resembles a stamp is read as one."""
    data = np.frombuffer(stamp.encode() + b",1,1,1,1,5", np.uint8)
    assert not parse_stamps(data, np.array([0]))[1][0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"2024-01-02T14:31:00Z,1,1,1,1\n", "5 fields"),
        (b"2024-01-02T14:31:00Z,1,1,1,1,5,6\n", "7 fields"),
        (b"2024-01-02T14:31:00Z,1,1,nan,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,inf,1,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1,,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1,1_0,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1,1-,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1,0x1,1,5\n", "not a finite number"),
        (b'2024-01-02T14:31:00Z,"1",1,1,1,5\n', "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1e999,1,1,5\n", "not a finite number"),
        (b"2024-01-02T14:31:00Z,1,1,1,1,5\r\n", "volume is not a finite number"),
        (b"2024-01-02T14:31:00Z,1,0.5,1,1,5\n", "high is below"),
        (b"2024-01-02T14:31:00Z,1,1,1,1,-5\n", "volume is negative"),
        (b"2024-01-02T14:31:30Z,1,1,1,1,5\n", "grid"),
        (b"2024-01-02T14:30:00Z,1,1,1,1,5\n", "same timestamp"),
        (b"2024-01-02T14:29:00Z,1,1,1,1,5\n", "earlier"),
        (b"\n", "no timestamp"),
        (b"rubbish\n", "no timestamp"),
        (b"\0" * 40 + b"\n", "no timestamp"),
        (b"2024-01-02T14:31:00Z,1,1", "3 fields"),
    ],
)
def test_bad_rows_are_found_and_nothing_is_returned(row: bytes, why: str) -> None:
    """One bad row in a window: its number, its place, its fault, and no bars at all."""
    bars, faults = parse_rows(ROW + row, RULES)
    assert len(bars) == 0
    ((number, offset, text),) = faults
    assert (number, offset) == (1, len(ROW))
    assert why in text


def test_a_field_too_many_does_not_hide_one_too_few() -> None:
    """The commas of all rows together are right, those of two rows are not."""
    later = [b"2024-01-02T14:31:00Z,1,1,1,1,5,6\n", b"2024-01-02T14:32:00Z,1,1,1,1\n"]
    for rows in (later, [later[1].replace(b":32", b":30"), later[0]]):
        bars, faults = parse_rows(b"".join(rows), RULES)
        assert len(bars) == 0
        assert sorted(why for _, _, why in faults) == ["5 fields instead of 6", "7 fields instead of 6"]


_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ(,[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?){5}")


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 3 * len(ROW) - 1), st.sampled_from(b'0129.,-+eETZ:\n /"nN\0\xff')), max_size=3
    )
)
def test_no_damage_of_a_row_passes(changes: list[tuple[int, int]]) -> None:
    """Up to three characters of three rows replaced: what is read without a fault is written as documented, number by number."""
    data = bytearray(b"".join(ROW.replace(b"14:30", f"14:3{n}".encode()) for n in range(3)))
    for at, character in changes:
        data[at] = character
    bars, faults = parse_rows(bytes(data), RULES)
    lines = bytes(data).split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    if faults:
        assert len(bars) == 0
        assert changes
        return
    assert len(bars) == len(lines)
    assert all(_LINE.fullmatch(line) for line in lines)
    for line, row in zip(lines, bars.itertuples(index=False, name=None), strict=True):
        fields = line.decode().split(",")
        assert row[0] == pd.Timestamp(fields[0])
        assert row[1:] == tuple(map(float, fields[1:]))


def test_no_rows_are_no_bars() -> None:
    """An empty range is an empty table without faults."""
    bars, faults = parse_rows(b"", RULES)
    pd.testing.assert_frame_equal(bars, empty_bars())
    assert faults == []


@pytest.mark.parametrize("text", ["1", "-1.5", "+2.", ".5", "1e5", "1E-07"])
def test_decimals_in_any_common_form_are_read(text: str) -> None:
    """Other programs write exponents and bare points."""
    assert parse_number(text) == float(text)


@pytest.mark.parametrize("text", ["", "nan", "inf", "1_000", "1,5", "0x10", "١", "1e", "--1", "1 2"])
def test_what_is_no_decimal_is_nan(text: str) -> None:
    """Python's float() reads some of these; a bar's price must not."""
    assert np.isnan(parse_number(text))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    minutes=st.sets(st.integers(0, 400), max_size=60),
    wanted=st.integers(-5, 405),
    wide=st.booleans(),
)
def test_bisecting_finds_what_searching_finds(
    minutes: set[int], wanted: int, wide: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any file and any instant the offset is that of the first row at or after it."""
    opens_s = T0 + 60 * np.array(sorted(minutes), np.int64)
    price = np.where(opens_s % 7 == 0, 1e-200 if wide else 1.0, 2.0)  # rows of very different widths
    rows = [render_rows(bars_from_columns([o], [p], [p], [p], [p], [1])) for o, p in zip(opens_s, price, strict=True)]
    path = tmp_path_factory.mktemp("bisect") / "x.csv"
    path.write_bytes(HEADER + b"".join(rows))
    fd = os.open(path, os.O_RDONLY)
    try:
        size = path.stat().st_size
        index = int(np.searchsorted(opens_s, T0 + 60 * wanted))
        expected = len(HEADER) + sum(len(row) for row in rows[:index])
        assert find_row(fd, size, T0 + 60 * wanted) == expected
        scanned = [chunk for chunk, _ in scan_opens(fd, len(HEADER), size)]
        assert np.concatenate([*scanned, np.empty(0, np.int64)]).tolist() == opens_s.tolist()
        ends = first_and_last_open(fd, size)
        assert ends == ((int(opens_s[0]), int(opens_s[-1])) if len(opens_s) else None)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "content", [b"", HEADER[:-1], HEADER + b"x", HEADER + ROW[:-1], HEADER + b"x" * 40 + b"\n", ROW]
)
def test_a_file_that_is_not_ours_is_seen_at_its_ends(content: bytes, tmp_path: Path) -> None:
    """Header, first row, last row and last newline are looked at at each opening."""
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(MalformedFile):
            first_and_last_open(fd, len(content))
    finally:
        os.close(fd)


@pytest.mark.slow
def test_scanning_crosses_chunks_without_losing_a_row(tmp_path: Path) -> None:
    """A file of many megabytes is read in pieces; rows on the seams count once."""
    opens_s = T0 + 60 * np.arange(150_000)
    ones = np.ones(len(opens_s))
    data = HEADER + render_rows(bars_from_columns(opens_s, ones, ones, ones, ones, ones))
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        pieces = list(scan_opens(fd, len(HEADER), len(data)))
    finally:
        os.close(fd)
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate([opens for opens, _ in pieces]), opens_s)
    assert all(data[int(o) - 1 : int(o)] == b"\n" for _, offsets in pieces for o in offsets[:2])


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.integers(-1, 3), min_size=1, max_size=40), block=st.integers(45, 400), cut=st.integers(0, 60))
def test_rows_read_in_blocks_are_those_read_at_once(
    gaps: list[int], block: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a block ends in: the same bars, the same faults (rows out of order, an unfinished line)."""
    opens_s = T0 + 60 * np.cumsum(gaps)
    ones = np.ones(len(gaps))
    data = render_rows(bars_from_columns(opens_s, ones, ones, ones, ones, ones))
    data = data[: max(0, len(data) - cut)]
    path = tmp_path_factory.mktemp("blocks") / "x"
    path.write_bytes(data)
    at_once, small = parse_rows(data, RULES), csv_scan.CHUNK_BYTES
    with path.open("rb") as file:
        csv_scan.CHUNK_BYTES = block
        try:
            bars, faults = parse_range(file.fileno(), 0, len(data), RULES)
        finally:
            csv_scan.CHUNK_BYTES = small
    assert faults == at_once[1]
    pd.testing.assert_frame_equal(bars, at_once[0])


def test_opens_of_parsed_rows_are_those_written() -> None:
    """The stamps of a parsed table are exact."""
    bars, _ = parse_rows(ROW, RULES)
    assert opens_of(bars).tolist() == [T0]


@pytest.mark.parametrize(("rows", "most", "wanted"), [(0, 3, []), (3, 3, [0, 1, 2]), (4, 3, [0, 2]), (9, 3, [0, 3, 6])])
def test_a_column_is_sampled_at_equal_steps(rows: int, most: int, wanted: list[int]) -> None:
    """From the first row on, never more than asked for; a malformed row gives no picture."""
    opens = [T0 + 60 * i for i in range(rows)]
    one = [1.0] * rows
    data = render_rows(bars_from_columns(opens, one, one, one, list(range(rows)), one))
    assert sample_column(data, 4, most) == wanted
    assert sample_column(b"2024-01-02T14:30:00Z,x\n" + data, 4, most) == []
