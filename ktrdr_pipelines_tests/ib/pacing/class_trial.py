"""Loads of several classes on one real ledger file, on a clock moved by hand: no threads, no sleeping, no IB.

Each load keeps a few requests in the queue, through `Ledger.line_up`, and looks again when the ledger advises. What is sent is
judged by the simulator's judge, which shares no code with the ledger. Answers take ``answer_s``.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.budget import Budget
from ktrdr_pipelines.ib.pacing.ledger import Grant, Ledger, Place
from ktrdr_pipelines.ib.pacing.rules import Ask
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import HandClock

LONGEST_NAP_S = 18.0
"""Waiters show themselves before they are taken for stopped."""


@dataclass(frozen=True)
class Sent:
    """A request on its way: seconds since the trial began, and those since it was wanted."""

    at_s: float
    waited_s: float
    work: WorkClass
    load: str
    units: int


@dataclass(eq=False)
class Load:
    """``left`` requests of one class, ``in_flight`` of them asked for at a time, in turn of ``contracts``."""

    name: str
    work: WorkClass
    left: int
    contracts: int
    weight: int
    in_flight: int
    ledger: Ledger
    begins_s: float
    made: int = 0


class ClassTrial:
    """Add loads with `load` and `tails`, then `run`. ``ledgers``: openings of one file, as several processes have them."""

    def __init__(self, ledgers: list[Ledger], clock: HandClock, *, answer_s: float = 0.0) -> None:
        self.clock, self.answer_s = clock, answer_s
        self.judge = PacingJudge()
        self.sent: list[Sent] = []
        self._ledgers = itertools.cycle(ledgers)
        self._began_s = clock.now_s()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._tails_waiting: set[str] = set()

    @property
    def now_s(self) -> float:
        return self.clock.now_s() - self._began_s

    def snapshot(self) -> Budget:
        return next(self._ledgers).snapshot()

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), action))

    def load(
        self, work: WorkClass, count: int, *, begins_s: float = 0.0, contracts: int = 1, weight: int = 1,
        in_flight: int = 3, name: str = "",
    ) -> None:  # fmt: skip
        load = Load(name or work.value, work, count, contracts, weight, in_flight, next(self._ledgers), begins_s)
        for _ in range(min(in_flight, count)):
            self.at(begins_s, lambda: self._ask_next(load))

    def tails(self, times: Iterable[float], *, series: int = 1, requests: int = 1, weight: int = 1) -> None:
        """At each of ``times`` every one of ``series`` asks for its end, in ``requests`` requests one after the other. A
        series whose tail of an earlier time still waits is left out, as the sensor does."""
        ledger = next(self._ledgers)
        for when_s in times:
            for number in range(series):

                def begin(when_s: float = when_s, name: str = f"T{number}") -> None:
                    if name not in self._tails_waiting:
                        self._tails_waiting.add(name)
                        self._ask_next(Load(name, WorkClass.TAIL, requests, 1, weight, 1, ledger, when_s))

                self.at(when_s, begin)

    def run(self, until_s: float = float("inf")) -> ClassTrial:
        while self._events and self._events[0][0] <= until_s:
            when_s, _, action = heapq.heappop(self._events)
            self.clock.pass_by(max(when_s - self.now_s, 0.0))
            action()
        return self

    def of(self, work: WorkClass) -> list[Sent]:
        return [sent for sent in self.sent if sent.work is work]

    def _ask_next(self, load: Load) -> None:
        if load.left == 0:
            self._tails_waiting.discard(load.name)
            return
        load.left -= 1
        load.made += 1
        contract = f"{load.name} {load.made % load.contracts}"
        ask = Ask(f"{contract} {next(self._numbers)}", contract, load.weight)
        self._look(load, load.ledger.line_up(ask, work=load.work), self.now_s)

    def _look(self, load: Load, place: Place, wanted_s: float) -> None:
        answer = place.look()
        if not isinstance(answer, Grant):
            self.at(self.now_s + min(answer.look_again_s, LONGEST_NAP_S), lambda: self._look(load, place, wanted_s))
            return
        with answer.sending():
            self.judge.judge(self.now_s, place.ask.contract, place.ask.identity, place.ask.weight)
            self.sent.append(Sent(self.now_s, self.now_s - wanted_s, load.work, load.name, place.ask.weight))

        def answered() -> None:
            answer.finished()
            self._ask_next(load)

        self.at(self.now_s + self.answer_s, answered)
