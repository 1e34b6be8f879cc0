"""New rows in the middle of a large sorted CSV, and the marks of its partitions.

Only the touched range is parsed: head and tail of the old file are copied as bytes. Works on open files and `atomic.Disk`;
who may write is in `locks.py`. Why not pandas or polars: reading, merging and writing a file of two million rows takes them 1
to 12 s and 0.6 to 1 GB (docs/dependencies.md; `benchmarks/bench_splice.py` measures it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.merging import Merged, merge_bars
from ktrdr_pipelines.bars.schema import Rule, opens_of
from ktrdr_pipelines.domain.partitions import partition_at
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.store.atomic import Disk, FileRange, SourceChanged, replace_file, state_of
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    MalformedFile,
    checksum,
    find_row,
    parse_rows,
    read_range,
    render_rows,
    scan_opens,
)
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.sidecar import PartitionMark


class LeavesOldBars(Exception):
    """The new bars were to replace all held ones, and some held bar is not among them; nothing was written."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A check of held bars before a write: ``check`` gets those that open from ``first_s`` to ``last_s``, both included (epoch
    seconds), and raises when the new bars must not be mixed with them."""

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


def splice_bars(
    disk: Disk,
    path: Path,
    bars: pd.DataFrame,
    timeframe: Timeframe,
    rules: Sequence[Rule],
    *,
    is_settled: Callable[[FileState | None], bool],
    compare: Comparison | None = None,
    held_wins: bool = False,
    whole: bool = False,
) -> Spliced:
    """Merge ``bars`` (valid, not empty) into the CSV at ``path``, creating it when there is none or an empty one.

    The file is replaced only when a byte of it changes. ``is_settled`` is true for the state in which the file was settled: in
    any other nothing is built, else an edit of that moment would pass for our own write. ``compare`` is checked before anything
    is built. ``whole``: no held bar may stay.

    Raises:
        MalformedFile: a row that was read is not as we write it.
        SourceChanged: another program changed the file meanwhile; nothing was written.
        LeavesOldBars: ``whole``, and a held bar is not in ``bars``; nothing was written.
        OSError: the disk refuses; nothing was written.
        KtrdrError: what ``compare`` raises; nothing was written.
    """
    opens_s = opens_of(bars)
    first_s, last_s = int(opens_s[0]), int(opens_s[-1])
    with _open_settled(path, is_settled) as (source, before):
        low, high, held = 0, 0, bars.iloc[:0]
        size = before.size if before else 0
        if source is not None:
            low, high = find_row(source, size, first_s), find_row(source, size, last_s + 1)
            around = _read_around(source, size, low, high, rules, compare)
            held_s = opens_of(around)
            held = around[(held_s >= first_s) & (held_s <= last_s)].reset_index(drop=True)
        merged = merge_bars(held, bars, held_wins=held_wins)
        if whole and source is not None and (low > len(HEADER) or high < size or len(merged.bars) > len(bars)):
            raise LeavesOldBars
        if source is not None and not merged.added and (held_wins or merged.revised_to.empty):
            return Spliced(merged, before, _mark_range(source, timeframe, first_s, last_s))
        rows = render_rows(merged.bars)
        if source is None:
            parts: list[bytes | FileRange] = [HEADER, rows]
        else:
            parts = [FileRange(source, 0, low), rows, FileRange(source, high, size)]
        found: list[dict[str, PartitionMark]] = []
        state = replace_file(
            disk,
            path,
            parts,
            still_valid=lambda: state_of(path) == before,
            examine=lambda fd: found.append(_mark_range(fd, timeframe, first_s, last_s)),
        )
        return Spliced(merged, state, found[0])


@contextmanager
def _open_settled(
    path: Path, is_settled: Callable[[FileState | None], bool]
) -> Iterator[tuple[int | None, FileState | None]]:
    """A descriptor of the CSV (None when there is no file or an empty one) and its state (None without a file).

    Raises:
        SourceChanged: the file is not in the state in which it was settled.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if not is_settled(None):
            raise SourceChanged from None
        yield None, None
        return
    try:
        state = FileState.of(os.fstat(fd))
        if not is_settled(state):
            raise SourceChanged
        yield (fd if state.size else None), state
    finally:
        os.close(fd)


def _mark_range(fd: int, timeframe: Timeframe, first_s: int, last_s: int) -> dict[str, PartitionMark]:
    """The marks of the partitions from ``first_s`` to ``last_s`` (opens of bars, epoch seconds)."""
    size = os.fstat(fd).st_size
    start = find_row(fd, size, partition_at(timeframe, _instant(first_s)).window.start_s)
    end = find_row(fd, size, partition_at(timeframe, _instant(last_s)).window.end_s)
    return mark_partitions(fd, timeframe, start, end)


def _read_around(
    fd: int, size: int, low: int, high: int, rules: Sequence[Rule], compare: Comparison | None
) -> pd.DataFrame:
    """The held bars between two offsets and those of ``compare``, in one read."""
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
    rules: Sequence[Rule],
    *,
    is_settled: Callable[[FileState | None], bool],
    compare: Comparison | None = None,
) -> Spliced:
    """The splice of the empty table ``bars``: held bars are compared, nothing changes.

    Raises:
        SourceChanged: the file is not in the state in which it was settled.
    """
    merged = merge_bars(bars, bars)
    with _open_settled(path, is_settled) as (source, state):
        if source is None or state is None:
            return Spliced(merged, state, {})
        if compare is not None:
            start = find_row(source, state.size, compare.first_s)
            _read_around(source, state.size, start, start, rules, compare)
        return Spliced(merged, state, {})


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
