"""The sidecars of a data directory, with the last reading of each series kept.

One rule: what was found counts while the sidecar has the same bytes and the CSV the same state (`file_state.FileState`). The
bytes are read and compared each time. That costs little beside parsing them (twenty years of minutes), and is safer than
the sidecar's own state: two writes can fall into one tick of the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.atomic import explained, replace_file, state_of
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile, scan_opens
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.paths import SeriesFiles, opened
from ktrdr_pipelines.store.sidecar import Sidecar, UnreadableSidecar, parse_sidecar, render_sidecar
from ktrdr_pipelines.store.sidecar_claims import withdraw_all, withdraw_partitions
from ktrdr_pipelines.store.splice import mark_partitions


@dataclass(slots=True)
class _Reading:
    """What was found in the files of a series: the sidecar's ``content`` (None without one), the CSV in the state ``csv``."""

    content: bytes | None
    csv: FileState | None
    sidecar: Sidecar | UnreadableSidecar
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

    def save(self, series: Series, sidecar: Sidecar) -> None:
        """Replace the sidecar; only under the write lock. Raises OSError."""
        content, path = render_sidecar(sidecar), self.files.sidecar(series)
        replace_file(self.files.disk, path, [content])
        self._readings[path] = _Reading(content, None, sidecar)

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

    def _read(self, series: Series, csv: FileState | None, doing: str) -> _Reading:
        path = self.files.sidecar(series)
        with explained(path, doing):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                content = None
        kept = self._readings.get(path)
        if kept is not None and kept.content == content:
            if kept.csv == csv:
                return kept
            reading = _Reading(content, csv, kept.sidecar)
        else:
            reading = _Reading(content, csv, _parse(content, path))
        self._readings[path] = reading
        return reading

    def _correct(self, series: Series, sidecar: Sidecar, doing: str) -> Sidecar:
        path = self.files.csv(series)
        with explained(path, doing), opened(path) as file:
            if file is None:
                return withdraw_all(sidecar) if sidecar.partitions else sidecar
            try:
                found = mark_partitions(file[0], series.timeframe, len(HEADER), file[1].size)
            except MalformedFile:
                found = {}
            return withdraw_partitions(sidecar, series.timeframe, found)[0]


def _parse(content: bytes | None, path: Path) -> Sidecar | UnreadableSidecar:
    if content is None:
        return Sidecar()
    try:
        return parse_sidecar(content.decode("utf-8", "replace"), str(path))
    except UnreadableSidecar as failure:
        return failure


def _readable(reading: _Reading) -> Sidecar:
    if isinstance(reading.sidecar, UnreadableSidecar):
        raise UnreadableSidecar(str(reading.sidecar))
    return reading.sidecar
