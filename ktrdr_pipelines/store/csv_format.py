"""The bytes of a series' CSV: one header, one row per bar, fixed-width stamps first, sorted, LF line ends.

Renders and parses rows. Pure: rows of an open file are found and read in `csv_scan.py`. The format: docs/design.md, 4. Why not
pandas.read_csv alone: it pads short rows, accepts quoted, blank and ``NA`` fields, and cannot name the line.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.bars.schema import COLUMNS, BarArrays, Rule, bars_from_columns, empty_bars, find_faults, opens_of
from ktrdr_pipelines.domain.arrays import BoolArray, FloatArray, IntArray
from ktrdr_pipelines.errors import BugError

if TYPE_CHECKING:
    import pandas as pd

HEADER = (",".join(COLUMNS) + "\n").encode()
STAMP_BYTES = 20

_RENDERED_ROWS = 100_000
_FIRST_S, _END_S = -62_135_596_800, 253_402_300_800  # years 1 to 9999: four digits

_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RowFault:
    """One bad line: its number (the header is line 1), its text, and the reason."""

    line: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}: {self.text}"


class MalformedFile(Exception):
    """The bytes are not what this module writes. Stays inside `store/`; users get a DataError.

    ``offset`` is that of the bad bytes. The caller that reports it counts the lines, since counting reads the file.
    """

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.why = why
        self.offset = offset


# ---------------------------------------------------------------------------------------------------- rendering


def render_stamps(opens_s: IntArray) -> list[str]:
    """``2024-01-02T14:30:00Z`` for each open."""
    if len(opens_s) and (opens_s.min() < _FIRST_S or opens_s.max() >= _END_S):
        raise BugError("a bar's year has more than four digits")
    return [f"{text}Z" for text in np.datetime_as_string(opens_s.astype("datetime64[s]"), unit="s").tolist()]


def render_stamp(open_s: int) -> bytes:
    """One stamp as bytes; an instant outside the years 1 to 9999 becomes the nearest inside, for bisecting."""
    return render_stamps(np.array([min(max(open_s, _FIRST_S), _END_S - 1)]))[0].encode()


def render_number(value: float) -> str:
    """The shortest decimal that reads back as ``value``, never with an exponent: ``1e-07`` -> ``0.0000001``."""
    text = repr(value)
    return format(Decimal(text), "f") if "e" in text else text


class _Texts(dict[float, str]):
    """Prices as text, each rendered once: most prices of an answer occur several times in it."""

    def __missing__(self, value: float) -> str:
        text = self[value] = render_number(value)
        return text


def render_rows(bars: pd.DataFrame) -> bytes:
    """The rows of a valid bars table, without the header. Volumes that are whole numbers are written as such."""
    stamps = render_stamps(opens_of(bars))
    columns = [bars[name].to_numpy(np.float64) for name in COLUMNS[1:5]]
    render = _Texts().__getitem__
    if any((column == 0).any() for column in columns):
        render = render_number  # 0.0 and -0.0 are equal, and two texts
    prices = [map(render, column.tolist()) for column in columns]
    volumes = _render_volumes(bars["volume"].to_numpy(np.float64))
    return "\n".join([*map(",".join, zip(stamps, *prices, volumes, strict=True)), ""]).encode()


def _render_volumes(volumes: FloatArray) -> list[str]:
    whole = volumes.astype(np.int64)
    if (whole == volumes).all():
        return [str(volume) for volume in whole.tolist()]
    return [str(int(v)) if v.is_integer() else render_number(v) for v in volumes.tolist()]


def render_file(bars: pd.DataFrame) -> list[bytes]:
    """A whole CSV with its header, in pieces, so that millions of rows are not held several times over."""
    return [HEADER, *(render_rows(bars.iloc[i : i + _RENDERED_ROWS]) for i in range(0, len(bars), _RENDERED_ROWS))]


# ---------------------------------------------------------------------------------------------------- parsing

_DAYS_BEFORE_MONTH = np.array([0, 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334], np.int64)
_DAYS_IN_MONTH = np.array([0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], np.int64)


_DIGITS = [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18]
_MARKS = {4: "-", 7: "-", 10: "T", 13: ":", 16: ":", 19: "Z", 20: ","}


def parse_stamps(data: npt.NDArray[np.uint8], starts: IntArray) -> tuple[IntArray, BoolArray]:
    """Opens of the rows that begin at ``starts`` in ``data``, and which of them are well formed (others read 0)."""
    width = STAMP_BYTES + 1
    if len(data) < width or not len(starts):
        return np.zeros(len(starts), np.int64), np.zeros(len(starts), np.bool_)
    last = len(data) - width
    # Every place of `data` as one item of 21 bytes, so that the stamps are taken in one pass; then one array for each character.
    places: npt.NDArray[Any] = np.ndarray((last + 1,), dtype=f"V{width}", buffer=data, strides=(1,))
    characters = np.ascontiguousarray(places[np.minimum(starts, last)].view(np.uint8).reshape(-1, width).T)
    good = starts <= last
    for at, mark in _MARKS.items():
        good &= characters[at] == ord(mark)
    digits = characters - np.uint8(48)  # wraps round for anything below "0"
    for at in _DIGITS:
        good &= digits[at] <= 9

    def number(*places: int) -> npt.NDArray[np.int32]:
        value: npt.NDArray[np.int32] = digits[places[0]].astype(np.int32)
        for at in places[1:]:
            value = value * 10 + digits[at]
        return value

    hour, minute, second = number(11, 12), number(14, 15), number(17, 18)
    good &= (hour < 24) & (minute < 60) & (second < 60)
    date = np.where(good, number(*_DIGITS[:8]), 0)
    firsts = np.flatnonzero(np.diff(date, prepend=-1))  # rows of one day follow each other
    days, valid = _days_since_1970(date[firsts].astype(np.int64))
    repeats = np.diff(firsts, append=len(date))
    good &= np.repeat(valid, repeats)
    opens_s = np.repeat(days * 86400, repeats) + (hour * 3600 + minute * 60 + second)
    return np.where(good, opens_s, 0), good


def _days_since_1970(dates: IntArray) -> tuple[IntArray, BoolArray]:
    """Dates written as numbers (20240102) as days, and which of them exist."""
    year, month, day = dates // 10_000, dates // 100 % 100, dates % 100
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    valid = (month >= 1) & (month <= 12) & (year >= 1) & (day >= 1)
    month = np.where(valid, month, 0)
    valid &= day <= _DAYS_IN_MONTH[month] - ((month == 2) & ~leap)
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400 - 719_162
    return days + _DAYS_BEFORE_MONTH[month] + ((month > 2) & leap) + day - 1, valid


def split_rows(data: npt.NDArray[np.uint8]) -> tuple[IntArray, IntArray]:
    """Starts and ends (the newline, or the end of the data) of the lines in ``data``."""
    ends = np.flatnonzero(data == 10)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    starts = np.zeros(len(ends), np.int64)
    starts[1:] = ends[:-1] + 1
    return starts, ends


def parse_rows(data: bytes, rules: Sequence[Rule]) -> tuple[pd.DataFrame, list[tuple[int, int, str]]]:
    """Rows as a bars table, and their faults as (row number, offset in ``data``, why).

    The table is complete, exact and strictly increasing only without faults; otherwise it is empty. Each row has
    exactly six fields of plain characters, keeps ``rules``, and comes after the one before.
    """
    if not data:
        return empty_bars(), []
    columns = parse_columns(data, rules)
    if columns is None:
        return empty_bars(), _diagnose(data, rules)
    return bars_from_columns(columns[0], *columns[1]), []


def sample_column(data: bytes, column: int, most: int) -> list[float]:
    """The numbers of one column (0 is the stamp) of at most ``most`` rows, at equal steps from the first one on. Without pandas,
    which a load that has nothing to do never imports. Empty where a row that was read is malformed: this is for pictures.
    """
    rows = data.split(b"\n")[:-1]
    try:
        return [float(row.split(b",")[column]) for row in rows[:: max(1, -(-len(rows) // most))]]
    except (ValueError, IndexError):
        return []


def parse_columns(data: bytes, rules: Sequence[Rule]) -> tuple[IntArray, FloatArray] | None:
    """The opens of the rows in ``data`` (not empty) and their five numbers, one array each; None when a row has a fault."""
    import pandas as pd

    array = np.frombuffer(data, np.uint8)
    starts, _ = split_rows(array)
    opens_s, stamped = parse_stamps(array, starts)
    if not stamped.all() or (np.diff(opens_s) <= 0).any() or not _is_plain(data, array, len(starts)):
        return None
    try:
        table = pd.read_csv(
            io.BytesIO(data),
            header=None,
            names=list(COLUMNS),
            usecols=list(COLUMNS[1:]),
            dtype=np.float64,
            na_filter=False,
            skip_blank_lines=False,
            low_memory=False,  # in one piece: callers with millions of rows bring a few megabytes at a time
        )
    except (ValueError, pd.errors.ParserError):
        return None
    values: FloatArray = table.to_numpy().T
    return None if find_faults(BarArrays(opens_s * 1_000_000, *values), rules) else (opens_s, values)


def _is_plain(data: bytes, array: npt.NDArray[np.uint8], rows: int) -> bool:
    """True if ``rows`` rows with good stamps have no character but those of stamps and numbers, and five commas each.

    The commas are counted over all rows: where a row has more of them another has fewer, and pandas finds no number in it. pandas
    would accept quotes, blanks and words as well, so they must not get there.
    """
    if b"/" in data:  # the only other character between "+" and ":"
        return False
    others = commas = 0
    for at in range(0, len(array), _BLOCK_BYTES):  # in blocks that stay in the processor's cache
        block = array[at : at + _BLOCK_BYTES]
        others += int(np.count_nonzero(block - np.uint8(43) > 15))
        commas += int(np.count_nonzero(block == 44))
    # Outside of "+" to ":" are the T and the Z of each stamp, line ends, and the exponents of numbers (rare).
    exponents = others - 2 * rows - (rows if data.endswith(b"\n") else rows - 1)
    return commas == 5 * rows and (exponents == 0 or exponents == data.count(b"e"))


_NUMBER_CHARACTERS = "0123456789.+-eE"


def parse_number(text: str) -> float:
    """A decimal number; NaN for anything else, an empty field too."""
    if text.strip(_NUMBER_CHARACTERS):  # float() also reads "nan", "inf", "1_000" and other scripts' digits
        return float("nan")
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _diagnose(data: bytes, rules: Sequence[Rule]) -> list[tuple[int, int, str]]:
    """Faults line by line: slow, and only for rows known to have one."""
    array = np.frombuffer(data, np.uint8)
    starts, ends = split_rows(array)
    opens_s, stamped = parse_stamps(array, starts)
    faults: dict[int, str] = {}
    values: FloatArray = np.ones((len(starts), 5))
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        fields = data[start:end].decode("latin-1").split(",")
        if not stamped[i]:
            faults[i] = "no timestamp like 2024-01-02T14:30:00Z"
        elif len(fields) != 6:
            faults[i] = f"{len(fields)} fields instead of 6"
        else:
            values[i] = [parse_number(field) for field in fields[1:]]
    by_rule = find_faults(BarArrays(opens_s * 1_000_000, *values.T), rules)
    faults = {**{i: why for i, why in by_rule.items() if i not in faults}, **faults}
    good = [i for i in range(len(starts)) if i not in faults]
    for before, i in pairwise(good):
        if opens_s[i] <= opens_s[before]:
            faults[i] = (
                "same timestamp as the row before" if opens_s[i] == opens_s[before] else "earlier than the row before"
            )
    return [(i, int(starts[i]), why) for i, why in sorted(faults.items())]
