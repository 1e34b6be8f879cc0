"""One load of a series at a time, from whatever process and Dagster home it comes.

Two loads side by side would lose nothing (each write holds the lock in `paths.py`), but they would ask IB for the same bars
twice. Dagster's pool does not part them: on SQLite two processes can claim its one slot in the same instant, and another
Dagster home has a pool of its own. Readers and `ktrdr adopt` need no turn.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.store.paths import explained

_LOOK_AGAIN_S = 0.2
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def taking_turn(
    data_dir: Path,
    series: Series,
    *,
    on_wait: Callable[[Path], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Be the one load of ``series`` inside the block, after waiting for as long as another one goes on.

    ``on_wait`` is told once, with the lock's file, that there is another one. Its end frees the turn, however it ends. In a
    folder that cannot be written there are no turns: a load there can do no more than find that nothing is missing.

    Raises:
        StoreError: the disk refuses for another reason.
    """
    path = data_dir / f".{series.name}.load.lock"
    # The block may be left in another thread than it was entered in: a generator's end is where it is collected.
    lock: FileLock | None = FileLock(path, timeout=0, thread_local=False)
    with explained(path, f"preparing the files of {series}"):
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        except OSError as refusal:
            if refusal.errno not in _UNWRITABLE:
                raise
            lock = None
    if lock is not None:
        _acquire(lock, lambda: on_wait(path), sleep)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(lock: FileLock, tell: Callable[[], None], sleep: Callable[[float], None]) -> None:
    has_told = False
    while True:
        try:
            lock.acquire()
        except Timeout:
            if not has_told:
                tell()
            has_told = True
            sleep(_LOOK_AGAIN_S)
        else:
            return
