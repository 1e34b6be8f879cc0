"""One process of `ib/pacing/ledger_trial.py`: sends history requests as fast as the shared ledger lets it, until it is
to end.

Talks to the trial in lines. It sends `ready`, `wants` before it asks the ledger, `sends` at the very write (this line is the
request on its way to the gateway), `sleeps` with the time to be woken at; it receives `go` and, at that time, `wake`.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.clock import Reading
from ktrdr_pipelines.ib.pacing.ledger import GrantExpired, Ledger, open_ledger
from ktrdr_pipelines.ib.pacing.rules import Ask, Rule, bars_ask

LOGIN = "127.0.0.1:4002"
WALL_0_S = 1_700_000_000.0
LONGEST_NAP_S = 18.0
"""Waiters sleep past the ledger's own polls of a second, which would be most of the trial's work, but show themselves in time."""


class SkippingClock:
    """The machine's clock without the time in which no process has anything to do. One file has what was left out so far,
    for all processes alike; the trial alone adds to it. Milliseconds of work are milliseconds, ten minutes of waiting none."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._skipped = memoryview(mmap.mmap(file.fileno(), 8)).cast("d")

    @classmethod
    def create(cls, path: Path) -> SkippingClock:
        path.write_bytes(struct.pack("d", 0.0))
        return cls(path)

    def skip(self, seconds: float) -> None:
        self._skipped[0] += seconds

    def now_s(self) -> float:
        return self.read().wall_s

    def read(self) -> Reading:
        boot_s = time.clock_gettime(time.CLOCK_MONOTONIC) + self._skipped[0]
        return Reading(WALL_0_S + boot_s, boot_s, "trial")


class Sender:
    """Asks for one request after the other: some of one contract in a row, some twice, every fifth BID_ASK."""

    def __init__(self, clock: SkippingClock, ledger: Ledger, seed: int) -> None:
        self.clock, self.ledger, self.rng, self.seed = clock, ledger, random.Random(seed), seed
        self.until_s = 0.0
        self.rules: set[Rule] = set()
        self.number = 0

    def send_line(self, *words: object) -> None:
        os.write(1, json.dumps(words).encode() + b"\n")

    def note(self, _seconds: float, rule: Rule, until_s: float) -> None:
        self.until_s = until_s
        self.rules.add(rule)

    def sleep(self, seconds: float) -> None:
        nap_s = min(self.until_s - self.clock.now_s(), LONGEST_NAP_S)
        self.send_line("sleeps", self.clock.now_s() + max(seconds, nap_s))
        sys.stdin.readline()

    def next_ask(self) -> Ask:
        self.number += self.rng.random() > 0.05
        return bars_ask(
            contract=f"C{self.rng.choice((self.seed, self.rng.randrange(30)))}",
            exchange="SMART",
            what_to_show="BID_ASK" if self.rng.random() < 0.2 else "TRADES",
            bar_size="1 hour",
            duration="1 M",
            end=f"{self.rng.choice((self.seed, 0))}-{self.number // 2}",
            use_rth=True,
        )

    def send_one(self) -> None:
        ask = self.next_ask()
        self.rules.clear()
        self.send_line("wants", self.clock.now_s())
        try:
            with self.ledger.acquire(ask, sleep=self.sleep, on_wait=self.note, work=WorkClass.TAIL) as grant:
                rules = sorted(rule.name for rule in self.rules)
                with grant.sending():
                    self.send_line("sends", self.clock.now_s(), ask.contract, ask.identity, ask.weight, rules)
        except GrantExpired:
            self.send_line("expired")


if __name__ == "__main__":
    _directory, _seed = Path(sys.argv[1]), int(sys.argv[2])
    _clock = SkippingClock(_directory / "clock")
    _sender = Sender(_clock, open_ledger(_directory, LOGIN, _clock), _seed)
    _sender.send_line("ready")
    sys.stdin.readline()
    while True:
        _sender.send_one()
