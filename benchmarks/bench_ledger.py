"""How long the pacing ledger takes to decide: alone, with four processes on one file, and beside fifty waiters of all classes.

    python benchmarks/bench_ledger.py

Each cycle acquires a grant from a ledger that holds 40 requests, and hands it back, so that the budget never runs out and only
the ledger is measured: two transactions, each written through to the disk. Compare ratios, not milliseconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rows import print_row

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.ledger import Grant, open_ledger
from ktrdr_pipelines.ib.pacing.rules import Ask

CYCLES = 1500
PROCESSES = 4
LOGIN = "bench"

Barrier = multiprocessing.synchronize.Barrier
Results = multiprocessing.SimpleQueue  # of (start, end, seconds of each acquire)


def run_cycles(directory: Path, number: int, barrier: Barrier, results: Results) -> None:  # type: ignore[type-arg]
    ledger = open_ledger(directory, LOGIN)
    ledger.snapshot()
    barrier.wait()
    took_s = []
    start = time.monotonic()
    for cycle in range(CYCLES):
        began = time.perf_counter()
        grant = ledger.try_acquire(Ask(f"{number} {cycle}", f"{number}"), work=WorkClass.TAIL)
        took_s.append(time.perf_counter() - began)
        if not isinstance(grant, Grant):
            raise SystemExit(f"the budget ran out, which it must not: {grant}")
        grant.give_back()
    results.put((start, time.monotonic(), took_s))


def measure(processes: int) -> tuple[float, float, float]:
    """Acquires per second of all together, median and longest acquire in milliseconds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        ledger = open_ledger(directory, LOGIN)
        for number in range(40):
            with ledger.acquire(Ask(f"past {number}", f"past {number}"), work=WorkClass.TAIL) as grant:
                grant.sent()
        results: Results = context.SimpleQueue()  # type: ignore[type-arg]
        barrier = context.Barrier(processes)
        children = [
            context.Process(target=run_cycles, args=(directory, number, barrier, results))
            for number in range(processes)
        ]
        for child in children:
            child.start()
        runs = [results.get() for _ in children]
        for child in children:
            child.join()
        ledger.close()
    span_s = max(end for _, end, _ in runs) - min(start for start, _, _ in runs)
    took_s = [seconds for _, _, each in runs for seconds in each]
    return processes * CYCLES / span_s, statistics.median(took_s) * 1e3, max(took_s) * 1e3


def measure_full(waiters: int) -> dict[WorkClass, float]:
    """Median milliseconds of one refusal for each class, when sixty requests are in the ledger and ``waiters`` wait."""
    classes = list(WorkClass)
    with tempfile.TemporaryDirectory() as folder, open_ledger(Path(folder), LOGIN) as ledger, ExitStack() as queue:
        for number in range(60):
            work = WorkClass.INTERACTIVE if number < 40 else WorkClass.TAIL
            with ledger.acquire(Ask(f"past {number}", f"past {number}"), work=work) as grant:
                grant.sent()
        for number in range(waiters):
            ask = Ask(f"waiter {number}", f"waiter {number % 9}")
            queue.enter_context(ledger.line_up(ask, work=classes[number % 3])).look()
        found: dict[WorkClass, float] = {}
        for work in classes:
            took_s = []
            for _ in range(200):
                began = time.perf_counter()
                ledger.try_acquire(Ask("wanted", "wanted"), work=work)
                took_s.append(time.perf_counter() - began)
            found[work] = statistics.median(took_s) * 1e3
    return found


def main() -> None:
    alone, together = measure(1), measure(PROCESSES)
    print_row(
        f"decisions of the ledger a second, {PROCESSES} processes", together[0], "decisions", against=alone[0], of="alone"
    )  # fmt: skip
    for name, (_, median_ms, longest_ms) in (("alone", alone), (f"{PROCESSES} processes", together)):
        print(f"{name:>12}: median {median_ms:.2f} ms, longest {longest_ms:.1f} ms")
    for waiters in (0, 50):
        shown = ", ".join(f"{work} {median_ms:.2f} ms" for work, median_ms in measure_full(waiters).items())
        print(f"{waiters:>2} waiters, 60 requests: {shown}")


if __name__ == "__main__":
    main()
