"""The files of one data directory: their names, their locks, opening them, and turning refusals into clear errors.

Shared by `store.py` (reads and writes) and `settle.py` (what others did to the files). What is in the files is described
in `csv_format.py` and `sidecar.py`. Locks: filelock, which times out right and is free at once after kill -9
(`docs/dependencies.md`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import DataError, StoreError
from ktrdr_pipelines.store.atomic import Disk, FileState, explain_refusal, replace_file
from ktrdr_pipelines.store.csv_format import RowFault, count_lines
from ktrdr_pipelines.store.sidecar import FileMark, Sidecar, parse_sidecar, render_sidecar


class SeriesFiles:
    """Where the files of a series are, and how they are opened, locked and saved."""

    def __init__(self, data_dir: Path, lock_timeout_s: float, disk: Disk) -> None:
        self.data_dir = data_dir
        self.lock_timeout_s = lock_timeout_s
        self.disk = disk

    def csv(self, series: Series) -> Path:
        """``AAPL_1h.csv``; a link is followed, so that it stays one."""
        path = self.data_dir / f"{series.name}.csv"
        return path.resolve() if path.is_symlink() else path

    def sidecar(self, series: Series) -> Path:
        """``AAPL_1h.meta.json``; a link is followed."""
        path = self.data_dir / f"{series.name}.meta.json"
        return path.resolve() if path.is_symlink() else path

    def lock(self, series: Series) -> Path:
        """``.AAPL_1h.lock``. Beside the CSV and not the CSV itself: a rename would leave the lock on the old file."""
        return self.data_dir / f".{series.name}.lock"

    @contextmanager
    def locked(self, series: Series, doing: str) -> Iterator[None]:
        """Hold the lock of ``series``; the data directory is made when it is not there.

        Raises:
            StoreError: another process holds it for longer than the time-out, or the disk refuses.
        """
        path = self.lock(series)
        lock = FileLock(path, timeout=self.lock_timeout_s)
        with explained(path, doing):
            self.data_dir.mkdir(parents=True, exist_ok=True)
            # filelock takes a file that cannot be made for one that is contended, and would wait for its whole time-out.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            try:
                lock.acquire()
            except Timeout:
                raise StoreError(
                    f"another process has been writing {series.name}.csv for {self.lock_timeout_s:g} s",
                    doing=doing,
                    advice=f"Wait for it, or find it with `fuser {path}`; the lock is free as soon as it ends.",
                ) from None
        try:
            with explained(self.csv(series), doing):
                yield
        finally:
            lock.release()

    def load_sidecar(self, series: Series, doing: str) -> Sidecar:
        """The sidecar as it stands on disk; defaults when there is none.

        Raises:
            UnreadableSidecar: it is garbage.
            StoreError: it is a newer program's, or the disk refuses.
        """
        path = self.sidecar(series)
        with explained(path, doing):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return Sidecar()
            return parse_sidecar(data.decode("utf-8", "replace"), str(path))

    def save_sidecar(self, series: Series, sidecar: Sidecar) -> None:
        """Replace the sidecar; only under the lock. Raises OSError."""
        replace_file(self.disk, self.sidecar(series), [render_sidecar(sidecar)])


def check_folder(folder: Path) -> None:
    """Find out whether files can be made in the data ``folder``, which is made when it is not there. Leaves nothing behind.

    Raises:
        StoreError: it refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".probe-", dir=folder)
        os.close(handle)
        Path(probe).unlink()
    except OSError as failure:
        nameless = OSError(failure.errno, failure.strerror)  # the probe's name means nothing to a person
        raise explain_refusal(nameless, folder, "trying the data folder") from failure


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system refuses inside into a StoreError that names ``path`` and says what to do."""
    try:
        yield
    except OSError as failure:
        raise explain_refusal(failure, path, doing) from failure


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, FileState] | None]:
    """A descriptor for reading and the file's state, None when there is no file or an empty one. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        state = FileState.of(os.fstat(fd))
        yield (fd, state) if state.size else None
    finally:
        os.close(fd)


def mark_of(state: FileState | None) -> FileMark | None:
    """What the sidecar remembers of a CSV's state; the inode is left out, so that a copied directory is still known."""
    return FileMark(size=state.size, mtime_ns=state.mtime_ns) if state and state.size else None


def is_as_written(sidecar: Sidecar, state: FileState | None) -> bool:
    """True if the CSV in ``state`` is the one ``sidecar`` was last written for."""
    return sidecar.file == mark_of(state)


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
        advice="The next load puts the file right, keeping a copy, and fetches those bars again.",
    )
