"""The earliest times of planned requests under the present pacing budget: `shares.decide_share`, replayed with a moving clock.

Pure: the caller brings the requests, the ledger's entries and now. `planning/requests.py` decides what to ask for,
`ib/pacing/ledger.py` waits in earnest. The forecast is a lower bound: it assumes that answers take no time, that no other program
asks, and that no request is repeated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import BugError
from ktrdr_pipelines.ib.pacing.rules import Ask, Entry, Go, Rule
from ktrdr_pipelines.ib.pacing.shares import REMEMBERED_S, decide_share

_MOST_WAITS = 1000
"""A request waits for one rule after the other, at most for a few hundred times at which expected tails may come; more means
that the clock does not move."""


@dataclass(frozen=True, slots=True)
class Sending:
    """One request of a forecast: its earliest time, seconds since 1970, and the rule of its last wait (None: no wait)."""

    at_s: float
    waited_for: Rule | None


def forecast(
    asks: Sequence[Ask], past: Sequence[Entry], now_s: float,
    *, work: WorkClass = WorkClass.INTERACTIVE, pause_until_s: float | None = None,
) -> list[Sending]:  # fmt: skip
    """The earliest time of each of ``asks``, all of one class, sent one after the other from ``now_s`` (seconds since 1970) on.

    ``past``: what the ledger remembers (`Budget.past`), in any order. Requests that are still unanswered count as answered
    now, since the time of their answer is unknown. ``pause_until_s``: end of a pause of all processes. The last time is when the
    load would end, if answers took no time; empty without asks.
    """
    return forecast_queue([(ask, work, 0.0) for ask in asks], past, now_s, pause_until_s=pause_until_s)


def forecast_queue(
    asked: Sequence[tuple[Ask, WorkClass, float]], past: Sequence[Entry], now_s: float, *, pause_until_s: float | None = None
) -> list[Sending]:  # fmt: skip
    """As `forecast`, for requests of several classes that have waited for some seconds already."""
    entries = sorted((replace(entry, is_open=False) for entry in past), key=attrgetter("at_s"))
    sendings: list[Sending] = []
    at_s = now_s
    for ask, work, waited_s in asked:
        wanted_at_s = at_s - waited_s
        rule: Rule | None = None
        for _ in range(_MOST_WAITS):
            answer = decide_share(entries, ask, at_s, pause_until_s, work=work, waited_s=at_s - wanted_at_s)
            if isinstance(answer, Go):
                break
            at_s, rule = at_s + answer.look_again_s, answer.rule
        else:
            raise BugError("the forecast of a request does not end", advice="Report this: a fault of forecast.py.")
        # What is not remembered any more decides nothing; thousands of requests would take minutes.
        del entries[: bisect_left(entries, at_s - REMEMBERED_S, key=attrgetter("at_s"))]
        entries.append(Entry(at_s, ask, False, work, at_s - wanted_at_s))
        sendings.append(Sending(at_s, rule))
    return sendings
