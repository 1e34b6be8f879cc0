"""Bars from a CSV of another program: which columns, which format of time, which rows are good.

Pure: bytes in, bars and the list of dropped rows out. `settle.py` keeps the original and writes the result. Layouts seen in
practice: docs/ib_facts.md, 10. Read line by line with the standard csv module and not with pandas.read_csv, which guesses
zones and number formats and cannot name the bad line.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import numpy as np

from ktrdr_pipelines.bars.schema import COLUMNS, BarArrays, bars_from_columns, find_faults, rules_for
from ktrdr_pipelines.domain.arrays import BoolArray, FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.csv_format import RowFault, parse_number
from ktrdr_pipelines.store.foreign_hours import Judge, why_outside

if TYPE_CHECKING:
    import pandas as pd

_STAMP_NAMES = ("timestamp", "datetime", "date", "time", "")
"""Headers over the stamps, best first. An empty one counts only over the first column (a pandas index)."""

_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?)\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
_HALF_SECOND: Final = re.compile(r"[.,]0*[1-9]")


@dataclass(frozen=True, slots=True)
class AdoptedRows:
    """The content of a foreign file."""

    bars: pd.DataFrame
    """The good rows: sorted, unique, valid."""
    dropped: tuple[RowFault, ...]
    """The bad rows with their line numbers."""
    notices: tuple[str, ...]
    """Corrections that lost nothing: columns left out, rows sorted, equal duplicates."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions of the six columns; ``volume`` is -1 when the file has none."""

    stamp: int
    prices: tuple[int, int, int, int]
    volume: int
    ignored: tuple[str, ...]


class _NaiveStamp(Exception):
    """An intraday stamp without a zone."""


def read_foreign(
    data: bytes,
    series: Series,
    name: str,
    *,
    assume_utc: bool = False,
    last_complete_s: int | None = None,
    outside: Judge | None = None,
) -> AdoptedRows:
    """The bars in ``data``, the content of the file ``name``.

    Headers in any case and order, extra columns left out; stamps in ISO form with a space or a ``T``, with an offset, ``Z``, or
    bare dates; CRLF, a byte-order mark, blank lines, a missing last newline and any order of rows are fine. Intraday stamps
    without a zone are refused unless ``assume_utc``: a guessed zone shifts the whole file. For daily and longer bars the
    date as written is the session date, in whatever zone its midnight is.

    ``last_complete_s`` (epoch seconds) is the last open whose bar is certainly complete; later ones are dropped: a forming bar
    would stay wrong, and after one of the future the tail would find nothing missing. ``outside`` marks the opens that the
    series cannot have (`foreign_hours.py`); those bars are dropped too.

    Rows that break the rules are dropped and reported; of two different bars with one stamp neither is kept.

    Raises:
        DataError: no bar file, stamps without a zone or of another one, or no good row.
    """
    doing = f"adopting {name} as {series}"
    text = _decode(data, name, doing)
    lines = _Lines(text)
    reader = csv.reader(lines)
    header = _read_header(reader, name, doing)
    layout = _find_layout(header, name, doing)
    rows = _Rows()
    for line, fields in _number_rows(reader, lines):
        _read_row(rows, line, fields, layout, len(header), series, assume_utc=assume_utc, name=name, doing=doing)
    if not rows.lines and rows.faults:
        first = rows.faults[0]
        raise DataError(
            f"{name} holds no usable bar; {first}",
            rows="\n".join(str(fault) for fault in rows.faults[:10]),
            doing=doing,
            advice=f"The file was left alone. Correct it, or move it away; the normal header is {','.join(COLUMNS)}.",
        )
    strays = _find_strays(rows, outside, name, doing, assume_utc=assume_utc)
    return _settle_rows(rows, layout, series, lines, name, doing, last_complete_s, strays)


def _find_strays(rows: _Rows, outside: Judge | None, name: str, doing: str, *, assume_utc: bool) -> list[int]:
    """The rows that the calendar has no room for.

    Raises:
        DataError: they are most rows, and ``assume_utc`` was given: the stamps are of another zone, and the rest would be kept
            at wrong times.
    """
    if outside is None:
        return []
    strays = np.flatnonzero(outside(np.array(rows.opens_s, dtype=np.int64))).tolist()
    if assume_utc and rows.naive and len(strays) * 2 > len(rows.lines):
        raise DataError(
            f"{name}: {len(strays):,} of {len(rows.lines):,} bars lie outside the trading hours if their stamps are UTC",
            doing=doing,
            advice="The file was left alone: its stamps are of another zone. Write them with their offset, such as "
            "2024-01-02 09:30:00-05:00, or as UTC.",
        )
    return strays


