"""Loads and commands in processes of their own, without the seconds that a start of `ktrdr` takes: a server imports everything
once and forks a child for each.

`ForkServer`, `LoadForks` and `CommandForks` are the end for tests. The other end, ``python -m ktrdr_pipelines_tests.load_forks
serve``, reads one JSON object a line: ``{"load": {...}}`` and ``{"command": {...}}`` fork and answer with the pid,
``{"wait": pid}`` with its exit status. It starts no thread and opens no database: a child of it is as good as a process of its
own. Before a command nothing of this project was imported but the clock, before a load all of it.

What there is to import is learnt (``... load_forks learn``) from a load that was started like any other; see `Ready`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ktrdr_pipelines.ib.pacing.clock import Reading

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


@dataclass(frozen=True)
class Ready:
    """What one load imported, and a Dagster home that it found empty and initialised."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "ready"

    def modules(self, *, ours: bool) -> list[str]:
        """Names to import in advance, in this order; ``ours``: this project's too."""
        names = json.loads((self.folder / "imported.json").read_text())
        return [name for name in names if ours or name.split(".")[0] != "ktrdr_pipelines"]


def make_ready(folder: Path, port: int) -> None:
    """Fill ``folder`` for `Ready`, with a load from the gateway on ``port``."""
    environment = outer_environment() | {
        "PYTHONPATH": str(ROOT), "IB_PORT": str(port), "KTRDR_DATA_DIR": str(folder / "data"),
        "DAGSTER_HOME": str(folder / "home"), "KTRDR_IN_CONTAINER": "false", "IB_RETRY_WAITS": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "ktrdr_pipelines_tests.load_forks", "learn"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def outer_environment() -> dict[str, str]:
    """This process's variables, but for those that are settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("IB_", "KTRDR_", "DAGSTER_"))}


class ForkServer:
    """The process whose children do the work, with these ``modules`` imported; ``folder`` is its own."""

    def __init__(self, folder: Path, modules: Iterable[str]) -> None:
        command = [sys.executable, "-m", "ktrdr_pipelines_tests.load_forks", "serve"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        self.folder = folder
        self._process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.ask({"import": list(modules)}) == 0

    def ask(self, what: Mapping[str, object]) -> int:
        """Send one line; the number answered."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and with it nothing else: children are waited for by who started them."""
        self._process.communicate(timeout=30)


class Ended(NamedTuple):
    """What is left of a command."""

    returncode: int
    stdout: str
    stderr: str


class CommandForks:
    """Runs `ktrdr` as a person does, each in a process of its own, in ``folder``."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._outputs: dict[int, list[Path]] = {}

    def run(self, *arguments: str, environment: Mapping[str, str]) -> Ended:
        """The command line ``ktrdr ARGUMENTS`` with exactly this environment, until it ends."""
        return self.wait(self.start(*arguments, environment=environment))

    def start(self, *arguments: str, environment: Mapping[str, str]) -> int:
        """Begin it; the pid of its process."""
        outputs = [self._server.folder / f"{name}{len(self._outputs)}" for name in ("out", "err")]
        for path in outputs:
            path.unlink(missing_ok=True)  # of another test
        command = {"arguments": arguments, "environment": dict(environment), "folder": str(self._folder)}
        pid = self._server.ask({"command": command | {"outputs": [str(path) for path in outputs]}})
        self._outputs[pid] = outputs
        return pid

    def stderr_of(self, pid: int) -> str:
        """What it has printed on stderr so far."""
        return self._outputs[pid][1].read_text() if self._outputs[pid][1].exists() else ""

    def wait(self, pid: int) -> Ended:
        """What it came to."""
        code = self._server.ask({"wait": pid})
        out, err = (path.read_text() for path in self._outputs[pid])
        return Ended(code, out, err)


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


# ------------------------------------------------------------------------------------------------ the other end


def run_load(job: Mapping[str, Any]) -> int:
    """One load as `ktrdr ib-load` does it, but for the parsing and the ledger's clock. The exit code."""
    from ktrdr_pipelines.domain.instruments import Series, stock
    from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
    from ktrdr_pipelines.domain.timeframes import parse_timeframe
    from ktrdr_pipelines.ib.history import IBHistory
    from ktrdr_pipelines.orchestration.resources import GatewayResource
    from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint
    from ktrdr_pipelines.orchestration.runs.instance import open_instance
    from ktrdr_pipelines.orchestration.runs.launch import execute_load
    from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
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
        span = window(job["start"], job["end"])
        request = LoadRequest(job["symbol"], series.timeframe, Mode(job.get("mode", "full")), span.start, span.end)
        run = LoadRun(series, request, span, None, "cli")
        report, _ = execute_load(settings, instance, run, entry_point=EntryPoint(history=history))
    for failure in report.failures:
        print(failure.error, file=sys.stderr)
    return 1 if report.failures else 0


def serve() -> Mapping[str, Any]:
    """Answer the lines of stdin until it ends. In the child of a command: what is to be done."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    for line in sys.stdin:
        what = json.loads(line)
        if "wait" in what:
            answer = os.waitstatus_to_exitcode(os.waitpid(what["wait"], 0)[1])
        elif "import" in what:
            answer = 0
            for name in what["import"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            gc.collect()
            gc.freeze()  # children do not touch these pages
        else:
            answer = os.fork()
            if not answer and "load" in what:
                _load_in_child(what["load"])
            if not answer:
                return what["command"]  # type: ignore[no-any-return]
        print(answer, flush=True)
    raise SystemExit


def _load_in_child(job: Mapping[str, Any]) -> None:
    code = 70
    signal.alarm(150)  # no child outlives a test that failed
    try:
        log = os.open(f"{job['folder']}/loads.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run_load(job)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def become(command: Mapping[str, Any]) -> None:
    """Make this process what the start of a command finds."""
    signal.alarm(90)
    for number, path in enumerate([os.devnull, *command["outputs"]]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    sys.argv[1:] = command["arguments"]


def learn() -> None:
    """Load a week, and write down what that imported. The environment says from where and to where."""
    from ktrdr_pipelines.cli.main import main
    from ktrdr_pipelines.orchestration.runs.instance import open_instance
    from ktrdr_pipelines.settings import load_settings

    with open_instance(load_settings()):
        pass
    shutil.copytree("home", "ready")
    sys.argv[1:] = ["ib-load", "AAPL", "1h", "--mode", "full", "--start", "2024-02-05", "--end", "2024-02-10"]
    # A load that fails leaves less to learn: tests are slower, and say what is wrong.
    with contextlib.suppress(SystemExit):
        main()
    # Not the client library: it must be imported in the thread that uses it.
    left_out = ("ib_insync", "eventkit", "ktrdr_pipelines_tests", "__main__")
    names = [name for name in sys.modules if name.split(".")[0] not in left_out]
    Path("imported.json").write_text(json.dumps(names))


if __name__ == "__main__":
    if sys.argv[1] == "learn":
        learn()
    else:
        become(serve())
        from ktrdr_pipelines.cli.main import main

        main()
