"""Repair of a series' files after other programs: foreign CSVs, edited ones, lost or broken sidecars.

`settle` is the first step of each write and of each load: afterwards the CSV is a normal one and the sidecar claims no more
than it holds. How a foreign file is read is in `foreign.py`. Everything here runs under the write lock of the series.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ktrdr_pipelines.bars.schema import latest_complete_open_s, rules_for
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.atomic import (
    SourceChanged,
    cut_unfinished_line,
    end_of_lines,
    keep_copy,
    replace_file,
    state_of,
)
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile, RowFault, parse_rows, render_file, render_stamps
from ktrdr_pipelines.store.csv_scan import first_and_last_open, read_range, scan_opens
from ktrdr_pipelines.store.foreign import read_foreign
from ktrdr_pipelines.store.foreign_hours import Judge, is_outside, is_overlapping, why_outside
from ktrdr_pipelines.store.partition_marks import has_recorded_start, locate_partitions, mark_located, only_grown
from ktrdr_pipelines.store.paths import SeriesFiles, opened
from ktrdr_pipelines.store.sidecar import FileMark, PartitionMark, Sidecar, UnreadableSidecar
from ktrdr_pipelines.store.sidecar_cache import SidecarCache
from ktrdr_pipelines.store.sidecar_claims import partition_windows, withdraw_all, withdraw_partitions

logger = logging.getLogger(__name__)

_CHECK_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Adopted:
    """A foreign or edited file that became a normal one."""

    rows: int
    dropped: tuple[RowFault, ...]
    """Bad rows with their lines, left out: the next load requests those bars."""
    notices: tuple[str, ...]
    """Corrections that lost nothing."""
    backup: Path | None
    """The original; None when the file was normal already, or is another file and was left where it is."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What had to be corrected before a series could be used. All fields are empty for files that nothing else touched."""

    adopted: Adopted | None = None
    corrupt_sidecar: Path | None = None
    """The copy of the unreadable sidecar; a new one was built from the CSV."""
    changed_partitions: tuple[str, ...] = ()
    """Partitions whose rows are not those of the last write: bars that are missing there are requested again."""
    notices: tuple[str, ...] = ()
    """What else was found."""
    csv_gone: bool = False
    """The sidecar lists bars, but there is no CSV: all of them are missing."""

    def changed_windows(self, timeframe: Timeframe) -> tuple[Window, ...]:
        """Where bars may have gone: the changed partitions; all time when the CSV is gone, adopted, or its sidecar is new."""
        if self.csv_gone or self.adopted is not None or self.corrupt_sidecar is not None:
            return (Window(datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)),)
        return partition_windows(timeframe, self.changed_partitions)

    def describe(self) -> list[str]:
        """One sentence for each correction, for users."""
        lines = []
        if (adopted := self.adopted) is not None:
            kept = f"; the original is {adopted.backup}" if adopted.backup else ""
            lines.append(f"adopted a CSV of another program: {adopted.rows} rows, {len(adopted.dropped)} refused{kept}")
            lines += [str(fault) for fault in adopted.dropped[:5]] + list(adopted.notices)
        if self.corrupt_sidecar is not None:
            lines.append(f"replaced an unreadable sidecar by a new one; the old one is {self.corrupt_sidecar}")
        if self.changed_partitions:
            lines.append(f"the CSV was edited since the last load: {', '.join(self.changed_partitions)}")
        lines += self.notices
        if self.csv_gone:
            lines.append("the CSV is gone: all of its bars are missing")
        return lines