class _Lines:
    """Physical lines in order; any of them by number, for reports."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._all: list[str] = []
        self.number = 0
        self.is_blank = False

    def __iter__(self) -> Iterator[str]:
        for line in io.StringIO(self._text, newline="\n"):
            self.number += 1
            self.is_blank = not line.strip()
            # A quote could join a field with the lines after it; numbers and stamps need none.
            yield line.rstrip("\r\n").replace('"', "")

    def __getitem__(self, number: int) -> str:
        self._all = self._all or self._text.split("\n")
        return self._all[number - 1].rstrip("\r")[:200]


class _Rows:
    """Columns under construction; compact, since a file may have millions of rows."""

    def __init__(self) -> None:
        self.lines = array("q")
        self.opens_s = array("q")
        self.values = array("d")
        self.naive = 0
        self.faults: list[RowFault] = []


def _decode(data: bytes, name: str, doing: str) -> str:
    advice = "The file was left alone. Move it away, or replace it by a CSV of bars."
    if b"\0" in data[:4096].split(b"\n", 1)[0]:  # later NULs are the bad rows that a crash of the machine leaves
        raise DataError(f"{name} is not a text file", doing=doing, advice=advice)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise DataError(f"{name} line {line} is not UTF-8 text", doing=doing, advice=advice) from None
    if text.lstrip()[:1] in ("<", "{", "["):
        kind = "an HTML or XML page" if text.lstrip()[:1] == "<" else "JSON"
        raise DataError(f"{name} line 1 looks like {kind}, not a CSV of bars", doing=doing, advice=advice)
    return text if "\r" not in text or "\n" in text else text.replace("\r", "\n")


def _read_header(reader: Iterator[list[str]], name: str, doing: str) -> list[str]:
    for fields in reader:
        if any(field.strip() for field in fields):
            return [field.strip() for field in fields]
    raise DataError(f"{name} is empty", doing=doing, advice="Remove the file and run it again.")


def _find_layout(header: Sequence[str], name: str, doing: str) -> _Layout:
    names = [field.lower() for field in header]

    def position(wanted: str) -> int:
        found = [i for i, field in enumerate(names) if field == wanted]
        if len(found) > 1:
            raise DataError(
                f"{name} line 1 has {len(found)} columns called {wanted}",
                doing=doing,
                advice="Remove all but one of them.",
            )
        return found[0] if found else -1

    stamp = -1
    for candidate in _STAMP_NAMES:
        stamp = (0 if names[0] == "" else -1) if candidate == "" else position(candidate)
        if stamp >= 0:
            break
    prices = tuple(position(price) for price in COLUMNS[1:5])
    absent = [price for price, at in zip(COLUMNS[1:5], prices, strict=True) if at < 0]
    if stamp < 0:
        absent.insert(0, "timestamp")
    if absent:
        raise DataError(
            f"{name} line 1 has no column {', '.join(absent)}: {','.join(header)[:120]}",
            doing=doing,
            advice=f"The file was left alone. If it holds bars, give it the header {','.join(COLUMNS)}; else move it away.",
        )
    volume = position("volume")
    used = {stamp, volume, *prices}
    ignored = tuple(field or "(no name)" for i, field in enumerate(header) if i not in used)
    return _Layout(stamp, (prices[0], prices[1], prices[2], prices[3]), volume, ignored)


def _number_rows(reader: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a field beyond the csv module's limit: reported as a bad line
            fields = []
        if fields or not lines.is_blank:
            yield lines.number, fields


def _read_row(
    rows: _Rows,
    line: int,
    fields: Sequence[str],
    layout: _Layout,
    width: int,
    series: Series,
    *,
    assume_utc: bool,
    name: str,
    doing: str,
) -> None:
    text = ",".join(fields)[:200]
    if len(fields) != width:
        rows.faults.append(RowFault(line, text, f"{len(fields)} fields where the header has {width}"))
        return
    try:
        open_s = read_stamp(
            fields[layout.stamp].strip(), is_intraday=series.timeframe.is_intraday, assume_utc=assume_utc
        )
    except _NaiveStamp:
        raise DataError(
            f"{name} line {line}: the timestamp {fields[layout.stamp]!r} has no time zone",
            doing=doing,
            advice="The file was left alone, since a guessed zone would shift all its bars. "
            "If its stamps are UTC, adopt it with --assume-utc.",
        ) from None
    except ValueError as failure:
        rows.faults.append(RowFault(line, text, str(failure)))
        return
    rows.naive += assume_utc and series.timeframe.is_intraday and not has_zone(fields[layout.stamp].strip())
    numbers = [parse_number(fields[at].strip()) for at in layout.prices]
    volume = 0.0 if layout.volume < 0 else _read_volume(fields[layout.volume].strip(), series)
    rows.lines.append(line)
    rows.opens_s.append(open_s)
    rows.values.extend((*numbers, volume))


def _read_volume(text: str, series: Series) -> float:
    """IB's -1, and an empty field where the kind has no volume, mean no volume: 0."""
    if not text and not series.instrument.has_volume:
        return 0.0
    volume = parse_number(text)
    return 0.0 if volume == -1 else volume


