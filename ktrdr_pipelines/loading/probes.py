"""Which request shows best whether bars that answers lack really do not exist. Pure; what counts as proof is `evidence.py`'s.

The requests tried around a hole differ in how many older and newer bars they take in. Each is played through as honest
gateways would answer it, by either reading of durations, with the bars known to exist; the first whose answers would leave
no doubt is taken. It is usually one request for all holes of a window, with a bar known to exist on either side: it costs no
more than asking for the holes alone, and an answer that is cut as the first one was betrays itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice, pairwise
from math import ceil, log

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.calendars import ExpectedBars, match_held
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Duration, HistoryLimits, Timeframe
from ktrdr_pipelines.loading.evidence import Doubt, Heard, judge_holes
from ktrdr_pipelines.planning.durations import LOOSEST, Span, is_allowed, list_durations, reach_back
from ktrdr_pipelines.planning.requests import Request, refetch_requests, split_runs

IntArray = npt.NDArray[np.int64]

_NONE = np.empty(0, np.int64)
_MOST_TRIED = 40
_RAREST = 200
"""So many bars in a row may not exist and the next one be hoped for, before anything was asked in vain."""
_SESSIONS_PER_MONTH, _SESSIONS_PER_YEAR = {5: 22, 7: 30}, {5: 252, 7: 365}


@dataclass(frozen=True)
class Confirmation:
    """A request for holes, and from when on (epoch seconds) its answer surely holds every bar."""

    request: Request
    from_s: int


def confirm_holes(
    timeframe: Timeframe,
    holes: ExpectedBars,
    limits: HistoryLimits,
    *,
    expected: ExpectedBars,
    heard: Sequence[Heard],
    previous: Sequence[Request],
    attempt: int,
    until_s: int,
    held: IntArray = _NONE,
    empty: Sequence[Window] = (),
    fruitless: int = 0,
    exactly: bool = False,
) -> list[Confirmation]:
    """Requests that cover ``holes`` (not empty) and show whether those exist that all of ``heard`` lack; usually one.

    ``expected``: bars complete at ``until_s``, as far around as they are known. ``heard``: the answers to ``previous``
    requests, which are not repeated, the last ``fruitless`` of them in vain. ``held``: opens of bars that are known to exist,
    ``empty``: where nothing does. ``exactly``: ask for nothing but the holes where durations can say that, for IB may answer
    in words.
    """
    if all(each.says_empty for each in heard):
        # Nothing of it exists, IB says: another request for the same is what can get the same answer.
        again = refetch_requests(timeframe, holes, limits, previous=previous, attempt=attempt, until_s=until_s)
        return [Confirmation(request, request.window.start_s) for request in again]
    found: list[Confirmation] = []
    runs = _part_by_sides(timeframe, holes, expected, heard) if exactly else [holes]
    for run in (part for each in runs for part in split_runs(timeframe, each, limits)):
        around = _Around(expected, timeframe, heard, held, empty, fruitless)
        best = _choose(timeframe, run, limits, around, heard, previous, exactly)
        if best is not None:
            found.append(best)
            continue
        again = refetch_requests(timeframe, run, limits, previous=previous, attempt=attempt, until_s=until_s)
        found += [Confirmation(request, request.window.start_s) for request in again]
    return found


def _part_by_sides(
    timeframe: Timeframe, holes: ExpectedBars, expected: ExpectedBars, heard: Sequence[Heard]
) -> list[ExpectedBars]:
    """Holes with nothing older, those with nothing newer, and those between: only by itself can a range be called empty."""
    doubts = judge_holes(holes, expected, heard, timeframe).doubts
    sides = np.where(np.isin(doubts, (Doubt.OLDER, Doubt.NEWER)), doubts, Doubt.NONE)
    bounds = [0, *(np.flatnonzero(np.diff(sides)) + 1).tolist(), len(holes)]
    return [holes.take(slice(lo, hi)) for lo, hi in pairwise(bounds)]


def _choose(
    timeframe: Timeframe,
    holes: ExpectedBars,
    limits: HistoryLimits,
    around: _Around,
    heard: Sequence[Heard],
    previous: Sequence[Request],
    exactly: bool,
) -> Confirmation | None:
    expected, begins, present = around.expected, around.begins, around.present
    lacking = holes.take(~match_held(holes, around.stamps, timeframe))
    used = {(int(request.end.timestamp()), str(request.duration)) for request in previous}
    best: tuple[int, int] | None = None
    chosen = None
    shapes = _list_shapes(timeframe, holes, limits, expected, around.exists, exactly)
    longest = () if exactly else _list_longest(timeframe, limits, expected, around.find_newer(holes))
    for first, last, end_s, duration in chain(islice(shapes, _MOST_TRIED), longest):
        if (end_s, str(duration)) in used:
            continue
        used.add((end_s, str(duration)))
        from_s = int(begins[first])
        doubtful = weak = 0
        for start_s in _read(duration, end_s, around, last):
            inside = present[(present >= min(start_s, from_s)) & (present < end_s)]
            answer = Heard(from_s, end_s, inside, says_empty=not len(inside))
            judged = judge_holes(lacking, expected, [*heard, answer], timeframe)
            doubtful += int((judged.doubts > 0).sum())
            weak += int(judged.weak.sum())
        score = (doubtful, 0 if exactly else weak)
        if best is None or score < best:
            window = Window.from_epoch(int(_begin(holes)), int(holes.closes[-1]))
            best = score
            chosen = Confirmation(Request(window, datetime.fromtimestamp(end_s, UTC), duration), from_s)
        if best == (0, 0):
            break
    return chosen


class _Around:
    """The bars around the holes: which of them exist, as far as that is known, and how many of the others may."""

    def __init__(
        self,
        expected: ExpectedBars,
        timeframe: Timeframe,
        heard: Sequence[Heard],
        held: IntArray,
        empty: Sequence[Window],
        fruitless: int,
    ) -> None:
        self.expected = expected
        self.stamps = np.unique(np.concatenate([each.stamps for each in heard]))
        self.begins = np.minimum(np.minimum(expected.begins, expected.aliases), expected.opens)
        known = match_held(expected, np.union1d(self.stamps, held), timeframe)
        is_settled = known.copy()
        for each in heard:
            is_settled |= (self.begins >= each.from_s) & (expected.closes <= each.end_s)
        share = float(known[is_settled].mean()) if is_settled.any() else 1.0
        for window in empty:
            is_settled |= (expected.opens >= window.start_s) & (expected.opens < window.end_s)
        # Of what nobody asked for as much exists as elsewhere; after each question in vain, much less.
        apart = min(_RAREST, ceil(log(0.001) / log(1 - share)) if 0 < share < 0.999 else 1) * 4**fruitless
        unknown = np.flatnonzero(~is_settled)
        newer = np.searchsorted(unknown, int(np.flatnonzero(is_settled)[-1])) if is_settled.any() else 0
        hoped = np.concatenate([unknown[:newer][::-1][apart - 1 :: apart], unknown[newer:][apart - 1 :: apart]])
        self.exists = known.copy()
        self.exists[hoped] = True
        self.present = np.union1d(np.union1d(self.stamps, held), expected.opens[hoped])

    def find_newer(self, holes: ExpectedBars) -> list[int]:
        """Places of some bars after ``holes`` that may exist."""
        after = np.flatnonzero(self.exists & (self.expected.opens > holes.opens[-1]))
        return [int(after[k]) for k in (0, 3, 30) if k < len(after)]


def _begin(bars: ExpectedBars) -> int:
    return min(int(bars.begins[0]), int(bars.aliases[0]), int(bars.opens[0]))


def _list_shapes(
    timeframe: Timeframe,
    holes: ExpectedBars,
    limits: HistoryLimits,
    expected: ExpectedBars,
    exists: npt.NDArray[np.bool_],
    exactly: bool,
) -> Iterator[tuple[int, int, int, Duration]]:
    """First and last bar (indexes of ``expected``) that a request has to reach, its end and its duration; the cheapest first."""
    i, j = (int(k) for k in np.searchsorted(expected.opens, holes.opens[[0, -1]]))
    there = np.flatnonzero(exists)
    before, after = there[there < i], there[there > j]
    length = j - i + 1
    starts = [*dict.fromkeys(int(before[-k]) for k in (1, 3, 3 * length, 20) if k <= len(before))]
    ends = [*dict.fromkeys(int(after[k - 1]) for k in (1, 4, 3 * length + 3, 2, 30, 8 * length) if k <= len(after))]
    pairs = [(s, e) for e in ends for s in starts]
    pairs.sort(key=lambda pair: pair[1] - pair[0])
    # Where nothing older or nothing newer can be reached, the holes alone, or from one side.
    alone = [(i, j), *((i, e) for e in ends[:1]), *((s, j) for s in starts[:2])]
    for s, e in [*alone, *pairs] if exactly else [*pairs, *alone]:
        sessions = int(expected.sessions[e] - expected.sessions[s]) + 1
        bars = expected.take(slice(s, e + 1))
        span = Span(_begin(bars), int(bars.closes[-1]), sessions, expected.sessions_per_week)
        for base in list_durations(timeframe, span, limits, LOOSEST):
            exact_s = span.end_s - span.start_s
            counts = [base.count, base.count + 1, base.count + 2] if base.unit != "S" else [exact_s, base.count]
            for count in counts:
                duration = Duration(count, base.unit)
                if is_allowed(timeframe, duration, limits):
                    yield s, e, span.end_s, duration


def _list_longest(
    timeframe: Timeframe, limits: HistoryLimits, expected: ExpectedBars, ends: Sequence[int]
) -> Iterator[tuple[int, int, int, Duration]]:
    """The longest request up to each of ``ends``: where it counts sessions that have bars, it reaches over any halt."""
    longest = timeframe.longest_request(limits)
    days = {"M": 31, "W": 7, "Y": 366}.get(longest.unit, 1) * longest.count
    in_days = next((d for n in range(days, 0, -1) if is_allowed(timeframe, d := Duration(n, "D"), limits)), longest)
    begins = np.minimum(np.minimum(expected.begins, expected.aliases), expected.opens)
    for e in ends:
        end_s = int(expected.closes[e])
        for duration in dict.fromkeys((in_days, longest)):
            yield min(e, int(np.searchsorted(begins, reach_back(end_s, duration)))), e, end_s, duration


def _read(duration: Duration, end_s: int, around: _Around, last: int) -> list[int]:
    """Where the request may begin: by the calendar, and by counting sessions that have bars."""
    starts = [reach_back(end_s, duration)]
    expected = around.expected
    week = expected.sessions_per_week
    per_unit = {"D": 1, "W": week, "M": _SESSIONS_PER_MONTH[week], "Y": _SESSIONS_PER_YEAR[week]}
    traded = np.unique(expected.sessions[: last + 1][around.exists[: last + 1]])
    if duration.unit in per_unit and len(traded):
        first_session = traded[max(0, len(traded) - duration.count * per_unit[duration.unit])]
        at = int(np.searchsorted(expected.sessions, first_session))
        starts.append(_begin(expected.take(slice(at, at + 1))))
    return starts
