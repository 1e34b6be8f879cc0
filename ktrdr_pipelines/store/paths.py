"""The files of one data directory: names, opening, bad lines in them.

What is in the files is in `csv_format.py` and `sidecar.py`; who may write them in `locks.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ktrdr_pipelines.domain.calls import OnWait, show_nothing
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.store.atomic import Disk, end_of_lines, explain_refusal, explained
from ktrdr_pipelines.store.csv_format import RowFault
from ktrdr_pipelines.store.csv_scan import count_lines
from ktrdr_pipelines.store.file_state import FileState
from ktrdr_pipelines.store.locks import write_lock


class SeriesFiles:
    """Paths and write lock of the files of a series."""

    def __init__(self, data_dir: Path, lock_timeout_s: float, disk: Disk) -> None:
        self.data_dir = data_dir
        self.lock_timeout_s = lock_timeout_s
        self.on_wait: OnWait = show_nothing
        self.disk = disk

    def csv(self, series: Series) -> Path:
        """``AAPL_1h.csv``; a link is followed, so that it stays one."""
        path = self.data_dir / f"{series.name}.csv"
        return path.resolve() if path.is_symlink() else path

    def sidecar(self, series: Series) -> Path:
        """``AAPL_1h.meta.json``; a link is followed."""
        path = self.data_dir / f"{series.name}.meta.json"
        return path.resolve() if path.is_symlink() else path

    def journal(self, series: Series) -> Path:
        """``AAPL_1h.meta.journal``, beside the sidecar."""
        return self.sidecar(series).with_suffix(".journal")

    @contextmanager
    def locked(self, series: Series, doing: str) -> Iterator[None]:
        """The block may write the files of ``series``. The data directory is made when it is not there.

        Raises:
            StoreError: another process keeps the lock for longer than the time-out, or the disk refuses, in the block too.
        """
        lock = write_lock(self.data_dir, series, self.lock_timeout_s, doing, on_wait=self.on_wait)
        with lock, explained(self.csv(series), doing):
            yield


def check_folder(folder: Path) -> None:
    """Check that files can be made in the data ``folder``, which is made when it is not there. Leaves no file behind.

    Raises:
        StoreError: it refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".probe-", dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as failure:
        nameless = OSError(failure.errno, failure.strerror)  # the name of the probe means nothing to a user
        raise explain_refusal(nameless, folder, "trying the data folder") from failure


@contextmanager
def opened(path: Path, committed: int = 0) -> Iterator[tuple[int, FileState] | None]:
    """A descriptor for reading and the file's state; None when there is no file or an empty one.

    ``committed``: its size at our last write, 0 if there was none. A larger file may be growing at this moment, or may have been
    when its writer died: then its state ends with the last complete line.

    Raises:
        OSError: the disk refuses.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        state = FileState.of(os.fstat(fd))
        state = replace(state, size=end_of_lines(fd, state.size, committed))
        yield (fd, state) if state.size else None
    finally:
        os.close(fd)


def fault_at(fd: int, offset: int, why: str, line: int | None = None) -> RowFault:
    """The line at ``offset`` with its number (counted when not given) and its text."""
    data = os.pread(fd, 200, offset)
    text = data.split(b"\n", 1)[0].decode("utf-8", "replace")
    return RowFault(count_lines(fd, 0, offset) + 1 if line is None else line, text, why)


def bad_rows(path: Path, faults: Sequence[RowFault], count: int, doing: str) -> DataError:
    """The error of a reader that met ``count`` bad lines, the first of which are ``faults``."""
    lines = ", ".join(str(fault.line) for fault in faults) + (
        f" and {count - len(faults)} more" if count > len(faults) else ""
    )
    return DataError(
        f"{path} has bad rows (line {lines}); {faults[0]}",
        rows="\n".join(str(fault) for fault in faults),
        doing=doing,
        advice="The next load repairs the file, keeping a copy, and fetches those bars again.",
    )
