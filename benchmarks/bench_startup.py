"""What commands cost before their first request: CPU and memory, against bare imports and Dagster's instance in the same run.

Run `python benchmarks/bench_startup.py` from the project's folder. Each command is a process of its own, with a simulated
gateway at latency 0; commands and their rivals take turns, the least of `REPEATS` counts, and CPU time is compared, so that a
busy machine does not matter. Figures are printed as ``row: ...`` lines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPEATS = 3
IMPORTS = "import dagster, pandas, pandera.pandas, numpy, ib_insync"
INSTANCE = "with dagster.DagsterInstance.from_config({home!r}) as instance: instance.get_runs(limit=1)"
LOCATION = "import ktrdr_pipelines.definitions"
LONG_LOAD = ("AAPL", "1m", "--start", "2024-01-02", "--end", "2024-03-02")
"""42 requests with the specification's table."""
JOBS = {
    "two months of 1m": ("MSFT", "1m", "--start", "2024-01-02", "--end", "2024-03-02"),
    "two years of 1h": ("MSFT", "1h", "--start", "2022-01-01", "--end", "2024-01-01"),
    "ten years of 1d": ("MSFT", "1d", "--start", "2014-01-01", "--end", "2024-01-01"),
}


@dataclass(frozen=True, slots=True)
class Spent:
    """The cost of one process."""

    cpu_s: float
    memory_mb: float


def spend(command: Sequence[str], environment: Mapping[str, str]) -> Spent:
    """Run ``command`` to its end.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{output.read()[-3000:]}")
    return Spent(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)))


@contextmanager
def simulator() -> Iterator[int]:
    """The port of a simulated gateway, a process of its own: children count the memory of the process that starts them."""
    command = [sys.executable, "-m", "ktrdr_pipelines.cli.main", "simulator", "--port", "0", "--no-judge"]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    try:
        yield int(gateway.stdout.readline().partition("127.0.0.1:")[2].partition(",")[0])
    finally:
        gateway.terminate()
        gateway.wait()


class Commands:
    """Commands of the project and rival programs, with data, records and gateway of their own."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._made = folder, 0
        self._environment = os.environ | {
            "IB_HOST": "127.0.0.1",
            "IB_PORT": str(port),
            "DAGSTER_HOME": str(folder / "home"),
            "KTRDR_DATA_DIR": str(folder / "data"),
        }
        self.rival = [sys.executable, "-c", f"{IMPORTS}\n{INSTANCE.format(home=str(folder / 'home'))}"]

    def ktrdr(self, *arguments: str) -> list[str]:
        """A command of the project."""
        return [sys.executable, "-m", "ktrdr_pipelines.cli.main", *arguments]

    def run(self, command: Sequence[str], **settings: str) -> Spent:
        """One run of ``command``."""
        return spend(command, self._environment | settings)

    def run_fresh(self, command: Sequence[str], **settings: str) -> Spent:
        """One run in a new folder of bars, with an empty ledger: no wait for what other runs requested."""
        self._made += 1
        shutil.rmtree(self._folder / "home" / "ib", ignore_errors=True)
        return self.run(command, KTRDR_DATA_DIR=str(self._folder / f"data{self._made}"), **settings)

    def least(self, command: Sequence[str]) -> tuple[Spent, Spent]:
        """``command`` and the rival in turns: the cheapest run of each."""
        runs = [(self.run(command), self.run(self.rival)) for _ in range(REPEATS)]
        return min((a for a, _ in runs), key=lambda s: s.cpu_s), min((b for _, b in runs), key=lambda s: s.cpu_s)


def show_cpu(what: str, mine: Spent, rival: Spent, reach: str) -> None:
    sys.stdout.write(
        f"row: {what}; measured {mine.cpu_s:.2f} s; against {rival.cpu_s:.2f} s (imports and the instance); reach {reach}\n"
    )
    sys.stdout.flush()


def measure(commands: Commands) -> None:
    held = commands.ktrdr("ib-load", *JOBS["two years of 1h"][:2], "--mode", "full", *JOBS["two years of 1h"][2:])
    commands.run(held, KTRDR_HISTORY_LIMITS="current")
    show_cpu("load with nothing to do, CPU", *commands.least(held), "at most 1.3 times")
    for what, arguments in JOBS.items():
        command = commands.ktrdr("ib-load", *arguments[:2], "--mode", "full", *arguments[2:])
        runs = [
            (commands.run_fresh(command, KTRDR_HISTORY_LIMITS="current"), commands.run(commands.rival))
            for _ in range(REPEATS)
        ]
        mine, rival = (min(each, key=lambda s: s.cpu_s) for each in zip(*runs, strict=True))
        show_cpu(f"{what} with current limits, CPU", mine, rival, "at most 1.3 times")
    for what, command in (
        ("dry run", [*held, "--dry-run"]),
        ("ktrdr gaps SYMBOL TF", commands.ktrdr("gaps", *JOBS["two years of 1h"][:2])),
        ("ktrdr ib status", commands.ktrdr("ib", "status")),
    ):
        show_cpu(f"{what}, CPU", *commands.least(command), "at most 1.3 times")
    help_page = min(commands.run(commands.ktrdr("--help")).cpu_s for _ in range(REPEATS))
    sys.stdout.write(f"row: ktrdr --help, CPU; measured {help_page:.2f} s; reach at most 0.3 s\n")
    long = commands.run_fresh(commands.ktrdr("ib-load", *LONG_LOAD[:2], "--mode", "full", *LONG_LOAD[2:]))
    location = commands.run([sys.executable, "-c", f"{IMPORTS}\n{LOCATION}"])
    sys.stdout.write(
        f"row: peak memory of a load of 42 requests; measured {long.memory_mb:.0f} MB; "
        f"against {location.memory_mb:.0f} MB (the code location with its libraries); reach at most 1.3 times\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, simulator() as port:
        measure(Commands(Path(folder), port))


if __name__ == "__main__":
    main()
