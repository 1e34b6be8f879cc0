"""The sidecars of a data directory, with the last reading of each series kept.

A small sidecar is written anew with each change. A large one has a journal (`journal.py`), to which changes are appended until it
is as large as the sidecar; then both become one. So what is written stays in proportion to what changed.

One rule for readings: what was found counts while sidecar and journal have the same bytes and the CSV the same state
(`file_state.FileState`). The bytes are read and compared each time. That costs little beside parsing them (twenty years of
minutes), and is safer than the sidecar's own state: two writes can fall into one tick of the clock.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.atomic import add_lines, explained, replace_file, state_of
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile
from ktrdr_pipelines.store.csv_scan import scan_opens
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.journal import apply_journal, name_base, render_change
from ktrdr_pipelines.store.partition_marks import locate_partitions, mark_located, only_grown
from ktrdr_pipelines.store.paths import SeriesFiles, opened
from ktrdr_pipelines.store.sidecar import Sidecar, UnreadableSidecar, parse_sidecar, render_sidecar
from ktrdr_pipelines.store.sidecar_claims import withdraw_all, withdraw_partitions

SMALL_BYTES = 1 << 12
"""A sidecar of up to this size, one block of most disks, has no journal."""


@dataclass(slots=True)
class _Reading:
    """What was found in the files of a series: the ``content`` of the sidecar (None without one) and of its journal, the CSV in
    the state ``csv``."""

    content: tuple[bytes | None, bytes]
    csv: FileState | None
    sidecar: Sidecar | UnreadableSidecar
    journal_size: int = 0
    """Where the valid lines of the journal end; 0 without a journal of this sidecar."""
    corrected: Sidecar | None = None
    is_sorted: bool = False


class SidecarCache:
    """The sidecars of ``files``: as they stand on disk, and corrected to their CSVs."""

    def __init__(self, files: SeriesFiles) -> None:
        self.files = files
        self._readings: dict[Path, _Reading] = {}

    def load(self, series: Series, doing: str) -> Sidecar:
        """The sidecar as it stands on disk; defaults when there is none.

        Raises:
            UnreadableSidecar: it is garbage.
            StoreError: a newer program wrote it, or the disk refuses.
        """
        with explained(self.files.csv(series), doing):
            state = state_of(self.files.csv(series))
        return _readable(self._read(series, state, doing))

    def save(self, series: Series, sidecar: Sidecar, *, whole: bool = False) -> None:
        """Record ``sidecar``, in its file (always when ``whole``) or in the journal; only under the write lock, after `load`.

        The journal is not synced: a crash of the machine may lose claims, and the CSV was synced before.

        Raises:
            OSError: the disk refuses.
        """
        path, journal = self.files.sidecar(series), self.files.journal(series)
        known = self._readings.get(path)
        if known is None or whole or not self._extend_journal(path, journal, known, sidecar):
            content = render_sidecar(sidecar)
            replace_file(self.files.disk, path, [content], is_durable=False)
            self.files.disk.remove(journal)
            self._readings[path] = _Reading((content, b""), None, sidecar)

    def _extend_journal(self, path: Path, journal: Path, known: _Reading, sidecar: Sidecar) -> bool:
        """Append to the journal what makes ``sidecar`` of ``known``; False where the sidecar has to be written as a whole."""
        change, size = _render_for_journal(known, sidecar), known.journal_size
        if not change or not add_lines(self.files.disk, journal, size, change):
            return False
        with suppress(PermissionError):
            os.utime(path)  # sensors look at the state of the sidecar only, and have to see that something changed
        lines = known.content[1][:size] + change
        self._readings[path] = _Reading((known.content[0], lines), None, sidecar, size + len(change))
        return True

    def merge_journal(self, series: Series, doing: str) -> None:
        """Write the sidecar as a whole if it has a journal; only under the write lock. Raises OSError."""
        with suppress(UnreadableSidecar):
            sidecar = self.load(series, doing)
            if self._readings[self.files.sidecar(series)].journal_size:
                self.save(series, sidecar, whole=True)

    def read_corrected(self, series: Series, doing: str) -> Sidecar:
        """The sidecar without claims that the CSV, as it is now, does not bear out; defaults when there is no sidecar.

        Changes nothing on disk and takes no lock: `settle.py` corrects the file, with the next write.

        Raises:
            DataError: the sidecar is unreadable.
            StoreError: a newer program wrote it, or the disk refuses.
        """
        path = self.files.csv(series)
        with explained(path, doing):
            state = state_of(path)  # before the sidecar: then a write in between costs a correction, and no claim
        reading = self._read(series, state, doing)
        if reading.corrected is None:
            try:
                sidecar = _readable(reading)
            except UnreadableSidecar as failure:
                raise DataError(
                    f"{self.files.sidecar(series)} is unreadable: {failure}",
                    doing=doing,
                    advice="The next load keeps a copy and builds a new one from the CSV; no bar is lost.",
                ) from None
            is_current = sidecar.is_written_for(state)
            reading.corrected = sidecar if is_current else self._correct(series, sidecar, doing)
        return reading.corrected

    def ensure_sorted(self, series: Series, fd: int, state: FileState, doing: str) -> None:
        """Read all stamps of the CSV once, unless the sidecar was written for this state. Raises MalformedFile."""
        reading = self._read(series, state, doing)
        if reading.is_sorted:
            return
        if isinstance(reading.sidecar, UnreadableSidecar) or not reading.sidecar.is_written_for(state):
            for _ in scan_opens(fd, len(HEADER), state.size):
                pass
        reading.is_sorted = True

    def committed_size(self, series: Series, doing: str) -> int:
        """The size of the CSV at our last write, 0 if there was none or it is not known. Raises StoreError."""
        try:
            mark = self.load(series, doing).file
        except UnreadableSidecar:
            return 0
        return mark.size if mark else 0

    def _read(self, series: Series, csv: FileState | None, doing: str) -> _Reading:
        path = self.files.sidecar(series)
        with explained(path, doing):
            # The journal first: should a writer merge the two in between, the sidecar read then has everything.
            journal = _read_file(self.files.journal(series)) or b""
            content = (_read_file(path), journal)
        kept = self._readings.get(path)
        if kept is not None and kept.content == content:
            if kept.csv == csv:
                return kept
            reading = _Reading(content, csv, kept.sidecar, kept.journal_size)
        else:
            reading = _parse(content, csv, path)
        self._readings[path] = reading
        return reading

    def _correct(self, series: Series, sidecar: Sidecar, doing: str) -> Sidecar:
        path = self.files.csv(series)
        committed = sidecar.file.size if sidecar.file else 0
        with explained(path, doing), opened(path, committed) as file:
            if file is None:
                return withdraw_all(sidecar) if sidecar.partitions else sidecar
            fd, state = file
            try:
                places = locate_partitions(fd, series.timeframe, len(HEADER), state.size)
            except MalformedFile:
                places = {}
            grown = only_grown(fd, places, sidecar.partitions, committed)
            return withdraw_partitions(sidecar, series.timeframe, mark_located(fd, places), grown)[0]


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _render_for_journal(known: _Reading, sidecar: Sidecar) -> bytes:
    """What to append to the journal that ``known`` was read from; nothing where the sidecar has to be written as a whole."""
    base = known.content[0]
    if base is None or isinstance(known.sidecar, UnreadableSidecar) or len(base) <= SMALL_BYTES:
        return b""
    change = render_change(known.sidecar, sidecar)
    if known.journal_size + len(change) > len(base):
        return b""
    return change if known.journal_size else name_base(base) + change


def _parse(content: tuple[bytes | None, bytes], csv: FileState | None, path: Path) -> _Reading:
    base, journal = content
    if base is None:
        return _Reading(content, csv, Sidecar())
    try:
        sidecar = parse_sidecar(base.decode("utf-8", "replace"), str(path))
    except UnreadableSidecar as failure:
        return _Reading(content, csv, failure)
    if not journal:
        return _Reading(content, csv, sidecar)
    found = apply_journal(sidecar, base, journal)
    return _Reading(content, csv, found.sidecar, found.size)


def _readable(reading: _Reading) -> Sidecar:
    if isinstance(reading.sidecar, UnreadableSidecar):
        raise UnreadableSidecar(str(reading.sidecar))
    return reading.sidecar
