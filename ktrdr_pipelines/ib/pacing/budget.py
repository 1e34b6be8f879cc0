"""The state of the pacing budget, for display and for forecasts: what is used, by which class, who waits and until when.

`ledger.py` reads the rows, in one transaction; nothing is decided or written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.forecast import forecast_queue
from ktrdr_pipelines.ib.pacing.ledger_rows import Pause, Waiter
from ktrdr_pipelines.ib.pacing.rules import (
    WINDOW_UNITS,
    Ask,
    Entry,
    Wait,
    decide,
    used_units,
)
from ktrdr_pipelines.ib.pacing.shares import is_starved, kept_from


@dataclass(frozen=True, slots=True)
class PauseOfAll:
    """A pause of all processes: until when (wall clock, seconds since 1970) and why."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ClassUse:
    """One class of work: units used in the last ten minutes, requests waiting, and how many of the free units it has to leave to
    higher classes now."""

    work: WorkClass
    used: int
    waiting: int
    kept_from: int


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request that waits: class, symbol, since when, its expected time (seconds since 1970; the answers of others
    and requests to come are not known), and the process. ``host`` is empty for this machine."""

    work: WorkClass
    symbol: str
    since_s: float
    until_s: float
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Budget:
    """A snapshot of the ledger. ``used`` of ``limit`` units are taken; ``next_free_at_s`` (seconds since 1970) is when the next
    plain request could go by the rules, not counting the ``waiting`` ones; ``open`` requests are unanswered; ``past`` and
    ``pause_until_s`` are arguments of `forecast.forecast`. ``queue`` is in the order of service."""

    now_s: float
    used: int
    limit: int
    next_free_at_s: float
    waiting: int
    open: int
    pauses: tuple[PauseOfAll, ...]
    past: tuple[Entry, ...]
    classes: tuple[ClassUse, ...] = ()
    queue: tuple[WaitingRequest, ...] = ()

    @property
    def pause_until_s(self) -> float | None:
        """When the last pause ends; None without one."""
        return max((pause.until_s for pause in self.pauses), default=None)


def order_of_service(waiters: Sequence[Waiter], past: Sequence[Entry], now_s: float) -> list[Waiter]:
    """The waiters in the order of service: starved ones, then by class, then by arrival."""
    return sorted(
        waiters,
        key=lambda waiter: -1 if is_starved(past, waiter.work, now_s, waiter.waited_s) else waiter.work.rank,
    )


def measure(past: Sequence[Entry], waiters: Sequence[Waiter], pauses_known: Sequence[Pause], now_s: float) -> Budget:
    """The budget at ``now_s`` (seconds since 1970), from what `ledger_rows.py` read at that time."""
    waiters = order_of_service([waiter for waiter in waiters if waiter.is_fresh], past, now_s)
    active = sorted((pause.left_s, pause.reason) for pause in pauses_known if pause.left_s > 0)
    pauses = tuple(PauseOfAll(now_s + left_s, why) for left_s, why in active)
    pause_until_s = pauses[-1].until_s if pauses else None
    answer = decide(past, Ask("", ""), now_s, pause_until_s)
    return Budget(
        now_s=now_s,
        used=used_units(past, now_s),
        limit=WINDOW_UNITS,
        next_free_at_s=now_s + (answer.seconds if isinstance(answer, Wait) else 0.0),
        waiting=len(waiters),
        open=sum(entry.is_open for entry in past),
        pauses=pauses,
        past=tuple(past),
        classes=tuple(_measure_class(work, past, waiters, now_s) for work in WorkClass),
        queue=_describe(waiters, past, now_s, pause_until_s),
    )


def _measure_class(work: WorkClass, past: Sequence[Entry], waiters: Sequence[Waiter], now_s: float) -> ClassUse:
    of_class = [entry for entry in past if entry.work is work]
    waiting = sum(waiter.work is work for waiter in waiters)
    return ClassUse(work, used_units(of_class, now_s), waiting, kept_from(past, work, now_s))


def _describe(
    waiters: Sequence[Waiter], past: Sequence[Entry], now_s: float, pause_until_s: float | None
) -> tuple[WaitingRequest, ...]:
    asked = [(waiter.ask, waiter.work, waiter.waited_s) for waiter in waiters]
    times = forecast_queue(asked, past, now_s, pause_until_s=pause_until_s)
    return tuple(
        WaitingRequest(
            work=waiter.work,
            symbol=waiter.ask.symbol,
            since_s=now_s - waiter.waited_s,
            until_s=sending.at_s,
            pid=waiter.owner.pid,
            host="" if waiter.owner.is_alive() is not None else waiter.owner.host,
        )
        for waiter, sending in zip(waiters, times, strict=True)
    )
