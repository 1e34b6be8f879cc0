"""What the tests of the pacing ledger share: a clock moved by hand, requests, processes, a judge of the rules."""

from __future__ import annotations

import ast
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ktrdr_pipelines.ib.clock import Reading
from ktrdr_pipelines.ib.ledger import (
    Grant,
    Ledger,
)
from ktrdr_pipelines.ib.pacing import Ask, Wait, bars_ask
from ktrdr_pipelines_tests.ledger_worker import LOGIN as LOGIN
from ktrdr_pipelines_tests.ledger_worker import FastClock

ROOT = Path(__file__).parents[1]
FULL_S = 600.5


class HandClock:
    """Wall and boot clock moved by the test."""

    def __init__(self, wall_s: float = 1_700_000_000.0, boot_s: float = 50_000.0, boot_id: str = "boot 1") -> None:
        self.wall_s, self.boot_s, self.boot_id = wall_s, boot_s, boot_id

    def now_s(self) -> float:
        return self.wall_s

    def read(self) -> Reading:
        return Reading(self.wall_s, self.boot_s, self.boot_id)

    def sleep(self, seconds: float) -> None:
        self.wall_s += seconds
        self.boot_s += seconds

    def reboot(self, uptime_s: float, wall_step_s: float) -> None:
        self.boot_id, self.boot_s = self.boot_id + "'", uptime_s
        self.wall_s += wall_step_s


_numbers = itertools.count()


def wish(contract: str = "", end: str = "", *, show: str = "TRADES") -> Ask:
    """A request like no other, unless told."""
    number = next(_numbers)
    return bars_ask(
        contract=contract or f"C{os.getpid()}-{number}", exchange="SMART", what_to_show=show, bar_size="1 hour", duration="1 M",
        end=end or f"e{number}", use_rth=True,
    )  # fmt: skip


def send(ledger: Ledger, ask: Ask | None = None) -> None:
    """Send one request that has to be allowed now."""
    answer = ledger.try_acquire(ask or wish())
    assert isinstance(answer, Grant), answer
    with answer:
        answer.sent()


def fill(ledger: Ledger, count: int = 60) -> None:
    for _ in range(count):
        send(ledger)


def wait_of(ledger: Ledger, ask: Ask | None = None) -> Wait:
    answer = ledger.try_acquire(ask or wish())
    assert isinstance(answer, Wait), "granted too early"
    return answer


def poll(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.005)


def start_python(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def count_violations(sent: list[tuple[float, str, str, int]]) -> list[str]:
    """Every breach of the specification's rules in a log of (time, identity, contract, weight), by sliding each window along."""
    found: list[str] = []
    sent = sorted(sent)
    for number, (at, identity, contract, _) in enumerate(sent):
        before = [row for row in sent[: number + 1] if at - row[0] <= 600]
        if sum(row[3] for row in before) > 60:
            found.append(f"{sum(row[3] for row in before)} units in ten minutes")
        if sum(row[3] for row in before if row[2] == contract and at - row[0] <= 2) >= 6:
            found.append("six of one contract in two seconds")
        if sum(row[1] == identity and at - row[0] < 15 for row in before) > 1:
            found.append("identical within 15 seconds")
    return found


def run_trial(
    directory: Path, *, processes: int, windows: float, speed: float, killed: int, stopped: int
) -> list[list]:
    """Let processes send for ``windows`` times ten minutes of the fast clock; kill and stop some on the way. Logs per process."""
    clock = FastClock(speed)
    logs = [directory / f"{number}.log" for number in range(processes)]
    worker = ("-m", "ktrdr_pipelines_tests.ledger_worker", directory)
    children = [start_python(*worker, log, speed, number + 1) for number, log in enumerate(logs)]
    try:
        for child in children:
            assert child.stdout.readline() == b"ready\n"
        began_s = clock.now_s()
        for child in children:
            child.stdin.write(f"{began_s + windows * FULL_S}\n".encode())
            child.stdin.flush()
        poll(lambda: clock.now_s() >= began_s + 0.5 * FULL_S)
        for child in children[:killed]:
            child.kill()
        for child in children[killed : killed + stopped]:
            child.send_signal(signal.SIGSTOP)
        poll(lambda: clock.now_s() >= began_s + 0.8 * FULL_S)
        for child in children[killed : killed + stopped]:
            child.send_signal(signal.SIGCONT)
        codes = [child.wait(30) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert codes == [-signal.SIGKILL] * killed + [0] * (processes - killed)
    return [
        [(float(a), float(b), float(c), ast.literal_eval(i), ast.literal_eval(k), int(w)) for a, b, c, i, k, w in
         (line.split("\t") for line in log.read_text().splitlines())]
        for log in logs
    ]  # fmt: skip
