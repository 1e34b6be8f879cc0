"""The worker of the REST API, interrupted once at every single line that it executes; started by `test_worker.py`.

Prints a JSON list with one item for each place: what the worker told meanwhile of three commands.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
from types import FrameType
from typing import Any

from ktrdr_pipelines.api import worker

COMMANDS = [
    {
        "symbol": symbol,
        "timeframe": "1d",
        "mode": "full",
        "start": None,
        "end": None,
        "sec_type": "",
        "exchange": "",
        "currency": "",
        "con_id": 0,
        "run_id": run_id,
    }
    for symbol, run_id in (("AAPL", "1"), ("NOSUCH SYMBOL?", "2"), ("MSFT", "3"))
]


class Report:
    failures: tuple[object, ...] = ()


class Result:
    report = Report()
    run_ids = ("run",)

    def as_dict(self) -> dict[str, str]:
        return {"status": "success"}


def load(symbol: str, *_args: object, **_values: object) -> Result:
    """A load that takes no time; one of a symbol that is none is refused."""
    if "?" in symbol:
        raise worker.KtrdrError("no such symbol")
    return Result()


def interrupt_at(place: int) -> list[dict[str, Any]] | None:
    """What is told of all commands with an interruption at the ``place``-th line; None if fewer lines are executed."""
    out = io.StringIO()
    waiting = list(COMMANDS)
    lines = 0

    def next_command() -> dict[str, Any] | None:
        command = waiting.pop(0) if waiting else None
        return command  # noqa: RET504 - a line on which the command is taken and not yet given

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in (worker.__file__, __file__) or frame.f_code is worker._interrupt.__code__:
            return None
        if event == "line":
            lines += 1
            if lines == place:
                signal.raise_signal(signal.SIGINT)
        return trace

    signal.signal(signal.SIGINT, worker._interrupt)
    sys.settrace(trace)
    try:
        worker.serve(next_command, worker.Teller(out), threading.Event())
    finally:
        sys.settrace(None)
    return [json.loads(line) for line in out.getvalue().splitlines()] if lines >= place else None


def main() -> None:
    worker.load_series = load  # type: ignore[assignment]
    told = []
    place = 1
    while (events := interrupt_at(place)) is not None:
        told.append(events)
        place += 1
    print(json.dumps(told))


if __name__ == "__main__":
    main()
