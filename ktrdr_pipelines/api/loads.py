"""Loads that were asked for over the REST API: queued, executed one after the other by `worker.py`, remembered.

One at a time, because only one step at a time may talk to the gateway anyway. The queue is bounded, and kept on disk: what was
accepted is executed, also after the server was stopped or killed. A load like one that is queued or going is not made twice.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import IO, Any

from filelock import FileLock, Timeout

from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import InputError, StoreError, TransientError
from ktrdr_pipelines.settings import Settings, as_environment

log = logging.getLogger(__name__)

QUEUE_LIMIT = 256
KEPT = 1000
"""How many finished loads are remembered."""
RETRY_AFTER_S = 10
END_PATIENCE_S = 15.0
WORKER = (sys.executable, "-m", "ktrdr_pipelines.api.worker")


class QueueFull(TransientError):
    """So many loads wait that another one is not accepted."""

    family = "busy"


@dataclass(frozen=True)
class LoadOrder:
    """What is to be loaded, checked and in one spelling; two equal orders are one load."""

    symbol: str
    timeframe: str
    mode: str
    start: str | None = None
    end: str | None = None
    sec_type: str = ""
    """This and the next three: which contract a new symbol means (`ib.contracts.Choice`)."""
    exchange: str = ""
    currency: str = ""
    con_id: int = 0


@dataclass
class LoadRecord:
    """One load from its acceptance on. ``run_id`` is its Dagster run's id as well, unless the run had to be made again."""

    run_id: str
    order: LoadOrder
    status: str = "queued"
    """queued, running, or as it ended: success, partial, failed."""
    accepted_at: str = ""
    accepted_ns: int = 0
    """The same to the nanosecond: the order of the queue."""
    started_at: str | None = None
    ended_at: str | None = None
    requests_planned: int = 0
    requests_done: int = 0
    bars: int = 0
    windows_failed: int = 0
    waiting_for: str | None = None
    waiting_until: str | None = None
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    """Why nothing, or not everything, could be loaded."""
    run_ids: list[str] = field(default_factory=list)
    attempts: int = 0
    deaths: int = 0
    """How often the worker died under it."""

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "running")


