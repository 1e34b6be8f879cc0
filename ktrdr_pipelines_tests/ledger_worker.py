"""A process that sends history requests as fast as one shared ledger lets it, on a clock that runs faster than the real one.

Run as a program by `test_ledger.py` (and by longer trials, with other numbers). Waits for the end time on stdin; writes one line
per request to its log: stamp, clock before, clock after, identity, contract, weight. Ledger, waiters and judge share the clock.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ktrdr_pipelines.ib.clock import Reading
from ktrdr_pipelines.ib.ledger import GrantExpired, WaitCancelled, open_ledger
from ktrdr_pipelines.ib.pacing import bars_ask

LOGIN = "127.0.0.1:4002"
WALL_0_S = 1_700_000_000.0


class FastClock:
    """The machine's boot clock, ``speed`` times as fast; the same in every process."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def now_s(self) -> float:
        return self.read().wall_s

    def read(self) -> Reading:
        boot_s = time.clock_gettime(time.CLOCK_MONOTONIC) * self.speed
        return Reading(WALL_0_S + boot_s, boot_s, "fast")

    def sleep(self, seconds: float) -> None:
        threading.Event().wait(seconds / self.speed)


def send_requests(where: Path, log: Path, speed: float, until_s: float, seed: int) -> None:
    """Send until the fast clock shows ``until_s``: 30 contracts, every fifth BID_ASK, every tenth a repetition."""
    clock = FastClock(speed)
    ledger = open_ledger(where, LOGIN, clock)
    rng = random.Random(seed)
    count = 0
    with log.open("ab", buffering=0) as out:
        while clock.now_s() < until_s:
            count += rng.random() > 0.1
            ask = bars_ask(
                contract=f"C{rng.randrange(30)}",
                exchange="SMART",
                what_to_show="BID_ASK" if rng.random() < 0.2 else "TRADES",
                bar_size="1 hour",
                duration="1 M",
                end=f"{seed if rng.random() < 0.9 else 0}-{count}",
                use_rth=True,
            )
            try:
                with ledger.acquire(ask, sleep=clock.sleep, cancel=lambda: clock.now_s() >= until_s) as grant:
                    before_s = clock.now_s()
                    sent_s = grant.sent()
                    line = f"{sent_s!r}\t{before_s!r}\t{clock.now_s()!r}\t{ask.identity!r}\t{ask.contract!r}\t{ask.weight}\n"
                    out.write(line.encode())
            except GrantExpired:
                continue


if __name__ == "__main__":
    _where, _log, _speed, _seed = sys.argv[1:]
    print("ready", flush=True)
    _until = float(sys.stdin.readline())  # everybody starts at once, whoever was loaded first
    with suppress(WaitCancelled):  # the trial is over while this process waits for its turn
        send_requests(Path(_where), Path(_log), float(_speed), _until, int(_seed))
