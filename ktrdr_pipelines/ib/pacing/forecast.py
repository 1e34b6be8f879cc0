"""When planned requests could go out under the pacing budget as it stands: `rules.decide`, replayed with a moving clock.

Pure: the caller brings the requests, the ledger's entries and now. What is asked for is decided in `planning/requests.py`,
who really waits in `ib/pacing/ledger.py`. The answer is the earliest time, not a promise: answers are taken to need no time,
nobody else to ask, and nothing to be asked twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktrdr_pipelines.errors import BugError
from ktrdr_pipelines.ib.pacing.rules import MARGIN_S, WINDOW_S, Ask, Entry, Go, Rule, decide

_MOST_WAITS = 1000
"""A request waits for one rule after the other, a handful in all; more means that the clock does not move."""


@dataclass(frozen=True, slots=True)
class Sending:
    """One request of a forecast: its earliest time, seconds since 1970, and the rule it waited for last (None: none)."""

    at_s: float
    held_up_by: Rule | None


def forecast(
    asks: Sequence[Ask], past: Sequence[Entry], now_s: float, *, hold_until_s: float | None = None
) -> list[Sending]:
    """The earliest time of each of ``asks``, sent one after the other from ``now_s`` (seconds since 1970) on.

    ``past``: what the ledger remembers (`Budget.past`), in any order. Requests that are still unanswered count as answered
    now: nobody knows when their answer comes. ``hold_until_s``: a pause of all processes. The last time is when the load
    would be done, if answers took no time; no asks, no times.
    """
    entries = [replace(entry, is_open=False) for entry in past]
    sendings: list[Sending] = []
    at_s = now_s
    for ask in asks:
        rule: Rule | None = None
        for _ in range(_MOST_WAITS):
            answer = decide(entries, ask, at_s, hold_until_s)
            if isinstance(answer, Go):
                break
            at_s, rule = at_s + answer.seconds, answer.rule
        else:
            raise BugError(
                "the forecast of a request's turn does not end", advice="Report this: a fault of forecast.py."
            )
        # What is older than the longest rule decides nothing any more; thousands of requests would take minutes.
        entries = [entry for entry in entries if entry.at_s >= at_s - WINDOW_S - 2 * MARGIN_S]
        entries.append(Entry(at_s, ask))
        sendings.append(Sending(at_s, rule))
    return sendings
