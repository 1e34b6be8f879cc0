"""Putting new rows into the middle of a large sorted CSV, and marking its partitions.

Only the touched range is parsed: head and tail of the old file are copied as bytes. Works on open files and `atomic.Disk`; who
may write, and what is remembered about it, is in `store.py`. Why not pandas or polars: reading, merging and writing a
file of two million rows takes them 1 to 12 s and 0.6 to 1 GB (`docs/dependencies.md`; `benchmarks/bench_splice.py` measures it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.merging import Merged, merge_bars
from ktrdr_pipelines.bars.schema import Rule, opens_of
from ktrdr_pipelines.domain.partitions import partition_at
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.store.atomic import Disk, FileRange, FileState, SourceChanged, replace_file, state_of
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    MalformedFile,
    checksum,
    count_lines,
    find_row,
    parse_rows,
    read_range,
    render_rows,
    scan_opens,
)
from ktrdr_pipelines.store.sidecar import PartitionMark


class LeavesOldBars(Exception):
    """The new bars were to replace all that is held, and lack some of it; nothing was written."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What has to be seen of the held bars before anything is written: those that open from ``first_s`` to ``last_s``, both
    included (epoch seconds), are given to ``check``, which raises when the new bars do not go with them."""

    first_s: int
    last_s: int
    check: Callable[[pd.DataFrame], None]


@dataclass(frozen=True, slots=True)
class Spliced:
    """What a splice did. ``state`` is the file's state afterwards, None when there is no file."""

    merged: Merged
    state: FileState | None
    marks: dict[str, PartitionMark]
    """Every partition the new bars fall into, as it is now."""
    held_in_window: int


def splice_bars(
    disk: Disk,
    path: Path,
    bars: pd.DataFrame,
    timeframe: Timeframe,
    rules: Sequence[Rule],
    *,
    window: Window | None,
    is_settled: Callable[[FileState | None], bool],
    compare: Comparison | None = None,
    held_wins: bool = False,
    whole: bool = False,
) -> Spliced:
    """Merge ``bars`` (valid, not empty) into the CSV at ``path``, creating it when there is none or an empty one.

    The file is replaced only when a byte of it changes. ``held_in_window`` counts the rows of ``window`` afterwards.
    ``is_settled`` is true for the state of the file that was looked at: on any other nothing is built, else an edit of that
    moment would pass for our own work. ``compare`` is checked before anything is built. ``whole``: no held bar may stay.

    Raises:
        MalformedFile: a row that was looked at is none of ours.
        SourceChanged: another program changed the file meanwhile; nothing was written.
        LeavesOldBars: ``whole``, and ``bars`` lack a held one; nothing was written.
        OSError: the disk refuses; nothing was written.
        KtrdrError: what ``compare`` raises; nothing was written.
    """
    opens_s = opens_of(bars)
    first_s, last_s = int(opens_s[0]), int(opens_s[-1])
    try:
        source: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        source = None
    try:
        before = None if source is None else FileState.of(os.fstat(source))
        if not is_settled(before):
            raise SourceChanged
        size = before.size if before else 0
        low, high, held = 0, 0, bars.iloc[:0]
        if source is not None and size:
            low, high = find_row(source, size, first_s), find_row(source, size, last_s + 1)
            around = _read_around(source, size, low, high, rules, compare)
            held_s = opens_of(around)
            held = around[(held_s >= first_s) & (held_s <= last_s)].reset_index(drop=True)
        merged = merge_bars(held, bars, held_wins=held_wins)
        if whole and size and (low > len(HEADER) or high < size or len(merged.bars) > len(bars)):
            raise LeavesOldBars
        counted: list[int] = []
        marks: dict[str, PartitionMark] = {}

        def examine(fd: int) -> None:
            new_size = os.fstat(fd).st_size
            start = find_row(fd, new_size, partition_at(timeframe, _instant(first_s)).window.start_s)
            end = find_row(fd, new_size, partition_at(timeframe, _instant(last_s)).window.end_s)
            marks.update(mark_partitions(fd, timeframe, start, end))
            if window is not None:
                counted.append(count_rows(fd, new_size, window))

        if source is not None and size and not merged.added and (held_wins or merged.revised_to.empty):
            examine(source)
            return Spliced(merged, before, marks, sum(counted))
        rows = render_rows(merged.bars)
        if source is None or not size:
            parts: list[bytes | FileRange] = [HEADER, rows]
        else:
            parts = [FileRange(source, 0, low), rows, FileRange(source, high, size)]
        state = replace_file(disk, path, parts, still_valid=lambda: state_of(path) == before, examine=examine)
        return Spliced(merged, state, marks, sum(counted))
    finally:
        if source is not None:
            os.close(source)


