"""Is a missing bar absent at IB? The judgement of what answers show of expected bars that they do not contain.

Pure, and the only judge of that. Two answers that agree prove little: a gateway that always leaves out the last half, or a block
in the middle, agrees with itself. So a missing bar counts as absent only if

* at least two answers to differently shaped requests cover it and contain every bar known to exist in their range (an answer
  without such a bar is cut, and is no evidence), and
* IB reported "no data" for a range that contains the bar, or no uniform cut explains its absence from all of them: one of the
  answers has newer bars (else the newest part may be cut off), one has older bars (the oldest part), and in one the missing bar
  is not in the middle of what came.

What a missing bar needs next is chosen in `probes.py`; who asks is `episode.py`. Beside this stands IB's head timestamp, for what
is older than everything held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

import numpy as np

from ktrdr_pipelines.bars.answer import Answer
from ktrdr_pipelines.calendars import ExpectedBars, match_held, period_keys
from ktrdr_pipelines.domain.arrays import BoolArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits, Timeframe
from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.loading.knowledge import Knowledge
from ktrdr_pipelines.planning.coverage import bars_inside
from ktrdr_pipelines.planning.durations import NOMINAL_S
from ktrdr_pipelines.planning.requests import Request

_LEAST_AROUND_S = 12 * 86400  # longer than any holiday
_EXPIRED_AFTER_S = 3 * 86400  # after its last trade date: bars may come late


class Doubt(IntEnum):
    """Why a missing bar is not confirmed as absent yet."""

    NONE = 0
    UNSEEN = 1
    """Fewer than two answers that count cover it."""
    NEWER = 2
    """No such answer has a newer bar."""
    OLDER = 3
    """No such answer has an older bar."""
    MIDDLE = 4
    """It is in the middle of every such answer."""


REASONS = {
    Doubt.UNSEEN: "fewer than two complete answers cover them",
    Doubt.NEWER: "no answer around them has newer bars",
    Doubt.OLDER: "no answer around them has older bars",
    Doubt.MIDDLE: "they are in the middle of every answer",
}


@dataclass(frozen=True, eq=False)
class AnswerEvidence:
    """One answer as evidence: it covers ``from_s`` to ``end_s`` (epoch seconds) however durations are read; ``stamps`` are all of
    its bars, sorted, inside that or not. ``says_empty``: IB reported "no data"."""

    from_s: int
    end_s: int
    stamps: IntArray
    says_empty: bool = False

    @property
    def covers_from_s(self) -> int:
        """However far back that is: what is between two of its bars is covered."""
        return min(self.from_s, int(self.stamps[0])) if len(self.stamps) else self.from_s


@dataclass(frozen=True, eq=False)
class Judged:
    """For each missing bar: its `Doubt`, and whether the evidence could be better (``weak``: no probe has bars on both sides
    of it, or it is at the same relative place in all answers). Weak evidence counts; probes are chosen to avoid it."""

    doubts: IntArray
    weak: BoolArray


def judge_missing(
    missing: ExpectedBars,
    expected: ExpectedBars,
    answers: Sequence[AnswerEvidence],
    timeframe: Timeframe,
    *,
    whole: int = 0,
    whole_before_s: int = 0,
) -> Judged:
    """Judge bars that none of ``answers`` contains. ``expected``: complete bars, as far around as they are known.

    ``whole``: the most bars of any answer of this gateway that was seen to be complete at its newest end. Such an answer shows
    that a shorter one is not cut there, for bars before ``whole_before_s`` (later ones may only be late).
    """
    doubts = np.full(len(missing), Doubt.UNSEEN, np.int64)
    weak = np.ones(len(missing), np.bool_)
    counting = _find_counting(expected, answers, timeframe)
    if not len(missing) or not counting:
        return Judged(doubts, weak)
    earliest = missing.earliest
    covers = np.array([(earliest >= c.answer.covers_from_s) & (missing.closes <= c.answer.end_s) for c in counting])
    keys = period_keys(timeframe, missing.opens)
    for group in np.unique(covers, axis=1).T:
        mine = np.flatnonzero((covers == group[:, None]).all(axis=0))
        around = [c for c, is_in in zip(counting, group, strict=True) if is_in]
        if len(around) < 2:
            continue
        older = np.array([np.searchsorted(c.keys, keys[mine], side="left") for c in around])
        newer = np.array([len(c.keys) - np.searchsorted(c.keys, keys[mine], side="right") for c in around])
        sizes = np.array([[len(c.keys)] for c in around])
        if any(c.answer.says_empty for c in around):
            doubts[mine] = Doubt.NONE
        else:
            is_whole = ((sizes > 0) & (sizes < whole)).any() & (missing.opens[mine] < whole_before_s)
            doubts[mine] = _find_cuts(older, newer, is_whole)
        with np.errstate(divide="ignore", invalid="ignore"):
            highest, lowest = ((older + 1) / sizes).min(axis=0), ((older - 1) / sizes).max(axis=0)
        is_probe = np.array([[c.position > 0] for c in around])
        encloses = ((older > 0) & (newer > 0) & is_probe).any(axis=0)
        weak[mine] = ~(encloses & (lowest >= highest))
    return Judged(doubts, weak)


def _find_cuts(older: IntArray, newer: IntArray, is_whole: BoolArray) -> IntArray:
    """Which uniform cut could explain each missing bar (a column) in all answers (rows): counts of older and newer bars."""
    return np.select(
        [
            ~((newer > 0).any(axis=0) | is_whole),
            ~(older > 0).any(axis=0),
            ~(np.abs(older - newer) >= 2).any(axis=0),
        ],
        [Doubt.NEWER, Doubt.OLDER, Doubt.MIDDLE],
        Doubt.NONE,
    ).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Counting:
    """An answer that contains every bar known to exist in its range, at its place among all answers."""

    answer: AnswerEvidence
    position: int
    keys: IntArray


def _find_counting(expected: ExpectedBars, answers: Sequence[AnswerEvidence], timeframe: Timeframe) -> list[_Counting]:
    stamps = [a.stamps for a in answers if len(a.stamps)]
    if not len(expected):
        return []
    known = match_held(expected, np.unique(np.concatenate(stamps)) if stamps else np.empty(0, np.int64), timeframe)
    earliest = expected.earliest
    counting = []
    for position, each in enumerate(answers):
        owed = known & (earliest >= each.from_s) & (expected.closes <= each.end_s)
        if owed.any() and not match_held(expected.take(owed), each.stamps, timeframe).all():
            continue
        # An empty answer without IB's "no data" may be a failure: it is no evidence.
        if len(each.stamps) or each.says_empty:
            counting.append(_Counting(each, position, np.unique(period_keys(timeframe, each.stamps))))
    return counting


class RequestEvidence:
    """The answers to one planned request and its probes, and what they show. Asks nothing, writes nothing."""

    def __init__(
        self,
        series: Series,
        window: Window,
        known: Knowledge,
        limits: HistoryLimits,
        all_expected: ExpectedBars,
        now_s: int,
    ) -> None:
        """``window`` is the planned request's. ``all_expected``: expected bars in and around it, complete at ``now_s`` or not."""
        self._series, self._known = series, known
        self.answers: list[AnswerEvidence] = []
        longest = series.timeframe.longest_request(limits)
        reach_s = max(_LEAST_AROUND_S, longest.count * NOMINAL_S[longest.unit])
        self._near = bars_inside(
            all_expected, Window.from_epoch(max(0, window.start_s - reach_s), window.end_s + reach_s)
        )
        self.complete = self._near
        """Bars that are complete by now, as far around the window as a request for it may reach."""
        self.look_around(now_s)

    def look_around(self, now_s: int) -> None:
        """It is ``now_s``: an answer may have moved the gateway's clock."""
        self.complete = self._near.take(slice(0, int(np.searchsorted(self._near.closes, now_s, side="right"))))

    def add(self, raw: Answer, request: Request, from_s: int | None = None) -> None:
        """Keep what ``raw`` shows; it covers ``from_s`` on, or the window of ``request``."""
        end_s = int(request.end.timestamp())
        stamps = np.unique(np.asarray(raw.opens_s, dtype=np.int64))
        from_s = request.window.start_s if from_s is None else from_s
        self.answers.append(AnswerEvidence(from_s, end_s, stamps, bool(raw.no_data_text)))
        owed = np.flatnonzero(self.complete.closes <= end_s)
        newest = self.complete.take(owed[-1:])
        if len(stamps) and len(owed) and match_held(newest, stamps, self._series.timeframe).all():
            self._known.longest_whole = max(self._known.longest_whole, len(stamps))

    def find_doubtful(self, missing: ExpectedBars) -> ExpectedBars:
        """Those of ``missing`` that are not confirmed as absent."""
        return missing.take(np.flatnonzero(self._judge(missing) > 0))

    def _judge(self, missing: ExpectedBars) -> IntArray:
        return judge_missing(
            missing,
            self.complete,
            self.answers,
            self._series.timeframe,
            whole=self._known.longest_whole,
            whole_before_s=self._known.held.last_s or 0,
        ).doubts

    def are_newest(self, missing: ExpectedBars) -> bool:
        """True if there are ``missing`` bars and nothing newer is known than any of them: they may only be late, or trading was
        halted. No answer can show that it was not cut right before them, so only IB's "no data" confirms them: they stay
        missing and are asked for again with the next load; the tail sensor waits longer each time
        (`orchestration/automation/tail.py`)."""
        known_s = max((int(a.stamps[-1]) for a in self.answers if len(a.stamps)), default=0)
        return len(missing) > 0 and max(known_s, self._known.held.last_s or 0) < int(missing.opens[0])

    def leave_out_expired(self, missing: ExpectedBars, now_s: int) -> ExpectedBars:
        """``missing`` without those on or after the last trade date of an expired future: nothing newer will ever come that could
        show more, IB reports when it ends, and answers of two shapes agree."""
        try:
            last = datetime.strptime(self._series.instrument.last_trade_date, "%Y%m%d").replace(tzinfo=UTC)
        except ValueError:
            return missing
        last_s = int(last.timestamp())
        if now_s < last_s + _EXPIRED_AFTER_S:
            return missing
        return missing.take(np.flatnonzero(missing.begins < last_s))

    def reach_the_end(self, missing: ExpectedBars) -> bool:
        """True if every bar that is complete by now and newer than ``missing`` is known to be absent, or there is none."""
        newer = self.complete.opens[self.complete.opens > missing.opens[-1]]
        for window in self._known.sidecar.empty_windows:
            newer = newer[(newer < window.start_s) | (newer >= window.end_s)]
        return not len(newer)

    def are_beyond_reach(self, missing: ExpectedBars) -> bool:
        """True if there are ``missing`` bars at the ends of answers of a series that IB serves only up to now: no other
        request can show more of them. They stay missing."""
        sides = (Doubt.OLDER, Doubt.NEWER)
        is_at_end = len(missing) > 0 and self._series.instrument.ends_now
        return is_at_end and bool(np.isin(self._judge(missing), sides).all())

    def explain_doubt(self, doubtful: ExpectedBars, request: Request) -> TransientError:
        """The error of a window with bars of which it is not known whether they exist."""
        doubts = self._judge(doubtful)
        first = format_instant(datetime.fromtimestamp(int(doubtful.opens[0]), UTC))
        why = "; ".join(REASONS[Doubt(each)] for each in np.unique(doubts[doubts > 0]))
        return TransientError(
            f"{len(self.answers)} answers do not contain {len(doubtful)} expected bars, the first {first}, and do not show that "
            f"they are absent at IB: {why}",
            doing=f"loading {self._series} {request.window}",
            advice="The gateway may be cutting its answers. What arrived is in the file; run the load again later.",
        )