class Loads:
    """The queue and its worker. `start` before use, `stop` at the end; safe for threads."""

    def __init__(
        self, settings: Settings, *, queue_limit: int = QUEUE_LIMIT, worker_command: Sequence[str] = WORKER
    ) -> None:
        self._settings = settings
        self._worker_command = worker_command
        self._limit = queue_limit
        self._folder = settings.dagster_home / "api_loads"
        self._lock = threading.Condition()
        self._only_one: FileLock | None = None
        self._queue: deque[LoadRecord] = deque()
        self._records: dict[str, LoadRecord] = {}
        self._going: dict[LoadOrder, LoadRecord] = {}
        self._ended: dict[str, Future[None]] = {}
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._worker: subprocess.Popen[str] | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take up what an earlier server accepted and did not finish.

        Raises:
            InputError: another server uses this Dagster home. StoreError: it cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._only_one = FileLock(self._folder / ".lock", timeout=0)
            self._only_one.acquire()
        except Timeout:
            raise InputError(
                f"another REST API serves {self._settings.dagster_home}",
                advice="End it first, or set DAGSTER_HOME to another folder.",
            ) from None
        except OSError as error:
            raise StoreError(
                f"{self._folder} cannot be written: {error.strerror or error}", advice="Make DAGSTER_HOME writable."
            ) from None
        for record in self._read_kept():
            self._records[record.run_id] = record
            if not record.is_over:
                record.status = "queued"
                self._enqueue(record)
        self._thread = threading.Thread(target=self._work, daemon=True, name="loads")
        self._thread.start()

    def stop(self) -> None:
        """End the worker. A load that is going is interrupted, and goes on with the next server. Harmless when repeated."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify_all()
            worker = self._worker
        if worker is not None:
            _end(worker)
        if self._thread is not None:
            self._thread.join(END_PATIENCE_S)
        if self._only_one is not None:
            self._only_one.release()

    # -- asking -----------------------------------------------------------------------------------------------------

    def submit(self, order: LoadOrder) -> tuple[LoadRecord, bool]:
        """The load of ``order``, and whether it is a new one: an equal one that is queued or going is the same.

        Raises:
            QueueFull: nothing was accepted; ask again later. StoreError: it cannot be kept on disk, so it was not accepted.
        """
        with self._lock:
            if (same := self._going.get(order)) is not None:
                return same, False
            if len(self._queue) >= self._limit or self._is_stopping:
                raise QueueFull(
                    f"{len(self._queue)} loads are waiting already"
                    if not self._is_stopping
                    else "the server is ending",
                    advice=f"Nothing was accepted. Ask again in {RETRY_AFTER_S} s.",
                )
            record = LoadRecord(str(uuid.uuid4()), order, accepted_at=_now(), accepted_ns=time.time_ns())
            try:
                self._keep(record)
            except OSError as error:
                raise StoreError(
                    f"the load cannot be kept in {self._folder}: {error.strerror or error}",
                    advice="Nothing was accepted. Free some space, or make the folder writable.",
                ) from None
            self._records[record.run_id] = record
            self._enqueue(record)
            self._lock.notify_all()
            return record, True

    def find(self, run_id: str) -> LoadRecord | None:
        """The load called ``run_id``."""
        with self._lock:
            return self._records.get(run_id)

    def position(self, record: LoadRecord) -> int | None:
        """How many loads are before ``record`` in the queue; None when it waits no more."""
        with self._lock:
            return next((i for i, each in enumerate(self._queue) if each is record), None)

    def ended(self, record: LoadRecord) -> Future[None]:
        """Done when ``record`` is over."""
        with self._lock:
            return self._ended.get(record.run_id) or _done()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _must_stop(self) -> bool:
        return self._is_stopping

    def _enqueue(self, record: LoadRecord) -> None:
        self._queue.append(record)
        self._going[record.order] = record
        self._ended[record.run_id] = Future()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._is_stopping:
                    self._lock.wait()
                if self._is_stopping:
                    return
                record = self._queue.popleft()
                record.status, record.started_at, record.attempts = "running", _now(), record.attempts + 1
            self._keep_quietly(record)
            try:
                self._execute(record)
            except Exception as error:  # noqa: BLE001 - the worker is gone or talks nonsense; those behind must not wait for ever
                self._discard_worker()
                with self._lock:
                    if self._must_stop():
                        return  # it stays on disk as running: the next server takes it up
                    record.deaths += isinstance(error, OSError)
                    if record.deaths == 1 and isinstance(error, OSError):
                        # Killed from outside, as for want of memory: what it loaded is kept, and the rest is worth another try.
                        log.error(
                            "the process that executes loads ended (%s): load %s is tried once more",
                            error,
                            record.run_id,
                        )
                        record.status, record.waiting_for, record.waiting_until = "queued", None, None
                        self._queue.appendleft(record)
                        continue
                    log.error("the process that executes loads failed: %s", error)
                    record.status = "failed"
                    record.problem = {
                        "kind": "transient",
                        "message": "the process that executed this load ended unexpectedly; what was loaded is kept",
                        "advice": "Ask again to go on. The server's log may say more.",
                    }
            self._finish(record)

    def _execute(self, record: LoadRecord) -> None:
        """Have the worker execute ``record``, and take note of what it tells."""
        order = record.order
        # A second attempt is another run: Dagster has one of this id already.
        run_id = record.run_id if record.attempts == 1 else str(uuid.uuid4())
        command = {**asdict(order), "run_id": run_id}
        worker = self._provide_worker()
        commands, events = _pipes(worker)
        commands.write(json.dumps(command) + "\n")
        commands.flush()
        for line in events:
            event = json.loads(line)
            if event["run_id"] != run_id:
                log.error(
                    "what the worker says of run %s is left out, run %s is going: %s", event["run_id"], run_id, line
                )
                continue
            with self._lock:
                _note(record, event)
            if record.is_over:
                return
        raise OSError("it ended in the middle of a load")

    def _finish(self, record: LoadRecord) -> None:
        with self._lock:
            record.ended_at, record.waiting_for, record.waiting_until = _now(), None, None
            self._going.pop(record.order, None)
            ended = self._ended.pop(record.run_id, None)
            over = [run_id for run_id, each in self._records.items() if each.is_over]
            forgotten = over[: max(0, len(over) - KEPT)]
            for run_id in forgotten:
                del self._records[run_id]
        self._keep_quietly(record)
        for run_id in forgotten:
            with suppress(OSError):
                (self._folder / f"{run_id}.json").unlink(missing_ok=True)
        if ended is not None:
            with suppress(InvalidStateError):  # whoever waited has cancelled it
                ended.set_result(None)

    def _provide_worker(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._is_stopping:
                raise OSError("the server is ending")
            if self._worker is not None and self._worker.poll() is None:
                return self._worker
            environment = {**os.environ, **as_environment(self._settings)}
            environment.pop("KTRDR_API_TOKEN", None)
            self._worker = subprocess.Popen(
                self._worker_command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C at the server's terminal is the server's to handle
            )
            return self._worker

    def _discard_worker(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            _end(worker)

    def _keep(self, record: LoadRecord) -> None:
        path = self._folder / f"{record.run_id}.json"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _keep_quietly(self, record: LoadRecord) -> None:
        try:
            self._keep(record)
        except OSError as error:
            log.error("the state of load %s could not be kept: %s", record.run_id, error)

    def _read_kept(self) -> list[LoadRecord]:
        """Every load on disk, in the order in which they were accepted; files that cannot be read are told and left alone."""
        found = []
        known = {each.name for each in fields(LoadRecord)}
        for path in self._folder.glob("*.json"):
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                order = LoadOrder(**raw.pop("order"))
                found.append(LoadRecord(order=order, **{k: raw[k] for k in raw if k in known}))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.error("%s is no record of a load: %s", path, error)
        return sorted(found, key=lambda record: record.accepted_ns)


def _note(record: LoadRecord, event: dict[str, Any]) -> None:
    """What one line of the worker says about ``record``."""
    kind = event["event"]
    if kind == "planned":
        record.requests_planned = event["requests"]
    elif kind == "fetched":
        record.requests_done, record.requests_planned = event["done"], event["planned"]
        record.bars += event["rows"]
        record.waiting_for = record.waiting_until = None
    elif kind == "window_failed":
        record.windows_failed += 1
    elif kind == "waiting":
        record.waiting_for, record.waiting_until = event["reason"], event["until"]
    elif kind == "refused":
        record.problem = {key: event[key] for key in ("kind", "message", "advice", "code")}
        record.status = "failed"
    elif kind == "done":
        record.result, record.run_ids, record.problem = event["result"], event["run_ids"], event["problem"]
        record.status = event["result"]["status"]


def _pipes(worker: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if worker.stdin is None or worker.stdout is None:
        raise OSError("a process without pipes")
    return worker.stdin, worker.stdout


def _end(worker: subprocess.Popen[str]) -> None:
    """End the worker as it expects it, by ending its input; by force when it does not listen."""
    with suppress(OSError):
        _pipes(worker)[0].close()
    try:
        worker.wait(END_PATIENCE_S)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    with suppress(OSError):
        _pipes(worker)[1].close()


def _done() -> Future[None]:
    over: Future[None] = Future()
    over.set_result(None)
    return over


def _now() -> str:
    return format_instant(datetime.now(UTC))