def has_zone(text: str) -> bool:
    """True if the stamp ``text`` includes its zone."""
    match = _STAMP.fullmatch(text)
    return match is not None and match[3] is not None


def read_stamp(text: str, *, is_intraday: bool, assume_utc: bool) -> int:
    """Epoch seconds of a stamp in ISO form; see `read_foreign`.

    Raises:
        ValueError: no stamp, not a whole second, or a daily bar that is not at a midnight; the text is the reason.
    """
    match = _STAMP.fullmatch(text)
    if not match:
        raise ValueError("no timestamp like 2024-01-02T14:30:00Z")
    day, clock, zone = match.groups()
    try:
        instant = datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone or ''}")
    except ValueError:
        raise ValueError("no such time") from None
    if clock and _HALF_SECOND.search(clock):
        raise ValueError("the timestamp is no whole second")
    if not is_intraday:
        if (instant.hour, instant.minute, instant.second) != (0, 0, 0):
            raise ValueError("a daily or longer bar carries its session's date, without a time of day")
        return int(instant.replace(tzinfo=UTC).timestamp())
    if instant.tzinfo is None:
        if not assume_utc:
            raise _NaiveStamp
        instant = instant.replace(tzinfo=UTC)
    return int(instant.timestamp())


def _settle_rows(
    rows: _Rows,
    layout: _Layout,
    series: Series,
    lines: _Lines,
    name: str,
    doing: str,
    last_complete_s: int | None,
    strays: Sequence[int],
) -> AdoptedRows:
    numbers = np.array(rows.lines, dtype=np.int64)
    opens_s = np.array(rows.opens_s, dtype=np.int64)
    values = np.array(rows.values, dtype=np.float64).reshape(-1, 5)
    notices = []
    if layout.ignored:
        notices.append(f"columns left out: {', '.join(layout.ignored)}")
    if layout.volume < 0:
        notices.append("no volume column: volume is 0")
    faults = dict.fromkeys(strays, why_outside(series))
    faults |= find_faults(BarArrays(opens_s * 1_000_000, *values.T), rules_for(series))
    if last_complete_s is not None:
        late = np.flatnonzero(opens_s > last_complete_s).tolist()
        faults = {**dict.fromkeys(late, "the bar is not complete yet"), **faults}
    rows.faults += [RowFault(int(numbers[i]), lines[int(numbers[i])], why) for i, why in faults.items()]
    good = np.ones(len(opens_s), np.bool_)
    good[list(faults)] = False
    numbers, opens_s, values = numbers[good], opens_s[good], values[good]

    if (np.diff(opens_s) < 0).any():
        notices.append("rows were not in order: sorted")
    order = np.argsort(opens_s, kind="stable")
    numbers, opens_s, values = numbers[order], opens_s[order], values[order]
    keep, duplicates = _resolve_duplicates(rows, numbers, opens_s, values, lines)
    if duplicates:
        notices.append(f"{duplicates} equal duplicates removed")
    dropped = tuple(sorted(rows.faults, key=lambda fault: fault.line))
    if dropped and not keep.any():
        raise DataError(
            f"{name} holds no usable bar; {dropped[0]}",
            rows="\n".join(str(fault) for fault in dropped[:10]),
            doing=doing,
            advice="The file was left alone. Correct it, or move it away.",
        )
    return AdoptedRows(bars_from_columns(opens_s[keep], *values[keep].T), dropped, tuple(notices))


def _resolve_duplicates(
    rows: _Rows, numbers: IntArray, opens_s: IntArray, values: FloatArray, lines: _Lines
) -> tuple[BoolArray, int]:
    """Which of the sorted rows to keep, one of each stamp, and how many equal ones that leaves out.

    Of different bars with one stamp none is kept; each becomes a fault of ``rows``.
    """
    group_starts = np.flatnonzero(np.diff(opens_s, prepend=opens_s[:1] - 1))
    group_ends = np.append(group_starts[1:], len(opens_s))
    keep = np.zeros(len(opens_s), np.bool_)
    keep[group_starts] = True
    duplicates = 0
    for group in np.flatnonzero(group_ends - group_starts > 1).tolist():
        start, end = int(group_starts[group]), int(group_ends[group])
        if (values[start:end] == values[start]).all():
            duplicates += end - start - 1
            continue
        keep[start] = False
        same = numbers[start:end].tolist()
        for number in same:
            others = ", ".join(str(n) for n in same if n != number)
            rows.faults.append(RowFault(number, lines[number], f"another bar has the same timestamp (line {others})"))
    return keep, duplicates
