"""What the tests of the pacing ledger share: a clock moved by hand, requests, processes, a judge of the rules."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.ib.pacing.ledger import (
    Grant,
    Ledger,
)
from ktrdr_pipelines.ib.pacing.rules import Ask, Wait, bars_ask
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import LOGIN as LOGIN

OpenHere = Callable[..., Ledger]
"""The fixture that opens ledgers and closes them with the test."""
ROOT = Path(__file__).parents[3]
FULL_S = 600.5
RULES_ONLY = WorkClass.TAIL
"""The class that leaves nothing to others: for tests of the rules alone."""


class HandClock:
    """Wall and boot clock moved by the test."""

    def __init__(self, wall_s: float = 1_700_000_000.0, boot_s: float = 50_000.0, boot_id: str = "boot 1") -> None:
        self.wall_s, self.boot_s, self.boot_id = wall_s, boot_s, boot_id
        self.true_s = 0.0
        """What passed in truth, whatever is done to the clocks."""

    def now_s(self) -> float:
        return self.wall_s

    def read(self) -> Reading:
        return Reading(self.wall_s, self.boot_s, self.boot_id)

    def sleep(self, seconds: float) -> None:
        self.pass_by(seconds)

    def pass_by(self, seconds: float) -> None:
        """Time goes by without anybody sleeping."""
        self.wall_s += seconds
        self.boot_s += seconds
        self.true_s += seconds

    def reboot(self, uptime_s: float, wall_step_s: float) -> None:
        self.boot_id, self.boot_s = self.boot_id + "'", uptime_s
        self.wall_s += wall_step_s
        self.true_s += uptime_s


_numbers = itertools.count()


def wish(contract: str = "", end: str = "", *, show: str = "TRADES") -> Ask:
    """A request like no other, unless contract and end are given."""
    number = next(_numbers)
    return bars_ask(
        contract=contract or f"C{os.getpid()}-{number}", exchange="SMART", what_to_show=show, bar_size="1 hour", duration="1 M",
        end=end or f"e{number}", use_rth=True,
    )  # fmt: skip


def send(ledger: Ledger, ask: Ask | None = None) -> None:
    """Send one request that has to be allowed now."""
    answer = ledger.try_acquire(ask or wish(), work=RULES_ONLY)
    assert isinstance(answer, Grant), answer
    with answer:
        answer.sent()


def fill(ledger: Ledger, count: int = 60) -> None:
    for _ in range(count):
        send(ledger)


def wait_of(ledger: Ledger, ask: Ask | None = None, *, work: WorkClass = RULES_ONLY) -> Wait:
    answer = ledger.try_acquire(ask or wish(), work=work)
    assert isinstance(answer, Wait), "granted too early"
    return answer


def poll(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.005)


def start_python(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
