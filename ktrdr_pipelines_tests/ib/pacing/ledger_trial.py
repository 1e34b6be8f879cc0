"""Many processes on one ledger, some killed and some stopped at random instants, judged by the simulator's judge.

All of them, the ledger and the judge go by one clock (`SkippingClock`) that leaves out the time in which all of them sleep,
so that hours of waiting take seconds while what happens at once still happens at once. The workers' pipes lead here, as
sockets would to a gateway: a request counts from the moment of its write. Used by a test, and at full size by
`tools/ledger_trial.py`.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import SkippingClock

ROOT = Path(__file__).parents[3]
PROCESSES = 8
WINDOW_S = 600.5
STALL_S = 0.2
"""Real seconds without any output: the process that is stopped has stopped inside a transaction, and all others wait for it."""


@dataclass(eq=False)
class Worker:
    """One process and its last message."""

    process: subprocess.Popen[bytes]
    is_ready: bool = False
    wakes_at_s: float | None = None
    """Sleeps until then; None: at work."""
    stopped_until_s: float | None = None
    will_be_killed: bool = False
    wish: int | None = None
    """Number of the present wish, in the order of all."""
    is_ordinary: bool = False
    """Whether the present wish has to be served in order: the first rush is over, and its process was not stopped."""
    overtaken: int = 0
    received: bytes = b""

    @property
    def is_busy(self) -> bool:
        return self.is_ready and self.wakes_at_s is None and self.stopped_until_s is None

    def send(self, word: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # killed: its end shows by itself


@dataclass
class Result:
    """``sent``: instant and units of each request, in order. ``overtaken``: of each request that was wanted after the first ten
    minutes, and that waited for the budget alone, how many were sent before it though wanted later."""

    sent: list[tuple[float, int]] = field(default_factory=list)
    violations: list[tuple[float, str]] = field(default_factory=list)
    overtaken: list[int] = field(default_factory=list)
    killed: int = 0
    stopped: int = 0
    stalls: int = 0
    """Of those stopped: how many had the ledger's lock, so that all others stood still with them."""
    expired: int = 0

    @property
    def windows(self) -> list[int]:
        """Units sent in each full ten minutes (and the ledger's margin), from the first request on."""
        first_s, last_s = self.sent[0][0], self.sent[-1][0]
        return [
            sum(units for at, units in self.sent if first_s + n * WINDOW_S <= at < first_s + (n + 1) * WINDOW_S)
            for n in range(int((last_s - first_s) / WINDOW_S))
        ]

    @property
    def is_budget_used(self) -> bool:
        """59 of 60 units or more in the mean, and never fewer than 56: one may stay unused beside a request that weighs two, and
        what a killed process was about to send counts as sent."""
        return sum(self.windows) >= 59 * len(self.windows) and min(self.windows) >= 56

    @property
    def is_fair(self) -> bool:
        """No process is overtaken more than once by each other one: before a wish reaches the ledger there is no order."""
        return max(self.overtaken) < PROCESSES