def settle(
    sidecars: SidecarCache,
    series: Series,
    now: datetime,
    doing: str,
    *,
    assume_utc: bool = False,
    recheck: bool = False,
    made_elsewhere: bool = False,
) -> tuple[Sidecar, Prepared]:
    """Make the CSV of ``series`` a normal one and its sidecar true to it; the sidecar, and what had to be done.

    Costs two looks at file states when nothing else touched the files, unless ``recheck`` demands that they are read.

    A CSV without a sidecar was made by something else, and its bars are compared with the calendar (`foreign_hours.py`). If it
    is formatted exactly as ours are, it may be ours and have lost its sidecar, which must never cost a bar: then only bars
    that would be held twice are removed, unless the user declared that it was ``made_elsewhere``.

    Raises:
        DataError: the CSV is no bar file; it was left alone.
        StoreError: a newer program wrote the sidecar.
        OSError: the disk refuses.
    """
    files = sidecars.files
    sidecar, corrupt = _load_or_replace(sidecars, series, now, doing)
    state = state_of(files.csv(series))
    if corrupt is None and not recheck and sidecar.is_written_for(state):
        return sidecar, Prepared()
    if state is None or not state.size:
        is_gone = bool(sidecar.partitions)
        if is_gone:
            logger.warning("%s is gone: all of its bars are missing", files.csv(series))
            sidecar = withdraw_all(sidecar)
        sidecars.save(series, sidecar)
        return sidecar, Prepared(corrupt_sidecar=corrupt, csv_gone=is_gone)
    notices = _cut_unfinished_line(files, series, sidecar)
    is_first_use = corrupt is None and sidecar.file is None and not sidecar.partitions
    checked, strays = _check_csv(files, series, sidecar, now), _Strays()
    if is_first_use and checked is not None:
        strays = _find_strays(files, series, made_elsewhere=made_elsewhere)
    adopted = None
    if checked is None or strays.refuse is not None:
        # A CSV that is not even formatted as ours is foreign as well.
        refuse = strays.refuse or (is_outside(series) if is_first_use else None)
        was_ours = bool(sidecar.partitions)
        adopted = adopt_in_place(files, series, now, assume_utc=assume_utc, was_ours=was_ours, outside=refuse)
        checked = _check_csv(files, series, sidecar, now)
        if checked is None:
            raise changing_all_the_time(files.csv(series), doing)
    sidecar, changed = withdraw_partitions(sidecar, series.timeframe, checked.marks, checked.grown)
    if changed:
        logger.warning(
            "%s differs from the last write in %d partitions (first %s): edited, or a write was interrupted; "
            "bars that are missing there will be requested again",
            files.csv(series), len(changed), changed[0],
        )  # fmt: skip
    sidecar = sidecar.model_copy(update={"file": checked.mark, "series": str(series), "updated_at": require_utc(now)})
    sidecars.save(series, sidecar)
    return sidecar, Prepared(adopted, corrupt, changed, (*notices, *strays.notices))


def _load_or_replace(sidecars: SidecarCache, series: Series, now: datetime, doing: str) -> tuple[Sidecar, Path | None]:
    """The sidecar on disk. In place of an unreadable one an empty one, and where the unreadable one is kept."""
    try:
        return sidecars.load(series, doing), None
    except UnreadableSidecar as failure:
        path = sidecars.files.sidecar(series)
        copy = keep_copy(sidecars.files.disk, path, f"corrupt-{_stamp(now)}")
        logger.warning("%s is unreadable (%s): kept as %s, a new one is built from the CSV", path, failure, copy.name)
        return Sidecar(), copy


def adopt_in_place(
    files: SeriesFiles,
    series: Series,
    now: datetime,
    *,
    assume_utc: bool,
    was_ours: bool = False,
    outside: Judge | None = None,
) -> Adopted:
    """Turn the CSV of ``series``, whatever its layout, into a normal one; the original is kept beside it.

    ``was_ours``: we wrote it, and our files end with a newline: a last line without one was cut off, perhaps inside a number.
    ``outside``: the opens whose bars are refused.

    Raises:
        DataError: no bar file, or stamps without a zone; it was left alone.
        StoreError: it changes faster than it can be read.
        OSError: the disk refuses.
    """
    path = files.csv(series)
    doing = f"adopting {path.name} as {series}"
    before = state_of(path)
    last_complete_s = latest_complete_open_s(series.timeframe, now.timestamp())
    data = path.read_bytes()
    cut = b""
    if was_ours and not data.endswith(b"\n"):
        data, _, cut = data.rpartition(b"\n")
        data += b"\n"
    rows = read_foreign(
        data, series, path.name, assume_utc=assume_utc, last_complete_s=last_complete_s, outside=outside
    )
    if cut:
        fault = RowFault(
            data.count(b"\n") + 1, cut.decode("utf-8", "replace"), "cut off: the file ends inside this line"
        )
        rows = replace(rows, dropped=(*rows.dropped, fault))
    if state_of(path) != before:
        raise changing_all_the_time(files.csv(series), doing)
    backup = keep_copy(files.disk, path, f"bak-{_stamp(now)}")
    try:
        replace_file(files.disk, path, render_file(rows.bars), still_valid=lambda: state_of(path) == before)
    except SourceChanged:
        raise changing_all_the_time(files.csv(series), doing) from None
    for fault in rows.dropped[:20]:
        logger.warning("%s: dropped %s", path.name, fault)
    notices = "; ".join(rows.notices) or "nothing else"
    logger.warning(
        "%s is not as this program writes it: %d bars adopted, %d rows dropped, %s; the original is %s",
        path.name, len(rows.bars), len(rows.dropped), notices, backup.name,
    )  # fmt: skip
    return Adopted(len(rows.bars), rows.dropped, rows.notices, backup)


