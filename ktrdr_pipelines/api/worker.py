"""The process in which loads of the REST API are executed: one after the other, each as a Dagster run, as `ktrdr ib-load` does.

A process of its own, because runs in threads of one process deadlock and would keep the API from answering. Commands come as
JSON lines on stdin, events go as JSON lines to stdout; everything printed goes to stderr. When stdin ends, so does the process, a
load included: what it loaded is kept. An interruption (SIGINT) ends the load only.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.contracts import Choice
from ktrdr_pipelines.ib.history import Waiting
from ktrdr_pipelines.loading import load_series
from ktrdr_pipelines.progress import Progress
from ktrdr_pipelines.report import Event, Failure, Fetched, Planned
from ktrdr_pipelines.series import Series, format_instant


class Teller(Progress):
    """Progress as lines for the process that reads them, instead of a bar for a person."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(enabled=False)
        self._out = out

    def tell(self, event: str, **values: object) -> None:
        """One line."""
        self._out.write(json.dumps({"event": event, **values}) + "\n")
        self._out.flush()

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


def execute(command: dict[str, Any], teller: Teller) -> None:
    """Load what ``command`` says and tell how it ended, whatever happens but an interruption."""
    try:
        result = load_series(
            command["symbol"],
            command["timeframe"],
            command["mode"],
            start=command["start"],
            end=command["end"],
            choice=Choice(command["sec_type"], command["exchange"], command["currency"], command["con_id"]),
            progress=teller,
            origin="api",
            run_id=command["run_id"],
        )
    except KtrdrError as error:
        teller.tell("refused", **_describe(error))
    except Exception:  # noqa: BLE001 - a bug in one load must not end the others
        traceback.print_exc()
        teller.tell(
            "refused",
            kind="bug",
            message="the load ended with an unforeseen error",
            advice="Its traceback is in the server's log and in the run's log in the Dagster UI. Please report it.",
            code=None,
        )
    else:
        problem = _describe(result.report.failures[0].error) if result.report.failures else None
        teller.tell("done", result=result.as_dict(), run_ids=result.run_ids, problem=problem)


def _describe(error: KtrdrError) -> dict[str, object]:
    return {"kind": error.family, "message": error.message, "advice": error.advice, "code": error.code}


def main() -> int:
    """Serve until stdin ends."""
    # Whatever prints in a load must not get between the lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    is_ending = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        is_ending.set()
        commands.put(None)
        os.kill(os.getpid(), signal.SIGINT)

    teller = Teller(out)
    threading.Thread(target=read, daemon=True, name="commands").start()
    teller.tell("ready")
    while not is_ending.is_set():
        is_loading = False
        try:
            command = commands.get()
            if command is None:
                break
            is_loading = True
            execute(command, teller)
        except KeyboardInterrupt:
            if is_loading and not is_ending.is_set():
                teller.tell(
                    "refused",
                    kind="transient",
                    message="the load was interrupted; what was loaded is kept",
                    advice="Ask again to go on.",
                    code=None,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
