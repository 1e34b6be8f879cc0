"""What is known of a series, corrected to its CSV as it is now: the sidecar as a reader may believe it.

Changes nothing and takes no lock: on disk `settle.py` corrects it, with the next write. What was seen counts while both files
are in the state in which they were.
"""

from __future__ import annotations

from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.atomic import FileState, state_of
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile
from ktrdr_pipelines.store.paths import explained, is_as_written, opened
from ktrdr_pipelines.store.sidecar import Sidecar, UnreadableSidecar, withdraw_partitions
from ktrdr_pipelines.store.sidecar_cache import ParsedFiles
from ktrdr_pipelines.store.splice import mark_partitions


class SidecarViews:
    """The sidecars of ``files`` as they may be believed."""

    def __init__(self, files: ParsedFiles) -> None:
        self._files = files
        self._seen: dict[Path, tuple[FileState | None, FileState | None, Sidecar]] = {}

    def read(self, series: Series) -> Sidecar:
        """What is known of ``series``; defaults when there is no sidecar.

        Raises:
            DataError: the sidecar is unreadable. StoreError: it is a newer program's, or the disk refuses.
        """
        path, csv = self._files.sidecar(series), self._files.csv(series)
        doing = f"reading what is known of {series}"
        with explained(path, doing):
            states = (state_of(path), state_of(csv))
        seen = self._seen.get(path)
        if seen is not None and seen[:2] == states:
            return seen[2]
        try:
            sidecar = self._files.load_sidecar(series, doing)
        except UnreadableSidecar as failure:
            raise DataError(
                f"{path} is unreadable: {failure}",
                doing=doing,
                advice="The next load keeps a copy and builds a new one from the CSV; no bar is lost.",
            ) from None
        if not is_as_written(sidecar, states[1]):
            sidecar = self._correct(series, sidecar, doing)
        self._seen[path] = (*states, sidecar)
        return sidecar

    def _correct(self, series: Series, sidecar: Sidecar, doing: str) -> Sidecar:
        """``sidecar`` without claims about partitions that are not as it says."""
        path = self._files.csv(series)
        with explained(path, doing), opened(path) as file:
            if file is None:
                nothing: dict[str, object] = {"answered": (), "proven_empty": (), "partitions": {}, "file": None}
                return sidecar.model_copy(update=nothing) if sidecar.partitions else sidecar
            try:
                found = mark_partitions(file[0], series.timeframe, len(HEADER), file[1].size)
            except MalformedFile:
                found = {}
            return withdraw_partitions(sidecar, series.timeframe, found)[0]