def _read_around(
    fd: int, size: int, low: int, high: int, rules: Sequence[Rule], compare: Comparison | None
) -> pd.DataFrame:
    """The held bars between two offsets and those that ``compare`` wants to see, in one read."""
    if compare is not None:
        low = min(low, find_row(fd, size, compare.first_s))
        high = max(high, find_row(fd, size, compare.last_s + 1))
    around, faults = parse_rows(read_range(fd, low, high), rules)
    if faults:
        raise MalformedFile(faults[0][2], low + faults[0][1])
    if compare is not None:
        compare.check(around)
    return around


def splice_nothing(
    path: Path,
    bars: pd.DataFrame,
    window: Window | None,
    rules: Sequence[Rule],
    *,
    is_settled: Callable[[FileState | None], bool],
    compare: Comparison | None = None,
) -> Spliced:
    """What a splice of the empty table ``bars`` amounts to: nothing changes, the rows of ``window`` are counted.

    Raises:
        SourceChanged: the file is not the one that was looked at.
    """
    merged = merge_bars(bars, bars)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if not is_settled(None):
            raise SourceChanged from None
        return Spliced(merged, None, {}, 0)
    try:
        state = FileState.of(os.fstat(fd))
        if not is_settled(state):
            raise SourceChanged
        if compare is not None and state.size:
            start = find_row(fd, state.size, compare.first_s)
            _read_around(fd, state.size, start, start, rules, compare)
        return Spliced(merged, state, {}, count_rows(fd, state.size, window) if window and state.size else 0)
    finally:
        os.close(fd)


def count_rows(fd: int, size: int, window: Window) -> int:
    """Rows of ``window`` in a sorted file."""
    return count_lines(fd, find_row(fd, size, window.start_s), find_row(fd, size, window.end_s))


def mark_partitions(fd: int, timeframe: Timeframe, start: int, end: int) -> dict[str, PartitionMark]:
    """Rows and checksum of each partition between two offsets, which must be bounds of partitions.

    Raises:
        MalformedFile: a line does not begin with a stamp, or stamps do not strictly increase.
    """
    return mark_located(fd, locate_partitions(fd, timeframe, start, end))


def mark_located(fd: int, places: Mapping[str, tuple[int, int, int]]) -> dict[str, PartitionMark]:
    """The marks of partitions found by `locate_partitions`."""
    return {key: PartitionMark(rows=rows, crc32=checksum(fd, low, high)) for key, (rows, low, high) in places.items()}


def locate_partitions(fd: int, timeframe: Timeframe, start: int, end: int) -> dict[str, tuple[int, int, int]]:
    """Partition key -> rows, first offset, end offset; otherwise like `mark_partitions`."""
    found: dict[str, tuple[int, int, int]] = {}
    for opens_s, offsets in scan_opens(fd, start, end):
        i = 0
        while i < len(opens_s):
            partition = partition_at(timeframe, _instant(int(opens_s[i])))
            j = int(np.searchsorted(opens_s, partition.window.end_s))
            rows, low, _ = found.get(partition.key, (0, int(offsets[i]), 0))
            found[partition.key] = (rows + j - i, low, end)
            i = j
    if not found:
        return {}  # a header and no row
    bounds = [*[low for _, low, _ in found.values()][1:], end]
    return {key: (rows, low, high) for (key, (rows, low, _)), high in zip(found.items(), bounds, strict=True)}


def _instant(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)
