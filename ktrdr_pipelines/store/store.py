"""One CSV per series and its sidecar: reading windows, writing answers, noticing edits of the files by other programs.

Layout and dtypes: `bars/schema.py` describes the table, `csv_format.py` the bytes, `sidecar.py` what is known beside them.
Promises: writing the same bars twice changes nothing; a write never removes a bar; a crash leaves the old file or the new
one, or some complete rows of an append and the beginning of one more, which readers ignore and the next write removes; the
sidecar never claims what the CSV does not hold (CSV first, sidecar after). Writers take the write lock (`locks.py`), readers
need none. The clock is passed in. See docs/design.md, 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ktrdr_pipelines.bars.schema import COLUMNS, empty_bars, latest_complete_open_s, opens_of, rules_for, validate_bars
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.calls import OnWait
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, require_utc
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.atomic import Disk, SourceChanged, explained, state_of
from ktrdr_pipelines.store.csv_format import MalformedFile, RowFault, render_rows, sample_column
from ktrdr_pipelines.store.csv_scan import (
    count_lines,
    find_window,
    first_and_last_open,
    looks_normal,
    parse_range,
    read_range,
    scan_opens,
)
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.foreign import read_foreign
from ktrdr_pipelines.store.foreign_hours import is_outside
from ktrdr_pipelines.store.identity import pin
from ktrdr_pipelines.store.integrity import Problem, verify_files
from ktrdr_pipelines.store.paths import SeriesFiles, bad_rows, fault_at, opened
from ktrdr_pipelines.store.results import Extent, Written
from ktrdr_pipelines.store.settle import Adopted, Prepared, changing_all_the_time, settle
from ktrdr_pipelines.store.sidecar import (
    FileMark,
    HistoryStart,
    ProvenEmpty,
    Sidecar,
    Source,
    UnreadableSidecar,
    VolumeUnit,
)
from ktrdr_pipelines.store.sidecar_cache import SidecarCache
from ktrdr_pipelines.store.sidecar_claims import add_answered, add_proven_empty, drop_disproved, subtract_windows
from ktrdr_pipelines.store.splice import Comparison, LeavesOldBars, Spliced, splice_bars, splice_nothing

if TYPE_CHECKING:
    import pandas as pd

_TRIES_AGAINST_EDITORS = 3


def utc_now() -> datetime:
    """The wall clock, for callers that bring none."""
    return datetime.now(UTC)


class Store:
    """The directory of CSVs and sidecars.

    ``lock_timeout_s`` is how long a writer waits for another one of the same series. ``clock`` only names the copies made by
    reads that meet a foreign file; other methods take ``now``. ``disk`` is the seam for tests.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        lock_timeout_s: float = 60.0,
        clock: Callable[[], datetime] = utc_now,
        disk: Disk | None = None,
    ) -> None:
        self.data_dir = Path(data_dir)
        self._clock = clock
        self._files = SeriesFiles(self.data_dir, lock_timeout_s, disk or Disk())
        self._sidecars = SidecarCache(self._files)
        self._unreported: dict[Path, Prepared] = {}
        """What reads corrected since the last `prepare`, which reports it."""

    def report_waits(self, on_wait: OnWait) -> None:
        """Call ``on_wait`` when another process writes the files of a series for longer than a moment."""
        self._files.on_wait = on_wait

    def limit_waits(self, seconds: float) -> None:
        """Wait no longer than this for another process that writes, from now on."""
        self._files.lock_timeout_s = min(seconds, self._files.lock_timeout_s)

    def csv_path(self, series: Series) -> Path:
        """``AAPL_1h.csv`` in the data directory; where a link leads, if it is one."""
        return self._files.csv(series)

    def sidecar_path(self, series: Series) -> Path:
        """``AAPL_1h.meta.json`` in the data directory."""
        return self._files.sidecar(series)

    def paths(self, series: Series) -> tuple[Path, Path, Path]:
        """CSV, journal of the sidecar, sidecar: the order in which a reader meets no claim about bars that it has not seen."""
        return self._files.csv(series), self._files.journal(series), self._files.sidecar(series)

    # ------------------------------------------------------------------------------------------------ reading

    def read_bars(self, series: Series, window: Window | None = None) -> pd.DataFrame:
        """The bars of ``window`` (all without one), exactly as written; empty when there are none.

        Reads only the bytes of the window. A foreign file is adopted first.

        Raises:
            DataError: rows are malformed, unsorted or break the rules; the message names their lines.
            StoreError: the disk refuses.
        """
        doing = f"reading bars of {series}" + (f" {window}" if window else "")
        with self._opened(series, doing) as file:
            if file is None:
                return empty_bars()
            fd, state = file
            start, end = find_window(fd, state.size, window)
            bars, faults = parse_range(fd, start, end, rules_for(series))
            if not faults:
                return bars
            before = count_lines(fd, 0, start)
            shown = [fault_at(fd, start + offset, why, before + row + 1) for row, offset, why in faults[:10]]
            raise bad_rows(self.csv_path(series), shown, len(faults), doing)

    def sample_closes(self, series: Series, window: Window, most: int) -> list[float]:
        """Closing prices of ``window``, at most ``most`` of them at equal steps, for a picture: they are not checked.

        Raises:
            DataError: the rows are not sorted. StoreError: the disk refuses.
        """
        with self._opened(series, f"reading closing prices of {series} {window}") as file:
            if file is None:
                return []
            fd, state = file
            return sample_column(read_range(fd, *find_window(fd, state.size, window)), COLUMNS.index("close"), most)

    def held_opens(self, series: Series, window: Window | None = None) -> IntArray:
        """Opens of the bars held in ``window`` (all without one), epoch seconds, strictly increasing. Reads stamps only.

        Raises:
            DataError: a line has no stamp or is out of order; the message names it.
            StoreError: the disk refuses.
        """
        with self._opened(series, f"reading what is held of {series}" + (f" {window}" if window else "")) as file:
            if file is None:
                return np.empty(0, np.int64)
            fd, state = file
            chunks = [opens_s for opens_s, _ in scan_opens(fd, *find_window(fd, state.size, window))]
            return np.concatenate(chunks) if chunks else np.empty(0, np.int64)

    def extent(self, series: Series) -> Extent | None:
        """First and last open, None without bars. Looks at the first and the last line only."""
        with self._opened(series, f"reading the extent of {series}", whole=False) as file:
            ends = first_and_last_open(file[0], file[1].size) if file else None
            return Extent(*ends) if ends else None

    def read_sidecar(self, series: Series) -> Sidecar:
        """What is known of ``series``, corrected to the CSV as it is now; defaults when there is no sidecar.

        When the CSV was edited, answered windows of the changed partitions are left out (the next `prepare` or `write`
        corrects them on disk).

        Raises:
            DataError: the sidecar is unreadable; the next load builds a new one and keeps a copy.
            StoreError: a newer program wrote it, or the disk refuses.
        """
        return self._sidecars.read_corrected(series, f"reading what is known of {series}")

    def verify(self, series: Series, window: Window | None = None) -> list[Problem]:
        """Everything wrong with the CSV in the partitions that ``window`` touches (all without one); empty when all is well.

        Reads all rows: malformed, unsorted or rule-breaking lines, and partitions whose rows are not those last written. An
        unreadable sidecar is a problem of its own. Changes nothing.
        """
        return verify_files(self._sidecars, series, window)

    # ------------------------------------------------------------------------------------------------ writing

    def is_as_left(self, series: Series) -> bool:
        """True if no other program touched the files of ``series`` since its last write; also when there are none.

        Raises:
            StoreError: a newer program wrote the sidecar, or the disk refuses.
        """
        doing = f"preparing the files of {series}"
        with explained(self.csv_path(series), doing):
            state = state_of(self.csv_path(series))
        try:
            return self._sidecars.load(series, doing).is_written_for(state)
        except UnreadableSidecar:
            return False

    def prepare(self, series: Series, *, now: datetime, assume_utc: bool = False) -> Prepared:
        """The first step of a load: adopt a foreign or edited CSV, rebuild a broken sidecar, take note of edits.

        Nearly free when nothing else touched the files, and then nothing is written. Done by `write` as well. What an earlier
        read of this store corrected is reported here, once: else dropped rows would be in the log only.

        Raises:
            DataError: the CSV is no bar file, or has stamps without a zone (unless ``assume_utc``); it was left alone.
            StoreError: the disk or the lock refuses, or a newer program wrote the sidecar.
        """
        done_by_reads = self._unreported.pop(self.csv_path(series), Prepared())
        if self.is_as_left(series):
            return done_by_reads
        doing = f"preparing the files of {series}"
        with self._files.locked(series, doing):
            return settle(self._sidecars, series, require_utc(now, "now"), doing, assume_utc=assume_utc)[1]

    def check_writable(self, series: Series) -> None:
        """Check before any request that its answer can be stored.

        Raises:
            StoreError: the folder refuses new files, or another process keeps the write lock.
        """
        doing = f"preparing the files of {series}"
        probe = self.data_dir / f".{series.name}.probe"
        with self._files.locked(series, doing), explained(probe, doing):
            probe.touch()
            probe.unlink()

    def check_identity(self, series: Series, source: Source) -> None:
        """Check before any request that bars of ``series``, as IB describes it now, may go into its file.

        Raises:
            StoreError: the file holds another conId, kind, currency or the like, or bars of a simulator (`identity.pin`).
        """
        pin(self.read_sidecar(series), series, source, None)

    def write(
        self,
        series: Series,
        bars: pd.DataFrame,
        *,
        answered: Window | None,
        source: Source,
        now: datetime,
        proven_empty: Sequence[ProvenEmpty] = (),
        volume_unit: VolumeUnit | None = None,
        complete_until: datetime | None = None,
        history_start: HistoryStart | None = None,
        sparse: bool | None = None,
        compare: Comparison | None = None,
        asked: Window | None = None,
        whole: bool = False,
        is_known: Callable[[FileMark | None], bool] | None = None,
    ) -> Written:
        """Add ``bars`` to the CSV, and what is known since to the sidecar: both in one step under the lock.

        The only place where bars are validated on their way into a file.

        Same stamp: the new values count, the old ones are in the result. Held bars that are not in ``bars`` stay. ``answered``
        is the window in which the answer was verified to be complete (None claims nothing); ``proven_empty`` the ranges of
        expected bars that are absent. Claims end where bars may still be forming: at ``complete_until``, whose caller knows
        that every bar opening before it has closed by ``now``, else one nominal bar before ``now``. An answered window was
        verified against what the file held: it is not claimed where the file turns out to be edited, nor at all when
        ``is_known`` is false for the CSV as it is found. ``history_start`` and ``sparse``: what else was learned; None changes
        nothing. ``compare``: which held bars are checked before the write, and the check; without bars and claims nothing
        else is done. ``asked``: the window of the request, for errors.

        ``whole``: ``bars`` replace everything that is held, in one step; refused when a held bar is not in ``bars``.

        When this raises, the CSV is as before, with one exception: if the disk refuses the sidecar after the bars were
        written, they are kept and only the claims are lost.

        Raises:
            DataError: ``bars`` break the schema, or the file there is no bar file; nothing was touched.
            StoreError: the disk or the lock refuses, or the file holds something else (`identity.pin`).
        """
        now = require_utc(now, "now")
        asked = asked or answered
        is_check = not len(bars) and not proven_empty and (answered, history_start, sparse) == (None, None, None)
        if len(bars):
            validate_bars(bars, series, asked)
        doing = f"writing bars of {series}" + (f" {asked}" if asked else "")
        last_complete_s = latest_complete_open_s(series.timeframe, now.timestamp())
        until = require_utc(complete_until or datetime.fromtimestamp(last_complete_s + 1, UTC), "complete_until")
        with self._files.locked(series, doing):
            sidecar, spliced, prepared = self._splice(
                series, bars, source, now, doing, volume_unit, compare=compare, whole=whole
            )
            found = sidecar.file
            if is_known is not None and not is_known(found):
                answered = None
            claims = [claim for claim in proven_empty if claim.start < until]
            ranges = drop_disproved(add_proven_empty(sidecar.proven_empty, claims), opens_of(bars).tolist())
            spans = add_answered(sidecar.answered, answered, until) if answered else sidecar.answered
            # The file that this was verified against is gone: bars may have gone with an edit.
            spans = subtract_windows(spans, prepared.changed_windows(series.timeframe))
            update: dict[str, object] = {
                "updated_at": now,
                "answered": spans,
                "proven_empty": ranges,
                "partitions": {**sidecar.partitions, **spliced.marks},
                "file": FileMark.of(spliced.state),
            }
            update |= {"history_start": history_start} if history_start is not None else {}
            update |= {"sparse": sparse} if sparse is not None else {}
            if not is_check:
                sidecar = sidecar.model_copy(update=update)
                self._sidecars.save(series, sidecar)
        merged = spliced.merged
        return Written(
            rows_added=merged.added,
            rows_revised=len(merged.revised_to),
            path=self.csv_path(series),
            revised_from=merged.revised_from,
            revised_to=merged.revised_to,
            prepared=prepared,
            found=found,
            sidecar=sidecar,
        )

    def is_unchanged(self, written: Written) -> bool:
        """True if the CSV is still as ``written`` left it: no other program has changed it since."""
        with explained(written.path, f"looking at {written.path.name}"):
            return written.sidecar.is_written_for(state_of(written.path))

    def note_unfinished(
        self, series: Series, since: datetime | None, until: datetime | None, *, now: datetime
    ) -> Sidecar:
        """Record which bars are still missing after loads of newer (``since``) and of older bars (``until``); None: none. Returns
        the sidecar."""
        doing = f"noting what is unfinished of {series}"
        with self._files.locked(series, doing):
            sidecar, _ = settle(self._sidecars, series, require_utc(now, "now"), doing)
            update = {"updated_at": now, "series": str(series), "unfinished_from": since, "unfinished_until": until}
            sidecar = sidecar.model_copy(update=update)
            self._sidecars.save(series, sidecar, whole=True)
        return sidecar

    def merge_journal(self, series: Series) -> None:
        """The last step of a load: merge the journal of the sidecar into it, so that the sidecar alone has everything. Nothing is
        done without a journal. What is not merged counts too, and is merged by the next load.

        Raises:
            StoreError: the disk or the lock refuses.
        """
        if self._files.journal(series).exists():
            doing = f"noting what is known of {series}"
            with self._files.locked(series, doing):
                self._sidecars.merge_journal(series, doing)

    def adopt(self, series: Series, path: Path | None = None, *, now: datetime, assume_utc: bool = False) -> Adopted:
        """Adopt a file of another program as the CSV of ``series``, or as a part of it.

        Without ``path`` the series' own CSV is converted where it is, the original kept as ``AAPL_1h.csv.bak-<time>``. With
        one, its bars are added to what is held, which wins where both have a stamp with different values (those rows are
        reported as dropped); the file at ``path`` is left as it is. Nothing is claimed to be complete: gaps are gaps. Bars that
        the calendar has no room for are dropped.

        Raises:
            DataError: no bar file, stamps without a zone (unless ``assume_utc``), not one good row; it was left alone.
            StoreError: the disk or the lock refuses.
        """
        now = require_utc(now, "now")
        doing = f"adopting {(path or self.csv_path(series)).name} as {series}"
        with self._files.locked(series, doing):
            is_own = path is None or path.resolve() == self.csv_path(series).resolve()
            _, prepared = settle(self._sidecars, series, now, doing, assume_utc=assume_utc, made_elsewhere=is_own)
            if path is None or is_own:
                return prepared.adopted or Adopted(self._sidecars.load(series, doing).rows, (), (), None)
            with explained(path, doing):
                found = read_foreign(
                    path.read_bytes(),
                    series,
                    path.name,
                    assume_utc=assume_utc,
                    last_complete_s=latest_complete_open_s(series.timeframe, now.timestamp()),
                    outside=is_outside(series),
                )
            if not len(found.bars):
                return Adopted(0, found.dropped, found.notices, None)
            sidecar, spliced, _ = self._splice(series, found.bars, None, now, doing, held_wins=True)
            update = {
                "updated_at": now,
                "proven_empty": drop_disproved(sidecar.proven_empty, opens_of(found.bars).tolist()),
                "partitions": {**sidecar.partitions, **spliced.marks},
                "file": FileMark.of(spliced.state),
            }
            self._sidecars.save(series, sidecar.model_copy(update=update))
        lost = render_rows(spliced.merged.revised_to).decode().splitlines()
        conflicts = tuple(RowFault(0, text, "the file already holds another bar with this timestamp") for text in lost)
        return Adopted(spliced.merged.added, (*found.dropped, *conflicts), found.notices, None)

    # ------------------------------------------------------------------------------------------------ inside

    def _splice(
        self,
        series: Series,
        bars: pd.DataFrame,
        source: Source | None,
        now: datetime,
        doing: str,
        volume_unit: VolumeUnit | None = None,
        *,
        compare: Comparison | None = None,
        held_wins: bool = False,
        whole: bool = False,
    ) -> tuple[Sidecar, Spliced, Prepared]:
        """Settle, check identity and splice, again when another program changes the CSV in between."""
        path = self.csv_path(series)
        prepared, recheck = Prepared(), False
        for _ in range(_TRIES_AGAINST_EDITORS):
            sidecar, done = settle(self._sidecars, series, now, doing, recheck=recheck)
            prepared = done if done != Prepared() else prepared
            if source is not None:
                sidecar = pin(sidecar, series, source, volume_unit)
            try:
                if not len(bars):
                    unchanged = splice_nothing(
                        path, bars, rules_for(series), is_settled=sidecar.is_written_for, compare=compare
                    )
                    return sidecar, unchanged, prepared
                spliced = splice_bars(
                    self._files.disk,
                    path,
                    bars,
                    series.timeframe,
                    rules_for(series),
                    is_settled=sidecar.is_written_for,
                    compare=compare,
                    held_wins=held_wins,
                    whole=whole,
                    recorded=sidecar.partitions,
                )
            except SourceChanged:
                continue
            except LeavesOldBars:
                raise DataError(
                    "the file holds bars that are not among the new ones: they were added meanwhile",
                    doing=doing,
                    advice="The file was left as it is; run the load again.",
                ) from None
            except MalformedFile:  # an edit that kept the size and the time of change
                recheck = True
                continue
            return sidecar, spliced, prepared
        raise changing_all_the_time(path, doing)

    @contextmanager
    def _opened(self, series: Series, doing: str, *, whole: bool = True) -> Iterator[tuple[int, FileState] | None]:
        """The CSV, open for reading, adopted first if it is foreign; None when there is no file or an empty one.

        Bisecting is right in a sorted file only. So with ``whole``, a file that is not as at our last write is read once from
        end to end.
        """
        path = self.csv_path(series)
        with explained(path, doing):
            with opened(path, self._sidecars.committed_size(series, doing)) as file:
                is_foreign = file is not None and self._is_foreign(series, *file, whole=whole, doing=doing)
            if is_foreign:
                self._unreported[path] = self.prepare(series, now=self._clock())
            with opened(path, self._sidecars.committed_size(series, doing)) as file:
                if file is None:
                    yield None
                    return
                fd, state = file
                try:
                    if whole:
                        self._sidecars.ensure_sorted(series, fd, state, doing)
                    yield file
                except MalformedFile as failure:
                    raise bad_rows(path, [fault_at(fd, failure.offset, failure.why)], 1, doing) from None

    def _is_foreign(self, series: Series, fd: int, state: FileState, *, whole: bool, doing: str) -> bool:
        """True if the file looks like no file of ours, or is out of order and was never written by us."""
        try:
            first_and_last_open(fd, state.size)
            if whole:
                self._sidecars.ensure_sorted(series, fd, state, doing)
        except MalformedFile:
            return not looks_normal(fd, state.size) or not self._was_written_by_us(series, doing)
        return False

    def _was_written_by_us(self, series: Series, doing: str) -> bool:
        try:
            return self._sidecars.load(series, doing).file is not None
        except UnreadableSidecar:
            return True
