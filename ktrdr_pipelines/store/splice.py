"""New rows in a large sorted CSV.

After the last row they are appended in place, which costs what they cost. Anything else is spliced into a copy, which takes the
file's name: only the touched range is parsed, head and tail of the old file are copied as bytes. Works on open files and
`atomic.Disk`; who may write is in `locks.py`. Why not pandas or polars: reading, merging and writing a file of two million rows
takes them 1 to 12 s and 0.6 to 1 GB (docs/dependencies.md; `benchmarks/bench_splice.py` measures it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktrdr_pipelines.bars.merging import Merged, merge_bars
from ktrdr_pipelines.bars.schema import Rule, opens_of
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.store.atomic import Disk, FileRange, SourceChanged, append_to_file, replace_file, state_of
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile, parse_rows, render_rows
from ktrdr_pipelines.store.csv_scan import find_row, first_and_last_open, read_range
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.partition_marks import extend_marks, mark_range
from ktrdr_pipelines.store.sidecar import PartitionMark

if TYPE_CHECKING:
    import pandas as pd


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
    recorded: Mapping[str, PartitionMark] | None = None,
) -> Spliced:
    """Merge ``bars`` (valid, not empty) into the CSV at ``path``, creating it when there is none or an empty one.

    The file is touched only when a byte of it changes, and appended to where that is enough. ``is_settled`` is true for the state
    in which the file was settled: in any other nothing is built, else an edit of that moment would pass for our own write.
    ``compare`` is checked before anything is built. ``whole``: no held bar may stay. ``recorded``: the marks of the settled
    file; they spare an append to read its partition again.

    Raises:
        MalformedFile: a row that was read is not as we write it.
        SourceChanged: another program changed the file meanwhile; nothing was written, or only rows of ``bars`` were appended.
        LeavesOldBars: ``whole``, and a held bar is not in ``bars``; nothing was written.
        OSError: the disk refuses; nothing was written.
        KtrdrError: what ``compare`` raises; nothing was written.
    """
    opens_s = opens_of(bars)
    span = int(opens_s[0]), int(opens_s[-1])
    target = _Target(disk, path, timeframe)
    with _open_settled(path, is_settled) as (source, before):
        if source is None or before is None:
            merged = merge_bars(bars.iloc[:0], bars, held_wins=held_wins)
            return target.replace(merged, before, [HEADER, render_rows(merged.bars)], span)
        place = _find_place(source, before.size, *span)
        around = _read_around(source, place, rules, compare)
        held_s = opens_of(around)
        held = around[(held_s >= span[0]) & (held_s <= span[1])].reset_index(drop=True)
        merged = merge_bars(held, bars, held_wins=held_wins)
        if whole and (place.low > len(HEADER) or place.high < place.size or len(merged.bars) > len(bars)):
            raise LeavesOldBars
        is_revised = not (held_wins or merged.revised_to.empty)
        if not merged.added and not is_revised:
            return Spliced(merged, before, mark_range(source, timeframe, *span))
        if not is_revised and place.is_extended_by(merged, len(held)):
            spliced = target.append(merged, before, len(held), place, recorded or {})
            if spliced is not None:
                return spliced
        rows = render_rows(merged.bars)
        head, tail = FileRange(source, 0, place.low), FileRange(source, place.high, place.size)
        parts: list[bytes | FileRange] = [head, rows, tail]
        return target.replace(merged, before, parts, span)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where new bars belong in a CSV of ``size`` bytes: in place of its rows from ``low`` to ``high`` (offsets)."""

    low: int
    high: int
    size: int
    last_s: int | None
    """The open of the last bar in the file, epoch seconds."""

    def is_extended_by(self, merged: Merged, held: int) -> bool:
        """True if the ``held`` bars of this place come first among the merged ones: the others follow the last row."""
        return self.high == self.size and (
            not held or int(opens_of(merged.bars.iloc[held - 1 : held])[0]) == self.last_s
        )


def _find_place(fd: int, size: int, first_s: int, last_s: int) -> _Place:
    """The place of bars that open from ``first_s`` to ``last_s``. Most come after the last row, which is looked at first."""
    ends = first_and_last_open(fd, size)
    if ends is None or ends[1] < first_s:
        return _Place(size, size, size, ends[1] if ends else None)
    high = size if ends[1] <= last_s else find_row(fd, size, last_s + 1)
    return _Place(find_row(fd, size, first_s), high, size, ends[1])


@dataclass(frozen=True, slots=True)
class _Target:
    """The CSV of a splice."""

    disk: Disk
    path: Path
    timeframe: Timeframe

    def append(
        self, merged: Merged, before: FileState, held: int, place: _Place, recorded: Mapping[str, PartitionMark]
    ) -> Spliced | None:
        """The bars of ``merged`` after the first ``held`` ones at the end of the file; None where it can only be replaced."""
        new = merged.bars.iloc[held:]
        rows, opens_s = render_rows(new), opens_of(new)
        state = append_to_file(self.disk, self.path, before, rows)
        if state is None:
            return None
        marks = extend_marks(recorded, self.timeframe, place.last_s, opens_s, rows)
        if marks is None:
            with _open_settled(self.path, lambda found: found == state) as (fd, _):
                assert fd is not None
                marks = mark_range(fd, self.timeframe, int(opens_s[0]), int(opens_s[-1]))
        return Spliced(merged, state, marks)

    def replace(
        self, merged: Merged, before: FileState | None, parts: Sequence[bytes | FileRange], span: tuple[int, int]
    ) -> Spliced:
        """A new file of ``parts``, in which the partitions from ``span[0]`` to ``span[1]`` have changed."""
        found: list[dict[str, PartitionMark]] = []
        state = replace_file(
            self.disk,
            self.path,
            parts,
            still_valid=lambda: state_of(self.path) == before,
            examine=lambda fd: found.append(mark_range(fd, self.timeframe, *span)),
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


def _read_around(fd: int, place: _Place, rules: Sequence[Rule], compare: Comparison | None) -> pd.DataFrame:
    """The held bars of a place and those of ``compare``, in one read."""
    low, high = place.low, place.high
    if compare is not None and place.last_s is not None and compare.first_s <= place.last_s:
        low = min(low, find_row(fd, place.size, compare.first_s))
        high = max(high, find_row(fd, place.size, compare.last_s + 1))
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
            place = _find_place(source, state.size, compare.first_s, compare.last_s)
            _read_around(source, place, rules, compare)
        return Spliced(merged, state, {})