@dataclass(frozen=True, slots=True)
class _Strays:
    """Bars of a CSV that the calendar has no room for: which opens to ``refuse`` (None: none), or a notice about those kept."""

    refuse: Judge | None = None
    notices: tuple[str, ...] = ()


def _find_strays(files: SeriesFiles, series: Series, *, made_elsewhere: bool) -> _Strays:
    """What to do with the bars of a normal CSV without a sidecar that the calendar has no room for."""
    with opened(files.csv(series)) as file:
        chunks = [opens_s for opens_s, _ in scan_opens(file[0], len(HEADER), file[1].size)] if file else []
    opens_s = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    strays = opens_s[is_outside(series)(opens_s)]
    if not len(strays):
        return _Strays()
    if made_elsewhere:
        return _Strays(refuse=is_outside(series))
    if is_overlapping(series)(strays).any():
        return _Strays(refuse=is_overlapping(series))
    first = render_stamps(strays[:1])[0]
    kept = f"kept {len(strays):,} bars {why_outside(series)} (first {first}): IB may have sent them"
    return _Strays(notices=(kept,))


def _cut_unfinished_line(files: SeriesFiles, series: Series, sidecar: Sidecar) -> tuple[str, ...]:
    """Remove what an interrupted append left at the end of the CSV, and report it. A file that someone put in its place is not
    touched: its last line may have no end, and be complete."""
    path = files.csv(series)
    if sidecar.file is None or not _is_torn(path, series, sidecar, sidecar.file.size):
        return ()
    cut = cut_unfinished_line(files.disk, path, sidecar.file.size)
    if not cut:
        return ()
    text = f"removed an unfinished line from the end of {path.name}: {cut.decode('utf-8', 'replace')}"
    logger.warning("%s (a write was interrupted)", text)
    return (text,)


def _is_torn(path: Path, series: Series, sidecar: Sidecar, committed: int) -> bool:
    with opened(path) as file:
        if file is None or end_of_lines(file[0], file[1].size, committed) == file[1].size:
            return False
        return has_recorded_start(file[0], series.timeframe, sidecar.partitions, committed)


@dataclass(frozen=True, slots=True)
class _Checked:
    """A CSV that is formatted as ours are."""

    marks: Mapping[str, PartitionMark]
    mark: FileMark | None
    grown: frozenset[str] = frozenset()
    """The partition that differs from the sidecar only by further rows at the end."""


def _check_csv(files: SeriesFiles, series: Series, sidecar: Sidecar, now: datetime) -> _Checked | None:
    """The partitions of the CSV; None when a line of it is not as we write them, or opens in the future.

    Reads all stamps. Parses values only in partitions that are not as recorded in ``sidecar``.
    """
    with opened(files.csv(series)) as file:
        if file is None:
            return _Checked({}, None)
        fd, state = file
        try:
            ends = first_and_last_open(fd, state.size)
            if ends is not None and ends[1] > now.timestamp():
                return None
            places = locate_partitions(fd, series.timeframe, len(HEADER), state.size)
        except MalformedFile:
            return None
        marks = mark_located(fd, places)
        doubtful = [(low, high) for key, (_, low, high) in places.items() if sidecar.partitions.get(key) != marks[key]]
        rules = rules_for(series)
        for start, end in _join_ranges(doubtful):
            if parse_rows(read_range(fd, start, end), rules)[1]:
                return None
        grown = only_grown(fd, places, sidecar.partitions, sidecar.file.size if sidecar.file else 0)
        return _Checked(marks, FileMark.of(state), grown)


def _join_ranges(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """``ranges`` with neighbours joined, up to a few megabytes."""
    start = end = -1
    for low, high in ranges:
        if low == end and high - start <= _CHECK_BYTES:
            end = high
            continue
        if end > 0:
            yield start, end
        start, end = low, high
    if end > 0:
        yield start, end


def _stamp(now: datetime) -> str:
    return require_utc(now).strftime("%Y%m%dT%H%M%SZ")


def changing_all_the_time(path: Path, doing: str) -> StoreError:
    """The error for a file that another program keeps changing while it is read."""
    return StoreError(
        f"{path} is being changed by another program",
        doing=doing,
        advice="Close that program (an editor, a copy in progress) and run it again.",
    )
