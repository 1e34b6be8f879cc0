"""Taking in what others did to a series' files: foreign CSVs, edited ones, lost or broken sidecars.

`settle` is the first step of each write and of each load: afterwards the CSV is a normal one and the sidecar claims no more
than it holds. How a foreign file is read is in `foreign.py`. Everything here runs under the lock of the series.
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
from ktrdr_pipelines.store.atomic import FileState, SourceChanged, keep_copy, replace_file, state_of
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    MalformedFile,
    RowFault,
    first_and_last_open,
    parse_rows,
    read_range,
    render_file,
    render_stamps,
    scan_opens,
)
from ktrdr_pipelines.store.foreign import read_foreign
from ktrdr_pipelines.store.foreign_hours import Judge, is_outside, is_overlapping, why_outside
from ktrdr_pipelines.store.paths import SeriesFiles, is_as_written, mark_of, opened
from ktrdr_pipelines.store.sidecar import (
    FileMark,
    PartitionMark,
    Sidecar,
    UnreadableSidecar,
    partition_windows,
    withdraw_partitions,
)
from ktrdr_pipelines.store.splice import locate_partitions, mark_located

logger = logging.getLogger(__name__)

_CHECK_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Adopted:
    """A foreign or edited file that became a normal one."""

    rows: int
    dropped: tuple[RowFault, ...]
    """Bad rows with their lines, left out: the next load asks IB for those bars."""
    notices: tuple[str, ...]
    """What was put right without losing anything."""
    backup: Path | None
    """The original; None when the file was normal already, or was read from elsewhere and left there."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What had to be put right before a series could be used. All fields are empty for files that nobody touched."""

    adopted: Adopted | None = None
    corrupt_sidecar: Path | None = None
    """Where the unreadable sidecar was kept; a new one was built from the CSV."""
    changed_partitions: tuple[str, ...] = ()
    """Partitions whose rows are not those we wrote: what is missing there counts as never asked."""
    notices: tuple[str, ...] = ()
    """What was left as it is and is odd."""
    csv_gone: bool = False
    """The sidecar knew of bars, but there is no CSV any more: everything counts as never asked."""

    def changed_windows(self, timeframe: Timeframe) -> tuple[Window, ...]:
        """Where bars may be gone that were there before: the changed partitions, everything with the CSV."""
        if self.csv_gone or self.adopted is not None or self.corrupt_sidecar is not None:
            return (Window(datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)),)
        return partition_windows(timeframe, self.changed_partitions)

    def describe(self) -> list[str]:
        """What was put right in the files before the load, as sentences."""
        said = []
        if (adopted := self.adopted) is not None:
            kept = f"; the original is {adopted.backup}" if adopted.backup else ""
            said.append(f"adopted a file made elsewhere: {adopted.rows} rows, {len(adopted.dropped)} refused{kept}")
            said += [str(fault) for fault in adopted.dropped[:5]] + list(adopted.notices)
        if self.corrupt_sidecar is not None:
            said.append(f"the sidecar was unreadable and was built anew; the old one is {self.corrupt_sidecar}")
        if self.changed_partitions:
            said.append(f"edited since the last load: {', '.join(self.changed_partitions)}")
        said += self.notices
        if self.csv_gone:
            said.append("the CSV is gone; everything counts as never asked")
        return said


