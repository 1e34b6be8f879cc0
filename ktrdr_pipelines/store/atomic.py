"""Safe changes of a file: replacement, which a crash leaves undone or done, and growth at the end. Also errors of the disk.

`Disk` is the one seam between the store and the operating system: tests pass one whose n-th call fails or kills the
process. What the bytes mean is in `csv_format.py` and `sidecar.py`; who may write is in `locks.py`. No library: the
atomic-write packages tried take the content as one string and cannot copy a range of the old file inside the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.file_state import FileState

_COPY_BYTES = 1 << 26
_LONGEST_LINE = 8192


@dataclass(frozen=True, slots=True)
class FileRange:
    """The bytes ``start`` to ``end`` of an open file."""

    fd: int
    start: int
    end: int


class SourceChanged(Exception):
    """The file being copied from was changed by another program meanwhile; nothing was replaced."""


class Disk:
    """The system calls by which bytes reach the disk."""

    def create(self, path: Path, mode: int) -> int:
        """A new file for writing; it must not exist."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def open(self, path: Path) -> int:
        """An existing file for writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def copy(self, target: int, source: int, offset: int, count: int) -> int:
        """Append up to ``count`` bytes of ``source`` to ``target``; the number appended. 0 means that ``source`` ended.

        sendfile copies inside the kernel; where it cannot (macOS, odd file systems) the bytes go through memory.
        """
        try:
            return os.sendfile(target, source, offset, min(count, _COPY_BYTES))
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTSOCK):
                raise
        return self.copy_through_memory(target, source, offset, count)

    def copy_through_memory(self, target: int, source: int, offset: int, count: int) -> int:
        """`copy` for file systems without sendfile."""
        data = memoryview(os.pread(source, min(count, 1 << 20), offset))
        written = 0
        while written < len(data):
            written += self.write(target, data[written:])
        return written

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename over ``target``, atomically."""
        source.replace(target)

    def link(self, source: Path, name: Path) -> None:
        """A second name for a file; it must not exist."""
        os.link(source, name)

    def keep(self, source: Path, copy: Path) -> None:
        """Give the file a second name that must not exist; a copy where the file system has no hard links."""
        try:
            self.link(source, copy)
        except OSError as failure:
            if failure.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
            fd = self.create(copy, 0o666)
            try:
                _write_all(self, fd, source.read_bytes())
                self.sync(fd)
            except BaseException:
                self.remove(copy)
                raise
            finally:
                self.close(fd)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Make renames in ``path`` durable. Some network file systems cannot, and refuse with EINVAL."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(fd)


