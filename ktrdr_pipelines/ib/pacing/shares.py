"""Which class of work may use the room that the pacing rules leave: a pure decision from past requests and now.

A burst can spend the sixty requests of ten minutes at once, and then priority helps no one until they expire. So a lower class
may send only if the higher ones can be served in time **without** the request, at every instant of the next ten minutes:

    room at that instant - weight of the request  >=  what higher classes may need by then

Room comes back at known times, when past requests become ten minutes old. What higher classes may need:

* always: one unit within `FIRST_UNIT_S`, and one more each minute (`UNIT_EVERY_S`), for questions and for the tails of a few
  series; three within `RETRIES_S`, since a tail may have to repeat its request or to probe;
* what tails asked for lately, again: a sensor looks for due tails every five minutes (`TAIL_PERIOD_S`), so the tails of the last
  twenty minutes are expected five, ten, fifteen and twenty minutes later, and the largest of these four forecasts counts.
  The time a tail asked is what repeats, not the time it was served.

In the steady state of a long backfill a unit expires every nine seconds, so this costs nothing; directly after its first
burst it leaves ten units, released one a minute. That state lasts because a long backfill spreads: `BURST_FREE_UNITS` of one run
of requests go as fast as the rules allow, the others `SPREAD_S` apart, a little faster than the budget comes back.

Interactive requests leave three units, and room for expected tails that came at least twice: a user waits for the answer, and
tails that were started once must not delay it. They leave nothing for other questions. Tails leave nothing. A class that got
nothing for `MEMORY_S` although a request of it has waited that long gets its next one before all others. No clock and no
storage here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.rules import (
    TICK_S,
    WINDOW_MARGIN_S,
    WINDOW_S,
    WINDOW_UNITS,
    Ask,
    Entry,
    Go,
    Rule,
    Wait,
    decide,
)

MEMORY_S = 1200.0
"""How long past requests matter for this decision: two windows, four ticks."""
TAIL_PERIOD_S = 300.0
"""Tails come back after this long: the interval of the sensor that looks for them (`orchestration/automation/sensors.py`). With
another interval the forecast is coarser and backfills get less, tails are still in time."""
FIRST_UNIT_S = 20.0
RETRIES_S = 50.0
RETRY_UNITS = 3
UNIT_EVERY_S = 60.0
"""The constant part of the reserve. A tail is served within a minute: the last ten seconds are for the clocks and disks."""
TAIL_PATIENCE_S = 25.0
"""Room for expected tails may come this much later than they do: what the tails of two ticks ago used comes back half a second
after ten minutes, and those may have waited themselves."""
EARLY_S = 20.0
OVERDUE_S = 60.0
"""Tails may come this much before and after the time they are expected, and are still the expected ones."""
BURST_FREE_UNITS = 50
"""A load of up to fifty requests is not spread. The other ten units are the reserve directly after it."""
SPREAD_S = 9.0
"""Between two units of a spread backfill. Ten seconds is what the rules allow in the long run; nine catches up after a delay."""
RUN_BREAK_S = 120.0
"""A backfill request asked for this long after the last one begins a new run: no answer takes longer (the request times out)."""

REMEMBERED_S = MEMORY_S + OVERDUE_S
"""How long the ledger keeps a request: by then no tail is expected because of it."""

_SPAN_S = WINDOW_S + WINDOW_MARGIN_S
_PERIODS = int(MEMORY_S / TAIL_PERIOD_S)
_TIMES_SEEN = {WorkClass.BACKFILL: 1, WorkClass.INTERACTIVE: 2}
"""In how many of the last periods tails must have come, for a class to leave them room."""

Step = tuple[float, int]
"""By when (seconds since 1970), and how many units in all from now on."""


def decide_share(
    past: Sequence[Entry], wanted: Ask, now_s: float, pause_until_s: float | None = None,
    *, work: WorkClass, waited_s: float = 0.0,
) -> Go | Wait:  # fmt: skip
    """May ``wanted`` of class ``work`` be sent at ``now_s``, by the rules and by what is kept for higher classes?

    ``past``: the requests of the last `REMEMBERED_S`, and those that go first, as if sent now; in any order. ``waited_s``:
    how long this one has waited. The answer is that of `rules.decide`; where the wait for a share takes longer, it is
    ``RESERVE`` or ``SPREAD``.
    """
    answer = decide(past, wanted, now_s, pause_until_s)
    if work is WorkClass.TAIL or is_starved(past, work, now_s, waited_s):
        return answer
    waits = [answer] if isinstance(answer, Wait) else []
    waits += _wait_for_reserve(past, wanted.weight, now_s, work)
    if work is WorkClass.BACKFILL:
        waits += _wait_for_spread(past, wanted.weight, now_s, waited_s)
    if not waits:
        return answer
    longest = max(waits, key=attrgetter("seconds"))
    soonest_s = max(wait.look_again_s for wait in waits)
    return longest if soonest_s >= longest.seconds else Wait(longest.seconds, longest.rule, again_s=soonest_s)


def is_starved(past: Sequence[Entry], work: WorkClass, now_s: float, waited_s: float) -> bool:
    """Whether a request goes before all others: it and its class got nothing for `MEMORY_S`."""
    return waited_s >= MEMORY_S and not any(e.work is work and e.at_s > now_s - MEMORY_S for e in past)


def kept_from(past: Sequence[Entry], work: WorkClass, now_s: float) -> int:
    """Of the units that are free now: how many ``work`` must leave to higher classes."""
    if work is WorkClass.TAIL:
        return 0
    expiries = _expiries(past, now_s)
    free = WINDOW_UNITS - sum(units for _, units in expiries)
    allowed = next((n for n in range(free, 0, -1) if not list(_unmet(expiries, past, n, now_s, work))), 0)
    return max(free, 0) - allowed


def _wait_for_reserve(past: Sequence[Entry], weight: int, now_s: float, work: WorkClass) -> list[Wait]:
    return list(_unmet(_expiries(past, now_s), past, weight, now_s, work))


def _expiries(past: Sequence[Entry], now_s: float) -> list[tuple[float, int]]:
    """When each unit in use comes back, in order."""
    return sorted((min(e.at_s, now_s) + _SPAN_S, e.ask.weight) for e in past if min(e.at_s, now_s) + _SPAN_S >= now_s)


def _unmet(
    expiries: list[tuple[float, int]], past: Sequence[Entry], weight: int, now_s: float, work: WorkClass
) -> Iterator[Wait]:
    """The waits until the room that is left after ``weight`` units meets what higher classes may need."""
    until_s = _constant_reserve_until(expiries, weight, now_s, work)
    if until_s > now_s:
        yield Wait(until_s - now_s, Rule.RESERVE)
    wanted = sorted((e.wanted_at_s, e.ask.weight) for e in past if e.work is WorkClass.TAIL)
    room, place = WINDOW_UNITS - weight - sum(units for _, units in expiries), 0
    for at_s, units in expect_tails(wanted, now_s, _TIMES_SEEN[work]) if wanted else ():
        by_s = max(at_s + TAIL_PATIENCE_S, now_s)
        if by_s > now_s + WINDOW_S:
            return
        while place < len(expiries) and expiries[place][0] < by_s:
            room += expiries[place][1]
            place += 1
        if room < units:
            # The room will not grow before these tails were served, or did not come.
            yield Wait(
                max(at_s - now_s, 0.0) + OVERDUE_S, Rule.RESERVE, again_s=_next_change_s(wanted, expiries, now_s)
            )
            return


def _constant_reserve_until(expiries: list[tuple[float, int]], weight: int, now_s: float, work: WorkClass) -> float:
    """The earliest time at which the constant part of the reserve is met. Between two expiries the room stays the same, so it is
    scarcest directly before each."""
    left = WINDOW_UNITS - weight - sum(units for _, units in expiries)
    until_s = now_s
    for expiry_s, units in expiries:
        if left < 0:
            until_s = max(until_s, expiry_s + TICK_S)
        else:
            if left == 0:
                until_s = max(until_s, expiry_s - FIRST_UNIT_S)
            if left < RETRY_UNITS:
                until_s = max(until_s, expiry_s - RETRIES_S)
            if work is WorkClass.BACKFILL:
                until_s = max(until_s, expiry_s - FIRST_UNIT_S - UNIT_EVERY_S * left)
        left += units
    return until_s


def expect_tails(wanted: Sequence[Step], now_s: float, times: int = 1) -> list[Step]:
    """What tails may need within ten minutes of ``now_s``, from what they asked for: units in all, at increasing times.

    ``wanted``: when each tail was asked for, and its units. Each is expected again at every whole number of periods after it. Of
    what was expected a moment ago, what was asked for in the last minute has come already. Only what came in ``times`` of the
    periods is expected.
    """
    again = sorted(
        (at_s + TAIL_PERIOD_S * number, number, units) for at_s, units in wanted for number in range(1, _PERIODS + 1)
    )
    again = [each for each in again if now_s - OVERDUE_S < each[0] <= now_s + TAIL_PERIOD_S]
    came = sum(units for at_s, units in wanted if now_s - OVERDUE_S < at_s <= now_s)
    due = _count([each for each in again if each[0] <= now_s + EARLY_S], times)
    total = max(0, due[-1][1] - came) if due else 0
    steps: list[Step] = [(due[0][0], total)] if total else []
    later = [each for each in again if each[0] > now_s + EARLY_S]
    after = [(again_s + TAIL_PERIOD_S, number, units) for again_s, number, units in again if again_s > now_s]
    for expected in (_count(later, times), _count(after, times)):
        steps += [(again_s, total + units) for again_s, units in expected]
        total = steps[-1][1] if expected else total
    return steps


def _count(again: list[tuple[float, int, int]], times: int) -> list[Step]:
    """Of the forecasts, one for each number of periods, the largest that ``times`` of them reach: units so far, at increasing
    times."""
    counts, largest = [0] * (_PERIODS + 1), 0
    steps: list[Step] = []
    for again_s, number, units in again:
        counts[number] += units
        reached = sorted(counts)[-times]
        if reached > largest:
            largest = reached
            if steps and steps[-1][0] == again_s:
                steps.pop()
            steps.append((again_s, largest))
    return steps


def _next_change_s(wanted: Sequence[Step], expiries: Sequence[tuple[float, int]], now_s: float) -> float:
    """Seconds until what is expected, or the room for it, may change."""
    times = [at_s for at_s, _ in expiries if at_s > now_s]
    for at_s, _ in wanted:
        for number in range(_PERIODS):
            again_s = at_s + TAIL_PERIOD_S * (number + 1)
            times += [t for t in (again_s - EARLY_S, again_s + OVERDUE_S) if t > now_s]
    return min(times, default=now_s + OVERDUE_S) - now_s + TICK_S


def _wait_for_spread(past: Sequence[Entry], weight: int, now_s: float, waited_s: float) -> list[Wait]:
    """The wait of a backfill that is past its first burst; none while its run is short."""
    backfills = sorted((e for e in past if e.work is WorkClass.BACKFILL), key=attrgetter("at_s"), reverse=True)
    units, began_s, wanted_s = weight, now_s, now_s - waited_s
    for entry in backfills:
        is_long = units > BURST_FREE_UNITS or began_s <= now_s - WINDOW_S
        if is_long or wanted_s - entry.at_s > RUN_BREAK_S:
            break
        units += entry.ask.weight
        began_s, wanted_s = entry.at_s, entry.wanted_at_s
    if not backfills or (units <= BURST_FREE_UNITS and began_s > now_s - WINDOW_S):
        return []
    free_at_s = backfills[0].at_s + SPREAD_S * backfills[0].ask.weight
    return [Wait(free_at_s - now_s + TICK_S, Rule.SPREAD)] if free_at_s > now_s else []
