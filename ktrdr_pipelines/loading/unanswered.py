"""What the open questions of several loads wait for, and which load has been silent about it for too long. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from ktrdr_pipelines.domain.calls import QUIET_S, Waiting

L = TypeVar("L", bound=Hashable)

LONG_S = 2 * QUIET_S
"""A wait of this length is shown when it begins; a shorter one, as the rule of two seconds makes all the time, only when nothing
else goes on."""
SAME_S = 5.0
"""A wait that ends so little later than the last one of the same load and reason is the same for a user."""
AGAIN_AFTER_S = 60.0
"""What goes on after its expected end is shown again this often."""


@dataclass(slots=True)
class _State(Generic[L]):
    load: L
    what: str
    since_s: float
    until_s: float
    is_sent: bool


class Unanswered(Generic[L]):
    """The open questions with what each waits for. ``clock`` returns monotonic seconds.

    A load is silent when none of all questions was settled for `QUIET_S`, its own oldest one does the same thing for as long, and
    nothing was shown for the load that goes on until now. So a slow gateway costs one line for each answer at most, and six
    requests without an answer one line for each load.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._states: dict[Hashable, _State[L]] = {}
        """By question."""
        self._settled_s = clock()
        self._shown: dict[L, tuple[str, float]] = {}
        """By load the last reason that was shown, and until when it lasts."""

    def begin(self, question: Hashable, load: L, what: str, seconds: float, *, is_sent: bool = False) -> None:
        """``question`` of ``load`` does something that ends within ``seconds``; ``is_sent``: it waits for IB's answer."""
        now_s = self._clock()
        self._states[question] = _State(load, what, now_s, now_s + seconds, is_sent)

    def wait(self, question: Hashable, load: L, waiting: Waiting) -> bool:
        """``question`` of ``load`` waits. True: that has to be shown now, since it is long and was not shown for the load."""
        self.begin(question, load, waiting.reason, waiting.seconds)
        until_s = self._states[question].until_s
        reason, shown_until_s = self._shown.get(load, ("", 0.0))
        if waiting.seconds <= LONG_S or (reason == waiting.reason and until_s <= shown_until_s + SAME_S):
            return False
        self._shown[load] = waiting.reason, max(shown_until_s, until_s)
        return True

    def end(self, question: Hashable, load: L) -> None:
        """``question`` of ``load`` is settled."""
        self._states.pop(question, None)
        self._settled_s = self._clock()
        self._shown.pop(load, None)

    def silent(self, outage_of: Callable[[L], str]) -> Iterator[tuple[L, Waiting]]:
        """The loads that have been silent for too long, each with what its oldest question waits for. Each once, and again when
        what the gateway reports as out changes: ``outage_of`` a load, empty when nothing is."""
        now_s = self._clock()
        if now_s - self._settled_s < QUIET_S:
            return
        for state in sorted(self._states.values(), key=lambda each: each.since_s):
            load = state.load
            outage = outage_of(load) if state.is_sent else ""
            reason = f"{state.what}{outage and ', during an outage that the gateway reports: '}{outage}"
            shown, shown_until_s = self._shown.get(load, ("", 0.0))
            is_news = bool(outage) and shown != reason
            if now_s - state.since_s < QUIET_S or (shown_until_s > now_s and not is_news):
                continue
            left_s = state.until_s - now_s
            self._shown[load] = reason, state.until_s if left_s > 0 else now_s + AGAIN_AFTER_S
            yield load, Waiting.for_seconds(reason + self._count_open(state), left_s if left_s > 0 else inf)

    def _count_open(self, state: _State[L]) -> str:
        if not state.is_sent:
            return ""
        count = sum(each.is_sent for each in self._states.values())
        return f"; {count} request{'s' * (count != 1)} open"
