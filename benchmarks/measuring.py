"""Clocks of the benchmarks: CPU and wall time, memory and bytes of this process and of child processes, side by side."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Spent:
    """What a process took; ``output`` is its stdout."""

    wall_s: float
    cpu_s: float
    memory_mb: float
    """Its peak. At least that of the process that started it: start processes from small ones."""
    output: str


def run(command: Sequence[object], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Spent:
    """Run ``command`` to its end.

    Raises:
        SystemExit: it failed; with its output.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], env=environment, cwd=cwd, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode:
            raise SystemExit(f"{command[1:6]} ended with {child.returncode}:\n{out.read()}{err.read()[-3000:]}")
        unit = 1 << (20 if sys.platform == "darwin" else 10)
        return Spent(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, out.read())


def alternate(*ways: Callable[[], Spent], repeats: int = REPEATS) -> list[Spent]:
    """The medians of ``repeats`` runs of each of ``ways``, one after the other; the output is that of the last run."""
    found: list[list[Spent]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, results in zip(ways, found, strict=True):
            results.append(way())
    return [
        Spent(
            statistics.median(each.wall_s for each in results),
            statistics.median(each.cpu_s for each in results),
            statistics.median(each.memory_mb for each in results),
            results[-1].output,
        )
        for results in found
    ]


def best(call: Callable[[], object], repeats: int = REPEATS, clock: Callable[[], float] = time.process_time) -> float:
    """The least seconds of ``repeats`` calls, by default of CPU."""
    found = []
    for _ in range(repeats):
        began = clock()
        call()
        found.append(clock() - began)
    return min(found)


def best_of_each(*calls: Callable[[], object], repeats: int = 5) -> list[float]:
    """The least CPU seconds of each of ``calls``, made alternately."""
    found = [[best(call, 1) for call in calls] for _ in range(repeats)]
    return [min(column) for column in zip(*found, strict=True)]


def memory_mb(field: str) -> float:
    """Resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its peak.

    Read from /proc, because getrusage reports a forked child's peak as at least its parent's; where there is no /proc
    both are getrusage's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def bytes_written() -> int:
    """Bytes that this process has handed to the system so far, sockets included (Linux only)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def memory_folder() -> Path | None:
    """A folder in memory, where writes wait for no disk; None (the usual folder) where the system has none."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) else None
