"""Loads in processes that can be killed, without the seconds that a start of `ktrdr` takes: a server imports everything once
and forks a child for each load.

`ForkServer` and `LoadForks` are the end for tests. The other end, ``python -m ktrdr_pipelines_tests.load_forks``, reads one JSON
object a line: ``{"load": {...}}`` forks and answers with the pid, ``{"wait": pid}`` with its exit status, ``{"warm": 0}`` imports
what a first load imported. It starts no thread and opens no database: a child of it is as good as a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktrdr_pipelines.ib.clock import Reading

ROOT = Path(__file__).parents[1]
SPEED = 100
"""The ledger's clock runs so much faster: ten requests a second."""


class FastClock:
    """The machine's boot clock, ``speed`` times as fast; the same in every process. For the ledger."""

    def __init__(self, speed: float) -> None:
        self._speed = speed

    def now_s(self) -> float:
        return self.read().wall_s

    def read(self) -> Reading:
        boot_s = time.clock_gettime(time.CLOCK_MONOTONIC) * self._speed
        return Reading(1_700_000_000 + boot_s, boot_s, "fast")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / self._speed)


class ForkServer:
    """The process whose children load; ``folder`` is its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "ktrdr_pipelines_tests.load_forks"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def ask(self, what: Mapping[str, object]) -> int:
        """Send one line; the number answered."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def warm_up(self) -> None:
        """Import what a first load has imported meanwhile: later children start in half the time."""
        self.ask({"warm": 0})

    def close(self) -> None:
        """End it, and with it nothing else: children are waited for by who started them."""
        self._process.communicate(timeout=30)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class LoadForks:
    """Starts loads of stocks against the gateway on ``port``, with data, Dagster home and logs in ``folder``."""

    def __init__(self, server: ForkServer, port: int, folder: Path) -> None:
        self._server = server
        self._common = {"port": port, "folder": str(folder)}

    def start(self, symbol: str, timeframe: str, start: str, end: str, **more: object) -> int:
        """Begin a load; the pid of its process."""
        job = {"symbol": symbol, "timeframe": timeframe, "start": start, "end": end, **self._common, **more}
        return self._server.ask({"load": job})

    def wait(self, pid: int) -> int:
        """The exit status of a load: 0, 1 with failed windows, minus the signal that killed it."""
        return self._server.ask({"wait": pid})


def run_load(job: Mapping[str, Any]) -> int:
    """One load as `ktrdr ib-load` does it, but for the parsing and the ledger's clock. The exit code."""
    from ktrdr_pipelines.ib.history import IBHistory
    from ktrdr_pipelines.orchestration.door import Door
    from ktrdr_pipelines.orchestration.instance import open_instance
    from ktrdr_pipelines.orchestration.resources import GatewayResource
    from ktrdr_pipelines.orchestration.runs import execute_load
    from ktrdr_pipelines.series import Series, parse_timeframe, stock
    from ktrdr_pipelines.settings import load_settings
    from ktrdr_pipelines_tests.fakes import window

    folder, clock = Path(job["folder"]), FastClock(SPEED)
    settings = load_settings(
        ib_port=job["port"],
        data_dir=folder / "data",
        dagster_home=folder / job.get("home", "home"),
        ib_retry_waits_s=(0.1, 0.1, 0.1),
        history_limits=job.get("limits", "classic"),
    )
    series = Series(stock(job["symbol"]), parse_timeframe(job["timeframe"]))
    address = GatewayResource.of(settings).address()
    with (
        IBHistory(address, clock=clock, sleep=clock.sleep) as history,
        open_instance(settings) as instance,
    ):
        report, _ = execute_load(
            settings,
            instance,
            series,
            window(job["start"], job["end"]),
            door=Door(history=history),
            origin="cli",
            mode=job.get("mode", "full"),
        )
    for failure in report.failures:
        print(failure.error, file=sys.stderr)
    return 1 if report.failures else 0


def serve() -> None:
    """Answer the lines of stdin until it ends."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    for name in ("loading", "orchestration.runs"):
        importlib.import_module(f"ktrdr_pipelines.{name}")
    known, learnt = set(sys.modules), Path("imported.json")
    print("ready", flush=True)
    for line in sys.stdin:
        what = json.loads(line)
        if "wait" in what:
            answer = os.waitstatus_to_exitcode(os.waitpid(what["wait"], 0)[1])
        elif "warm" in what:
            answer = 0
            for name in json.loads(learnt.read_text()):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        else:
            answer = os.fork()
            if not answer:
                _run_child(what["load"], known, learnt)
        print(answer, flush=True)


def _run_child(job: Mapping[str, Any], known: set[str], learnt: Path) -> None:
    code = 70
    signal.alarm(150)  # no child outlives a test that failed
    try:
        log = os.open(f"{job['folder']}/loads.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run_load(job)
        if not learnt.exists():
            # Not the client library: it must be imported in the thread that uses it.
            names = [n for n in sys.modules if n not in known and n.split(".")[0] not in ("ib_insync", "eventkit")]
            learnt.write_text(json.dumps(names))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
