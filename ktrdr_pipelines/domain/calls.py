"""One call to the gateway as its caller sees it: for which work, what it costs, what it waits for. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf

from ktrdr_pipelines.domain.work_class import WorkClass

QUIET_S = 1.5
"""Waits up to this long are part of the work; longer ones are shown."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A wait, as reported to whoever follows a load: why, how many seconds at most, and until when."""

    reason: str
    seconds: float
    until: datetime | None
    """At the latest; None: unknown."""

    @classmethod
    def for_seconds(cls, reason: str, seconds: float) -> Waiting:
        """A wait that begins now."""
        return cls(reason, seconds, datetime.now(UTC) + timedelta(seconds=seconds) if seconds < inf else None)


OnWait = Callable[[Waiting], None]


def show_nothing(_waiting: Waiting) -> None:
    """An `OnWait` for callers that show nothing."""


@dataclass
class Costs:
    """What calls have cost so far. ``requests``: history requests sent, retries, probes and head timestamps included."""

    requests: int = 0
    retries: int = 0
    pacing_wait_s: float = 0.0
    retry_wait_s: float = 0.0
    """Seconds waited before retries, and for the gateway, its link or a farm to come back."""
    paced: list[tuple[float, float]] = field(default_factory=list)
    retried: list[tuple[float, float]] = field(default_factory=list)
    """When these waits were, begin and end on one clock, seconds: those of several calls overlap. Not added up by `add`."""

    def add(self, other: Costs) -> None:
        """Count what ``other`` counted too."""
        self.requests += other.requests
        self.retries += other.retries
        self.pacing_wait_s += other.pacing_wait_s
        self.retry_wait_s += other.retry_wait_s

    def minus(self, other: Costs) -> Costs:
        """What was counted since ``other``."""
        return Costs(
            self.requests - other.requests,
            self.retries - other.retries,
            self.pacing_wait_s - other.pacing_wait_s,
            self.retry_wait_s - other.retry_wait_s,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """What a caller passes with a question to IB. ``on_wait`` is called in the thread that waits. ``on_step`` is called with each
    thing that usually takes a moment and may take long (to connect, the ledger, an answer), and with the seconds within which it
    ends: who shows waits shows it when it does take long. ``on_sent`` is called when a request was sent, with the seconds within
    which it has to be answered. ``costs`` are added to as they arise, and are final when the call returns."""

    work: WorkClass = WorkClass.INTERACTIVE
    on_wait: OnWait = show_nothing
    on_step: Callable[[str, float], None] = lambda _what, _seconds: None
    on_sent: Callable[[float], None] = lambda _: None
    costs: Costs = field(default_factory=Costs)
    raises_time_out: bool = False
    """A request without an answer in time fails at once, for a caller that asks for less next time; otherwise it is retried."""


class Interrupted(Exception):
    """A call was ended by its own program: `interrupt` of the history. No error of IB's, and no answer."""


class OverlappingWaits:
    """How long a load waited, when several of its calls waited at once: time counts once."""

    def __init__(self) -> None:
        self._until_s = 0.0

    def add(self, waits: list[tuple[float, float]]) -> float:
        """The seconds of ``waits`` that are later than everything added before. Waits that end earlier than one added before add
        nothing: calls are added as they end."""
        added_s = 0.0
        for begin_s, end_s in waits:
            added_s += max(0.0, end_s - max(begin_s, self._until_s))
            self._until_s = max(self._until_s, end_s)
        return added_s