class Trial:
    """Run with `run`. ``incidents`` kills and as many stops are spread over the grants; a killed process is replaced."""

    def __init__(self, directory: Path, *, grants: int, incidents: int, seed: int = 0) -> None:
        self.directory, self.grants = directory, grants
        self.rng = random.Random(seed)
        self.clock = SkippingClock.create(directory / "clock")
        self.judge = PacingJudge()
        self.result = Result(violations=self.judge.violations)
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()
        marks = self.rng.sample(range(grants // 20, grants), 2 * incidents)
        self.kills, self.stops = sorted(marks[::2], reverse=True), sorted(marks[1::2], reverse=True)
        self.wishes = self.starts = 0

    def run(self) -> Result:
        try:
            for _ in range(PROCESSES):
                self.start()
            # Whoever was loaded first must not have the first ten minutes for itself.
            while not all(worker.is_ready for worker in self.workers):
                self.listen(10.0)
            for worker in self.workers:
                worker.send(b"go")
            while len(self.result.sent) < self.grants:
                self.step()
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.communicate()
            self.selector.close()
        return self.result

    def start(self) -> None:
        self.starts += 1
        process = subprocess.Popen(
            [sys.executable, "-m", "ktrdr_pipelines_tests.ib.pacing.ledger_worker", str(self.directory), str(self.starts)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        worker = Worker(process)
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)

    # -- one step: read messages, do harm, let time pass

    def step(self) -> None:
        now_s = self.clock.now_s()
        asleep = [w.wakes_at_s for w in self.workers if w.wakes_at_s is not None and w.stopped_until_s is None]
        pauses = [w.stopped_until_s for w in self.workers if w.stopped_until_s is not None]
        next_s = min(asleep + pauses, default=now_s + STALL_S)
        is_idle = not any(worker.is_busy for worker in self.workers)
        is_heard = self.listen(0.0 if is_idle else min(max(next_s - now_s, 0.0), STALL_S))
        if is_heard:
            return
        if not is_idle and pauses and next_s - now_s > STALL_S:
            self.result.stalls += 1
            next_s = max(pauses)
            for worker in self.workers:
                if worker.stopped_until_s is not None:
                    worker.stopped_until_s = now_s
        elif is_idle:
            self.clock.skip(max(next_s - self.clock.now_s(), 0.0))
        self.wake_due()

    def wake_due(self) -> None:
        """Resume stopped workers and wake sleeping ones whose time has come."""
        now_s = self.clock.now_s()
        for worker in list(self.workers):
            if worker.stopped_until_s is not None and worker.stopped_until_s <= now_s:
                self.resume(worker)
            if worker.wakes_at_s is not None and worker.wakes_at_s <= now_s:
                worker.wakes_at_s = None
                worker.send(b"wake")

    def listen(self, timeout_s: float) -> bool:
        ready = self.selector.select(timeout_s)
        for key, _ in ready:
            worker: Worker = key.data
            data = os.read(key.fd, 65536)
            if not data:
                self.bury(worker)
                continue
            *lines, worker.received = (worker.received + data).split(b"\n")
            for line in lines:
                self.read(worker, *json.loads(line))
        return bool(ready)

    def read(self, worker: Worker, word: str, *more: object) -> None:
        if word == "ready":
            worker.is_ready = True
            if self.result.sent:  # one that takes a dead one's place
                worker.send(b"go")
        elif word == "sleeps":
            worker.wakes_at_s = float(str(more[0]))
        elif word == "wants":
            self.wishes += 1
            worker.wish, worker.overtaken = self.wishes, 0
            is_rush_over = bool(self.result.sent) and self.clock.now_s() > self.result.sent[0][0] + WINDOW_S
            worker.is_ordinary = is_rush_over and worker.stopped_until_s is None
        elif word == "expired":
            self.result.expired += 1
        elif word == "sends":
            self.take(worker, *more)  # type: ignore[arg-type]

    def take(self, worker: Worker, at_s: float, contract: str, identity: str, weight: int, rules: list[str]) -> None:
        now_s = self.clock.now_s()
        if now_s - at_s > 2.0:
            at_s = now_s  # stopped between its look at the clock and the write
        self.judge.judge(at_s, contract, identity, weight)
        self.result.sent.append((at_s, weight))
        if worker.is_ordinary and not {"IDENTICAL", "BURST"} & set(rules):
            self.result.overtaken.append(worker.overtaken)
        for other in self.workers:
            if other.wish is not None and worker.wish is not None and other.wish < worker.wish:
                other.overtaken += 1
        worker.wish = None
        self.do_harm()

    def do_harm(self) -> None:
        count = len(self.result.sent)
        well = [worker for worker in self.workers if worker.is_ready and worker.stopped_until_s is None]
        busy = [worker for worker in well if worker.is_busy]
        victim = self.rng.choice(busy if busy and self.rng.random() < 0.8 else well)
        if self.kills and self.kills[-1] <= count:
            self.kills.pop()
            self.kill(victim)
        elif self.stops and self.stops[-1] <= count and len(well) > PROCESSES // 2:
            self.stops.pop()
            os.kill(victim.process.pid, signal.SIGSTOP)
            self.result.stopped += 1
            # Shorter and longer than a grant is valid, a ticket fresh, and the ten minutes; every third never comes back.
            victim.stopped_until_s = self.clock.now_s() + self.rng.choice((1.0, 5.0, 15.0, 60.0, 300.0, 700.0))
            victim.will_be_killed = self.rng.random() < 0.3
            victim.is_ordinary = False

    def resume(self, worker: Worker) -> None:
        worker.stopped_until_s = None
        if worker.will_be_killed:
            self.kill(worker)
        else:
            os.kill(worker.process.pid, signal.SIGCONT)

    def kill(self, worker: Worker) -> None:
        worker.process.kill()
        self.result.killed += 1

    def bury(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        code = worker.process.wait()
        worker.process.stdout.close()
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert code == -signal.SIGKILL, f"a worker ended by itself with {code}"
        self.start()