def _write_all(disk: Disk, fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[disk.write(fd, rest) :]


def _copy_all(disk: Disk, fd: int, part: FileRange) -> None:
    """Append ``part`` to ``fd``. Raises SourceChanged when the file it is in ends early."""
    offset = part.start
    while offset < part.end:
        copied = disk.copy(fd, part.fd, offset, part.end - offset)
        if not copied:
            raise SourceChanged
        offset += copied


def _mode_of(path: Path) -> int | None:
    """The permissions of ``path``; None when there is no such file."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def temporary_name(target: Path) -> Path:
    """The temporary file for the new content of ``target``. One name is enough: a writer has ``target``'s lock, and begins by
    removing what a dead writer left."""
    return target.with_name(f".{target.name}.new")


def replace_file(
    disk: Disk,
    target: Path,
    parts: Sequence[bytes | FileRange],
    *,
    still_valid: Callable[[], bool] | None = None,
    examine: Callable[[int], None] | None = None,
    is_durable: bool = True,
) -> FileState:
    """Write ``parts`` one after the other as the new content of ``target``; the new file's state.

    The bytes go to a temporary file in the same directory, are synced, and take the name in one step. When anything fails
    before that step, ``target`` is as before and the temporary file is gone. ``examine`` may read the new content through its
    descriptor before it takes the name. ``target``'s permissions are kept. Callers have the lock of ``target``. Unless it
    ``is_durable``, a crash of the machine may bring the old file back.

    Raises:
        SourceChanged: ``still_valid``, called last, is false, or a range ended early.
        OSError: the disk refuses (`explain_refusal` turns it into a StoreError).
    """
    mode = _mode_of(target)
    temporary = temporary_name(target)
    disk.remove(temporary)
    fd = disk.create(temporary, 0o666)
    try:
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            for part in parts:
                if isinstance(part, bytes):
                    _write_all(disk, fd, part)
                else:
                    _copy_all(disk, fd, part)
            disk.sync(fd)
            state = FileState.of(os.fstat(fd))
            if examine is not None:
                examine(fd)
        finally:
            disk.close(fd)
        if still_valid is not None and not still_valid():
            raise SourceChanged
        disk.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first failure is the one to report; a later write tidies up
            disk.remove(temporary)
        raise
    if is_durable:
        disk.sync_directory(target.parent)
    return state


def append_to_file(disk: Disk, path: Path, before: FileState, data: bytes) -> FileState | None:
    """Write ``data`` after the end of the file at ``path``, which is in the state ``before``, and sync it; the new state.

    None, and nothing is written, where a change in place is refused or would reach further than ``path``: the file is read-only,
    or has a second name (a hard link, such as a backup makes). Replace it then.

    A crash leaves some of ``data``; whatever else fails, the file is cut back to ``before``. Callers have the lock of ``path``.

    Raises:
        SourceChanged: another program changed the file; ``data`` may be in it, or in a file that has lost its name.
        OSError: the disk refuses (`explain_refusal` turns it into a StoreError).
    """
    disk.remove(temporary_name(path))
    fd = _open_in_place(disk, path)
    if fd is None:
        return None
    try:
        stat = os.fstat(fd)
        if stat.st_nlink > 1:
            return None
        if FileState.of(stat) != before:
            raise SourceChanged
        try:
            os.lseek(fd, before.size, os.SEEK_SET)
            _write_all(disk, fd, data)
            written = FileState.of(os.fstat(fd))  # before the sync, which takes long enough for an editor to save
            disk.sync(fd)
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to report; the next write cuts the file
                _cut_back(disk, fd, before, len(data))
            raise
        if written.size != before.size + len(data) or state_of(path) != written:
            raise SourceChanged
        return written
    finally:
        disk.close(fd)


def _open_in_place(disk: Disk, path: Path) -> int | None:
    """An existing file for writing; None where that is refused."""
    try:
        return disk.open(path)
    except OSError as refusal:
        if refusal.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            return None
        raise


def _cut_back(disk: Disk, fd: int, before: FileState, most: int) -> None:
    """Undo an append of up to ``most`` bytes. The old time of change comes back too, so that nothing counts as edited."""
    if 0 < os.fstat(fd).st_size - before.size <= most:
        disk.truncate(fd, before.size)
        os.utime(fd, ns=(before.mtime_ns, before.mtime_ns))


def add_lines(disk: Disk, path: Path, size: int, data: bytes) -> bool:
    """Write ``data`` at the offset ``size`` of a file, which ends after it; the file is made when it is not there. Not synced.
    False, and nothing is written, where a change in place is refused.

    Raises:
        OSError: the disk refuses; part of ``data`` may be there.
    """
    try:
        fd = _open_in_place(disk, path)
    except FileNotFoundError:
        fd = disk.create(path, 0o666)
    if fd is None:
        return False
    try:
        if os.fstat(fd).st_size > size:
            disk.truncate(fd, size)
        os.lseek(fd, size, os.SEEK_SET)
        _write_all(disk, fd, data)
        return True
    finally:
        disk.close(fd)


def cut_unfinished_line(disk: Disk, path: Path, size: int) -> bytes:
    """Cut the file at ``path`` after its last line end, if it is larger than ``size`` and does not end with one: an append was
    interrupted. Returns what was cut; nothing where the file cannot be changed in place. Callers have the lock of ``path``.

    Raises:
        OSError: the disk refuses.
    """
    fd = _open_in_place(disk, path)
    if fd is None:
        return b""
    try:
        now = os.fstat(fd).st_size
        end = end_of_lines(fd, now, size)
        cut = os.pread(fd, now - end, end)
        if cut:
            disk.truncate(fd, end)
        return cut
    finally:
        disk.close(fd)


def end_of_lines(fd: int, size: int, committed: int) -> int:
    """Where the complete lines of a file of ``size`` bytes end, whose writer is known to have finished the first ``committed``
    ones: a longer file may end inside a line while it grows, or after a crash. ``size`` for any other file."""
    if not 0 < committed < size:
        return size
    base = max(committed - 1, size - _LONGEST_LINE)
    end = os.pread(fd, size - base, base).rfind(b"\n") + 1
    return base + end if end else size


def state_of(path: Path) -> FileState | None:
    """The state of the file at ``path``; None when there is none."""
    try:
        return FileState.of(path.stat())
    except FileNotFoundError:
        return None


_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "Free some space and run it again."),
    errno.EDQUOT: ("your disk quota is used up", "Free some space and run it again."),
    errno.EROFS: ("the file system is read-only", "Mount it writable, or set KTRDR_DATA_DIR to a directory that is."),
    errno.EACCES: (
        "permission denied",
        "Make the directory and its files writable for you, or set KTRDR_DATA_DIR to one that is.",
    ),
    errno.EPERM: (
        "the system does not permit it",
        "Is the file immutable (lsattr)? Make it writable, or set KTRDR_DATA_DIR to another directory.",
    ),
    errno.ENAMETOOLONG: ("the file name is too long", "Give the symbol a shorter alias in the universe file."),
    errno.EFBIG: ("the file would be larger than the system allows", "Raise the limit (ulimit -f) and run it again."),
    errno.EIO: ("the disk reports an input/output error", "Check the disk; the system log has details."),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n) and run it again."),
    errno.ENOTDIR: ("part of the path is not a directory", "Check KTRDR_DATA_DIR."),
    errno.EISDIR: ("there is a directory in place of the file", "Move it away and run it again."),
    errno.ENOENT: ("the directory is not there", "Check KTRDR_DATA_DIR, and that its disk is mounted."),
}


def explain_refusal(failure: OSError, path: Path, doing: str) -> StoreError:
    """The StoreError for an OSError of ``path``."""
    observed, advice = _REFUSALS.get(
        failure.errno or 0, (f"the system reports {failure.strerror or failure!s}", "Correct that and run it again.")
    )
    name = failure.filename if isinstance(failure.filename, str) else str(path)
    return StoreError(f"{name}: {observed}", doing=doing, advice=f"{advice} Bars that were on disk are still there.")


def keep_copy(disk: Disk, source: Path, suffix: str) -> Path:
    """Keep ``source`` under its name with ``suffix``, numbered when that name is taken; the path of the copy."""
    copies = [source.with_name(f"{source.name}.{suffix}" + (f"-{n}" if n else "")) for n in range(100)]
    for copy in copies:
        try:
            disk.keep(source, copy)
        except FileExistsError:
            continue
        return copy
    raise FileExistsError(errno.EEXIST, "a hundred copies exist already", str(copies[0]))


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that names ``path`` and what to do."""
    try:
        yield
    except OSError as failure:
        raise explain_refusal(failure, path, doing) from failure
