"""The process in which loads of the REST API are executed: one after the other, each as a Dagster run, as `ktrdr ib-load` does.

A process of its own, because runs in threads of one process deadlock and would keep the API from answering. Commands come as
JSON lines on stdin, events go as JSON lines to stdout; everything printed goes to stderr. When stdin ends, so does the process, a
load included: what it loaded is kept. An interruption (SIGINT) ends the load that is going, if one is, and nothing else.

Every event carries the run id of its command, and to each command exactly one end is told, ``done`` or ``refused``, unless the
process itself ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.history import Waiting
from ktrdr_pipelines.loading.report import Event, Failure, Fetched, Planned
from ktrdr_pipelines.services.load import load_series
from ktrdr_pipelines.services.progress import Progress


class Teller(Progress):
    """Progress as lines for the process that reads them, instead of a bar for a person."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(enabled=False)
        self._out = out
        self.run_id = ""
        """Of the command that is executed."""

    def tell(self, event: str, **values: object) -> None:
        """One line.

        Raises:
            KeyboardInterrupt: nobody listens any more, since the server was killed; once, the rest goes nowhere. Its end is no
                failure of the load.
        """
        try:
            self._out.write(json.dumps({"event": event, "run_id": self.run_id, **values}) + "\n")
            self._out.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
            raise KeyboardInterrupt from None

    def show_event(self, series: Series, event: Event) -> None:  # noqa: ARG002 - Progress's signature
        if isinstance(event, Planned):
            self.tell("planned", requests=len(event.requests), gaps=len(event.gaps))
        elif isinstance(event, Fetched):
            self.tell("fetched", done=event.done, planned=event.planned, rows=event.rows)
        elif isinstance(event, Failure):
            self.tell("window_failed", window=str(event.window))

    def show_wait(self, waiting: Waiting) -> None:
        until = format_instant(waiting.until) if waiting.until else None
        self.tell("waiting", until=until, reason=waiting.reason)


End = tuple[str, dict[str, object]]
"""The last event of a command, and its values."""


def execute(command: dict[str, Any], teller: Teller, is_ending: threading.Event) -> None:
    """Load what ``command`` says and tell how it ended, once, whatever happens; nothing if the process ends meanwhile."""
    teller.run_id = command["run_id"]
    try:
        event, values = _load(command, teller, is_ending)
    except KeyboardInterrupt:
        if is_ending.is_set():
            return
        event, values = _refused(
            "transient", "the load was interrupted; what was loaded is kept", "Ask again to go on."
        )
    with suppress(KeyboardInterrupt):  # over already
        teller.tell(event, **values)


def _load(command: dict[str, Any], teller: Teller, is_ending: threading.Event) -> End:
    """The only place where an interruption is heard: see `_interrupt`."""
    if is_ending.is_set():
        raise KeyboardInterrupt
    try:
        result = load_series(LoadRequest.from_config(command), progress=teller, origin="api", run_id=command["run_id"])
    except KtrdrError as error:
        return "refused", _describe(error)
    except Exception:  # noqa: BLE001 - a bug in one load must not end the others
        traceback.print_exc()
        return _refused(
            "bug",
            "the load ended with an unforeseen error",
            "Its traceback is in the server's log and in the run's log in the Dagster UI. Please report it.",
        )
    problem = _describe(result.report.failures[0].error) if result.report.failures else None
    return "done", {"result": result.as_dict(), "run_ids": result.run_ids, "problem": problem}


def _describe(error: KtrdrError) -> dict[str, object]:
    return {"kind": error.family, "message": error.message, "advice": error.advice, "code": error.code}


def _refused(kind: str, message: str, advice: str, code: int | None = None) -> End:
    return "refused", {"kind": kind, "message": message, "advice": advice, "code": code}


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Interrupt the load that is going. By the frame, not by a flag: an interruption that comes right before or after a load
    would else hit what takes the command or tells its end, and lose the one or double the other."""
    if signum == signal.SIGTERM:  # Dagster has it handled like SIGINT from the first run on
        raise SystemExit(128 + signum)
    while frame is not None:
        if frame.f_code is _load.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back


def serve(next_command: Callable[[], dict[str, Any] | None], teller: Teller, is_ending: threading.Event) -> None:
    """Execute one command after the other until there is none, or the process is to end."""
    signal.signal(signal.SIGINT, _interrupt)
    while (command := next_command()) is not None and not is_ending.is_set():
        execute(command, teller, is_ending)


def main() -> int:
    """Serve until stdin ends."""
    # Whatever prints in a load must not get between the lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    is_ending = threading.Event()

    def read() -> None:
        try:
            for line in sys.stdin:
                commands.put(json.loads(line))
        finally:  # whatever it was: who reads no commands any more must not seem to wait for one
            is_ending.set()
            commands.put(None)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=read, daemon=True, name="commands").start()
    serve(commands.get, Teller(out), is_ending)
    return 0


if __name__ == "__main__":
    sys.exit(main())