def settle(
    files: SeriesFiles,
    series: Series,
    now: datetime,
    doing: str,
    *,
    assume_utc: bool = False,
    recheck: bool = False,
    made_elsewhere: bool = False,
) -> tuple[Sidecar, Prepared]:
    """Make the files of ``series`` normal and true to each other; the sidecar, and what had to be done.

    Costs two looks at file states when nobody touched the files, unless ``recheck`` asks to read them all the same.

    A CSV without a sidecar was made by something else, and the calendar is asked about its bars (`foreign_hours.py`). If it
    is written just as ours are it may be ours and have lost its sidecar, which shall never cost a bar: then only bars that
    would be held twice are taken out, unless a person said that it was ``made_elsewhere``.

    Raises:
        DataError: the CSV is no bar file; it was left alone.
        StoreError: the sidecar is a newer program's.
        OSError: the disk refuses.
    """
    corrupt: Path | None = None
    try:
        sidecar = files.load_sidecar(series, doing)
    except UnreadableSidecar as failure:
        path = files.sidecar(series)
        corrupt = keep_copy(files.disk, path, f"corrupt-{_stamp(now)}")
        logger.warning(
            "%s is unreadable (%s): kept as %s, a new one is built from the CSV", path, failure, corrupt.name
        )
        sidecar = Sidecar()
    state = state_of(files.csv(series))
    if corrupt is None and not recheck and is_as_written(sidecar, state):
        return sidecar, Prepared()
    if state is None or not state.size:
        gone = bool(sidecar.partitions)
        if gone:
            logger.warning("%s is gone: all of it counts as never asked", files.csv(series))
            update: dict[str, object] = {"answered": (), "proven_empty": (), "partitions": {}, "file": None}
            update |= {"history_start": None, "sparse": False}
            sidecar = sidecar.model_copy(update=update)
        files.save_sidecar(series, sidecar)
        return sidecar, Prepared(corrupt_sidecar=corrupt, csv_gone=gone)

    adopted = None
    notices: tuple[str, ...] = ()
    is_first_use = corrupt is None and sidecar.file is None and not sidecar.partitions
    outside = is_outside(series) if is_first_use else None
    marks = _check_csv(files, series, sidecar.partitions, now)
    if marks is not None and is_first_use:
        strays, doubled = _find_strays(files, series)
        if doubled or (strays and made_elsewhere):
            marks = None
            outside = outside if made_elsewhere else is_overlapping(series)
        elif strays:
            notices = (
                f"{len(strays):,} bars are {why_outside(series)}, the first {render_stamps(np.array(strays[:1]))[0]}: kept, "
                "since IB may have sent them",
            )
    if marks is None:
        adopted = adopt_in_place(
            files, series, now, assume_utc=assume_utc, was_ours=bool(sidecar.partitions), outside=outside
        )
        marks = _check_csv(files, series, sidecar.partitions, now)
        if marks is None:
            raise changing_all_the_time(files.csv(series), doing)
    found, state_checked = marks
    sidecar, changed = withdraw_partitions(sidecar, series.timeframe, found)
    if changed:
        logger.warning(
            "%s is not as it was last recorded in %d partitions (first %s): edited, or a write was interrupted; "
            "what is missing there will be asked again",
            files.csv(series), len(changed), changed[0],
        )  # fmt: skip
    sidecar = sidecar.model_copy(update={"file": state_checked, "series": str(series), "updated_at": require_utc(now)})
    files.save_sidecar(series, sidecar)
    return sidecar, Prepared(adopted, corrupt, changed, notices)


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
        replace_file(files.disk, path, render_file(rows.bars), still_valid=lambda: _same(path, before))
    except SourceChanged:
        raise changing_all_the_time(files.csv(series), doing) from None
    for fault in rows.dropped[:20]:
        logger.warning("%s: dropped %s", path.name, fault)
    notices = "; ".join(rows.notices) or "nothing else"
    logger.warning(
        "%s was not a normal file: %d bars adopted, %d rows dropped, %s; the original is %s",
        path.name, len(rows.bars), len(rows.dropped), notices, backup.name,
    )  # fmt: skip
    return Adopted(len(rows.bars), rows.dropped, rows.notices, backup)


def _find_strays(files: SeriesFiles, series: Series) -> tuple[list[int], int]:
    """The opens of a normal CSV that the calendar has no room for, and how many of them would be held twice after a load."""
    with opened(files.csv(series)) as file:
        chunks = [opens_s for opens_s, _ in scan_opens(file[0], len(HEADER), file[1].size)] if file else []
    opens_s = np.concatenate(chunks) if chunks else np.empty(0, np.int64)
    strays = opens_s[is_outside(series)(opens_s)]
    return strays.tolist(), int(is_overlapping(series)(strays).sum())


def _check_csv(
    files: SeriesFiles, series: Series, recorded: Mapping[str, PartitionMark], now: datetime
) -> tuple[dict[str, PartitionMark], FileMark | None] | None:
    """The partitions of the CSV and its mark; None when a line of it is not as we write them, or opens in the future.

    All stamps are read. Values are parsed only in partitions that are not as ``recorded``.
    """
    with opened(files.csv(series)) as file:
        if file is None:
            return {}, None
        fd, state = file
        try:
            ends = first_and_last_open(fd, state.size)
            if ends is not None and ends[1] > now.timestamp():
                return None
            places = locate_partitions(fd, series.timeframe, len(HEADER), state.size)
        except MalformedFile:
            return None
        marks = mark_located(fd, places)
        doubtful = [(low, high) for key, (_, low, high) in places.items() if recorded.get(key) != marks[key]]
        rules = rules_for(series)
        for start, end in _join_ranges(doubtful):
            if parse_rows(read_range(fd, start, end), rules)[1]:
                return None
        return marks, mark_of(state)


def _join_ranges(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges as one, up to a few megabytes."""
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


def _same(path: Path, state: FileState | None) -> bool:
    return state_of(path) == state


def _stamp(now: datetime) -> str:
    return require_utc(now).strftime("%Y%m%dT%H%M%SZ")


def changing_all_the_time(path: Path, doing: str) -> StoreError:
    """The error for a file that another program keeps changing while it is read."""
    return StoreError(
        f"{path} is being changed by another program",
        doing=doing,
        advice="Close it there (an editor, a copy under way) and run it again.",
    )
