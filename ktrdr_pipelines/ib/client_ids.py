"""Client ids, leased so that no two processes of this program use the same one at a gateway.

One lock file per id in a directory per gateway; the kernel drops a lock with its owner, so a killed process frees its id at
once. An id that another program uses shows only at the gateway (326): lease again with ``skip``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.processes import Owner, current_owner


class ClientIds(Enum):
    """The ranges (first, last) of client ids, by what started the process: a sensor never takes an id of the user's range."""

    PERSON = (1, 50)
    DAEMON = (200, 299)

    @property
    def ids(self) -> range:
        return range(self.value[0], self.value[1] + 1)


@dataclass(frozen=True, slots=True)
class LeasedId:
    """One id in use. ``pid`` is 0 where the owner could not be read; ``is_here``: it is certainly a process of this machine, so
    the pid is valid here."""

    client_id: int
    pid: int
    is_here: bool = field(default=False, compare=False)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"client_id": self.client_id, "pid": self.pid or None}


class Lease:
    """A leased client id, until `release`, the end of the ``with`` block, or the end of the process."""

    def __init__(self, client_id: int, lock: FileLock, record: Path) -> None:
        self.client_id = client_id
        self._lock = lock
        self._record = record

    def release(self) -> None:
        """Release the id. Harmless when repeated. Close the connection before: the gateway keeps the id until then."""
        if self._lock.is_locked:
            # While the lock is still this process's: afterwards the record may be the next owner's.
            with suppress(OSError):
                self._record.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lease_client_id(
    ids: ClientIds, directory: Path, *, preferred: int | None = None, skip: Collection[int] = ()
) -> Lease:
    """The first free id of ``ids``, ``preferred`` first (which may lie outside the range), none of ``skip``.

    ``directory`` belongs to one gateway and is created if missing. It has to be local: locks over a network are unreliable.

    Raises:
        TransientError: every id is taken.
        StoreError: the directory cannot be used.
    """
    order = [*([preferred] if preferred is not None else []), *(i for i in ids.ids if i != preferred)]
    for client_id in order:
        if client_id not in skip and (lock := _try_lock(directory, client_id)) is not None:
            record = _record(directory, client_id)
            try:
                record.write_text(json.dumps(asdict(current_owner())), encoding="utf-8")
            except OSError as error:
                lock.release()
                raise _explain(error, directory) from error
            return Lease(client_id, lock, record)
    first, last = ids.value
    raise TransientError(
        f"all client ids from {first} to {last} are in use",
        doing="connecting to the gateway",
        advice="End other processes of this program, or wait for one to finish. If none runs, restart the gateway: it may not "
        "have noticed that their connections ended.",
    )


def in_use(directory: Path) -> list[LeasedId]:
    """The ids of running processes, ascending. Empty if ``directory`` does not exist. Disturbs no lease."""
    if not directory.is_dir():
        return []
    found: list[LeasedId] = []
    for path in directory.glob("*.owner"):
        if not path.stem.isdigit():
            continue
        owner = _read_owner(path)
        alive = None if owner is None else owner.is_alive()
        # Testing the lock takes it for a moment, and another process that tries this id would find it taken: so only where the
        # record does not suffice (another container, or half written).
        if alive or (alive is None and _is_locked(directory, int(path.stem))):
            found.append(LeasedId(int(path.stem), owner.pid if owner else 0, is_here=alive is True))
    return sorted(found, key=lambda leased: leased.client_id)


def _record(directory: Path, client_id: int) -> Path:
    return directory / f"{client_id}.owner"


def _try_lock(directory: Path, client_id: int) -> FileLock | None:
    # Not thread-local: a connection may be closed by another thread than the one that opened it.
    lock = FileLock(directory / f"{client_id}.lock", timeout=0, thread_local=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise _explain(error, directory) from error
    return lock


def _is_locked(directory: Path, client_id: int) -> bool:
    lock = _try_lock(directory, client_id)
    if lock is None:
        return True
    lock.release()
    return False


def _read_owner(path: Path) -> Owner | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Owner(str(fields["host"]), int(fields["pid"]), str(fields["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # half written, or just deleted: the lock itself is tested instead


def _explain(error: OSError, directory: Path) -> StoreError:
    return StoreError(
        error.strerror or str(error),
        doing=f"leasing a client id in {directory}",
        advice="Make that directory writable, or choose another state directory.",
    )
