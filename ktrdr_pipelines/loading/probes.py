"""Which request would settle whether missing bars are absent at IB. Pure; what counts as evidence is judged in `evidence.py`.

The requests tried around missing bars differ in how many older and newer bars they take in. Each is played through as honest
gateways would answer it, by either reading of durations, with the bars known to exist; the first whose answers would leave
no doubt is taken. It is usually one request for all missing bars of a window, with a bar known to exist on either side: it costs
no more than asking for the missing bars alone, and an answer that is cut as the first one was gives itself away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice, pairwise
from math import ceil, log

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars, match_held
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Duration, HistoryLimits, Timeframe
from ktrdr_pipelines.loading.evidence import AnswerEvidence, Doubt, judge_missing
from ktrdr_pipelines.planning.durations import LOOSEST, Span, is_allowed, list_durations, reach_back
from ktrdr_pipelines.planning.requests import Request, refetch_requests, split_runs

_NONE = np.empty(0, np.int64)
_MOST_TRIED = 40
_RAREST = 200
"""At most so many bars in a row are taken to be absent before one is supposed to exist, while every answer brought bars."""
_SESSIONS_PER_MONTH, _SESSIONS_PER_YEAR = {5: 22, 7: 30}, {5: 252, 7: 365}


@dataclass(frozen=True)
class Probe:
    """A request for missing bars, and from when on (epoch seconds) its answer surely contains every bar."""

    request: Request
    from_s: int


def choose_probes(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    *,
    expected: ExpectedBars,
    answers: Sequence[AnswerEvidence],
    previous: Sequence[Request],
    attempt: int,
    until_s: int,
    held: IntArray = _NONE,
    empty: Sequence[Window] = (),
    without_progress: int = 0,
    exactly: bool = False,
) -> list[Probe]:
    """Requests that cover ``missing`` bars (not empty) and show whether those exist that none of ``answers`` contains;
    usually one.

    ``expected``: bars complete at ``until_s``, as far around as they are known. ``answers``: the answers to ``previous``
    requests, which are not repeated; the last ``without_progress`` of them brought no missing bar. ``held``: opens of bars
    that are known to exist, ``empty``: where none does. ``exactly``: ask for nothing but the missing bars where durations
    can express that, because IB may then report "no data".
    """
    if all(each.says_empty for each in answers):
        # IB reports "no data": only another request for the same bars can get the same answer.
        again = refetch_requests(timeframe, missing, limits, previous=previous, attempt=attempt, until_s=until_s)
        return [Probe(request, request.window.start_s) for request in again]
    found: list[Probe] = []
    runs = _part_by_sides(timeframe, missing, expected, answers) if exactly else [missing]
    for run in (part for each in runs for part in split_runs(timeframe, each, limits)):
        around = _Around(expected, timeframe, answers, held, empty, without_progress)
        best = _choose(timeframe, run, limits, around, answers, previous, exactly)
        if best is not None:
            found.append(best)
            continue
        again = refetch_requests(timeframe, run, limits, previous=previous, attempt=attempt, until_s=until_s)
        found += [Probe(request, request.window.start_s) for request in again]
    return found


def _part_by_sides(
    timeframe: Timeframe, missing: ExpectedBars, expected: ExpectedBars, answers: Sequence[AnswerEvidence]
) -> list[ExpectedBars]:
    """Missing bars with nothing older, those with nothing newer, and those between: IB reports "no data" only for a whole
    range."""
    doubts = judge_missing(missing, expected, answers, timeframe).doubts
    sides = np.where(np.isin(doubts, (Doubt.OLDER, Doubt.NEWER)), doubts, Doubt.NONE)
    bounds = [0, *(np.flatnonzero(np.diff(sides)) + 1).tolist(), len(missing)]
    return [missing.take(slice(lo, hi)) for lo, hi in pairwise(bounds)]


def _choose(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    around: _Around,
    answers: Sequence[AnswerEvidence],
    previous: Sequence[Request],
    exactly: bool,
) -> Probe | None:
    expected, begins, present = around.expected, around.begins, around.present
    unanswered = missing.take(~match_held(missing, around.stamps, timeframe))
    used = {(int(request.end.timestamp()), str(request.duration)) for request in previous}
    best: tuple[int, int] | None = None
    chosen = None
    shapes = _list_shapes(timeframe, missing, limits, expected, around.exists, exactly)
    longest = () if exactly else _list_longest(timeframe, limits, expected, around.find_newer(missing))
    for first, last, end_s, duration in chain(islice(shapes, _MOST_TRIED), longest):
        if (end_s, str(duration)) in used:
            continue
        used.add((end_s, str(duration)))
        from_s = int(begins[first])
        doubtful = weak = 0
        for start_s in _read(duration, end_s, around, last):
            inside = present[(present >= min(start_s, from_s)) & (present < end_s)]
            answer = AnswerEvidence(from_s, end_s, inside, says_empty=not len(inside))
            judged = judge_missing(unanswered, expected, [*answers, answer], timeframe)
            doubtful += int((judged.doubts > 0).sum())
            weak += int(judged.weak.sum())
        score = (doubtful, 0 if exactly else weak)
        if best is None or score < best:
            window = Window.from_epoch(missing.earliest_at(0), int(missing.closes[-1]))
            best = score
            chosen = Probe(Request(window, datetime.fromtimestamp(end_s, UTC), duration), from_s)
        if best == (0, 0):
            break
    return chosen


class _Around:
    """The bars around the missing ones: which of them exist, as far as that is known, and how many of the others may."""

    def __init__(
        self,
        expected: ExpectedBars,
        timeframe: Timeframe,
        answers: Sequence[AnswerEvidence],
        held: IntArray,
        empty: Sequence[Window],
        without_progress: int,
    ) -> None:
        self.expected = expected
        self.stamps = np.unique(np.concatenate([each.stamps for each in answers]))
        self.begins = expected.earliest
        known = match_held(expected, np.union1d(self.stamps, held), timeframe)
        is_settled = known.copy()
        for each in answers:
            is_settled |= (self.begins >= each.from_s) & (expected.closes <= each.end_s)
        share = float(known[is_settled].mean()) if is_settled.any() else 1.0
        for window in empty:
            is_settled |= (expected.opens >= window.start_s) & (expected.opens < window.end_s)
        # Where nothing was asked for, as large a share exists as elsewhere; much less after each probe without progress.
        apart = min(_RAREST, ceil(log(0.001) / log(1 - share)) if 0 < share < 0.999 else 1) * 4**without_progress
        unknown = np.flatnonzero(~is_settled)
        newer = np.searchsorted(unknown, int(np.flatnonzero(is_settled)[-1])) if is_settled.any() else 0
        supposed = np.concatenate([unknown[:newer][::-1][apart - 1 :: apart], unknown[newer:][apart - 1 :: apart]])
        self.exists = known.copy()
        self.exists[supposed] = True
        self.present = np.union1d(np.union1d(self.stamps, held), expected.opens[supposed])

    def find_newer(self, missing: ExpectedBars) -> list[int]:
        """Places of some bars after ``missing`` that may exist."""
        after = np.flatnonzero(self.exists & (self.expected.opens > missing.opens[-1]))
        return [int(after[k]) for k in (0, 3, 30) if k < len(after)]


def _list_shapes(
    timeframe: Timeframe,
    missing: ExpectedBars,
    limits: HistoryLimits,
    expected: ExpectedBars,
    exists: BoolArray,
    exactly: bool,
) -> Iterator[tuple[int, int, int, Duration]]:
    """First and last bar (indexes of ``expected``) that a request has to reach, its end and its duration; the cheapest first."""
    i, j = (int(k) for k in np.searchsorted(expected.opens, missing.opens[[0, -1]]))
    there = np.flatnonzero(exists)
    before, after = there[there < i], there[there > j]
    length = j - i + 1
    starts = [*dict.fromkeys(int(before[-k]) for k in (1, 3, 3 * length, 20) if k <= len(before))]
    ends = [*dict.fromkeys(int(after[k - 1]) for k in (1, 4, 3 * length + 3, 2, 30, 8 * length) if k <= len(after))]
    pairs = [(s, e) for e in ends for s in starts]
    pairs.sort(key=lambda pair: pair[1] - pair[0])
    # Where nothing older or nothing newer can be reached: the missing bars alone, or from one side.
    alone = [(i, j), *((i, e) for e in ends[:1]), *((s, j) for s in starts[:2])]
    for s, e in [*alone, *pairs] if exactly else [*pairs, *alone]:
        sessions = int(expected.sessions[e] - expected.sessions[s]) + 1
        bars = expected.take(slice(s, e + 1))
        span = Span(bars.earliest_at(0), int(bars.closes[-1]), sessions, expected.sessions_per_week)
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
    begins = expected.earliest
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
        starts.append(expected.earliest_at(at))
    return starts
