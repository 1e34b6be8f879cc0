"""The files of a data directory, with the last sidecar of each series kept parsed: one request reads it several times.

A sidecar of twenty years of minutes takes as long to parse as everything else that a request costs here. What is kept counts
only while the file holds the same bytes; they are read and compared every time, which is nothing beside parsing them, and
safer than any time of change: two writes can fall into one tick of the clock.
"""

from __future__ import annotations

from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.store.atomic import Disk, replace_file
from ktrdr_pipelines.store.paths import SeriesFiles, explained
from ktrdr_pipelines.store.sidecar import Sidecar, parse_sidecar, render_sidecar


class ParsedFiles(SeriesFiles):
    """`SeriesFiles` that parse a sidecar when its bytes have changed."""

    def __init__(self, data_dir: Path, lock_timeout_s: float, disk: Disk) -> None:
        super().__init__(data_dir, lock_timeout_s, disk)
        self._parsed: dict[Path, tuple[bytes, Sidecar]] = {}

    def load_sidecar(self, series: Series, doing: str) -> Sidecar:
        """See `SeriesFiles.load_sidecar`."""
        path = self.sidecar(series)
        with explained(path, doing):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                self._parsed.pop(path, None)
                return Sidecar()
        kept = self._parsed.get(path)
        if kept is not None and kept[0] == data:
            return kept[1]
        sidecar = parse_sidecar(data.decode("utf-8", "replace"), str(path))
        self._parsed[path] = (data, sidecar)
        return sidecar

    def save_sidecar(self, series: Series, sidecar: Sidecar) -> None:
        """See `SeriesFiles.save_sidecar`."""
        data = render_sidecar(sidecar)
        replace_file(self.disk, self.sidecar(series), [data])
        self._parsed[self.sidecar(series)] = (data, sidecar)
