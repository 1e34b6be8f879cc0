"""When a bar that answers lack is proven not to exist: which gateway, cutting all its answers alike, could have hidden it?

Pure, and the only judge of that. Two answers that agree prove little: a gateway that always leaves out the last half, a block
in the middle or every tenth bar agrees with itself. So a hole is proven only if

* at least two answers to differently shaped requests cover it and bring every bar known to exist in their range (one that
  lacks such a bar is cut, and no witness), and
* IB said in words that there is nothing in a range that holds the hole, or no uniform cut explains the hole in all of them:
  a witness has newer bars (else the newest part may be cut off), one has older bars (the oldest part), in one the hole does
  not lie in the middle of what came, and it is not one of a regular row of holes that lies alike in all of them.

Prices, files and requests are not here: what is asked is chosen in `probes.py`, who asks is `asking.py`. Beside this
stands IB's head timestamp, for what is older than everything held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.calendars import ExpectedBars, match_held, period_keys
from ktrdr_pipelines.domain.timeframes import Timeframe

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LONGEST_ROW = 64
"""Every n-th bar left out: the largest n that is thought of. A longer row has too few holes to be told from chance."""

_FEWEST_IN_ROW = 5
_BY_CHANCE = 1e-6
"""A row is believed to be cut when as many holes would lie in it by chance only so rarely; some thousand rows are thought of."""


class Doubt(IntEnum):
    """Why a hole is not proven yet."""

    NONE = 0
    UNSEEN = 1
    """Fewer than two witnesses cover it."""
    NEWER = 2
    """No witness has a newer bar."""
    OLDER = 3
    """No witness has an older bar."""
    MIDDLE = 4
    """It lies in the middle of every witness."""
    REGULAR = 5
    """It is one of a regular row of holes in every witness."""


REASONS = {
    Doubt.UNSEEN: "answers lack bars that other answers have",
    Doubt.NEWER: "no answer around them has newer bars",
    Doubt.OLDER: "no answer around them has older bars",
    Doubt.MIDDLE: "they lie in the middle of every answer",
    Doubt.REGULAR: "they lie at regular distances in every answer",
}


@dataclass(frozen=True, eq=False)
class Heard:
    """One answer: it covers ``from_s`` to ``end_s`` (epoch seconds) however durations are read; ``stamps`` are all of its bars,
    sorted, inside that or not. ``says_empty``: IB said in words that there is nothing."""

    from_s: int
    end_s: int
    stamps: IntArray
    says_empty: bool = False

    @property
    def covers_from_s(self) -> int:
        """However far back that is: what lies between two of its bars is covered."""
        return min(self.from_s, int(self.stamps[0])) if len(self.stamps) else self.from_s


@dataclass(frozen=True, eq=False)
class Judged:
    """For each hole: its `Doubt`, and whether the proof could be better (``weak``: no confirming answer has bars on both sides of
    it, or it lies at the same relative place in all of them). Weak proofs count; better ones are tried for."""

    doubts: IntArray
    weak: BoolArray


def judge_holes(
    holes: ExpectedBars,
    expected: ExpectedBars,
    heard: Sequence[Heard],
    timeframe: Timeframe,
    *,
    whole: int = 0,
    whole_before_s: int = 0,
) -> Judged:
    """Judge bars that all of ``heard`` lack. ``expected``: complete bars, as far around as they are known.

    ``whole``: the most bars of any answer of this gateway that was seen to be complete at its newest end. Such an answer shows
    that a shorter one is not cut there, for holes before ``whole_before_s`` (later ones may only be late).
    """
    doubts = np.full(len(holes), Doubt.UNSEEN, np.int64)
    weak = np.ones(len(holes), np.bool_)
    witnesses = _find_witnesses(expected, heard, timeframe)
    if not len(holes) or not witnesses:
        return Judged(doubts, weak)
    begins = np.minimum(np.minimum(holes.begins, holes.aliases), holes.opens)
    covers = np.array([(begins >= w.heard.covers_from_s) & (holes.closes <= w.heard.end_s) for w in witnesses])
    keys = period_keys(timeframe, holes.opens)
    for group in np.unique(covers, axis=1).T:
        mine = np.flatnonzero((covers == group[:, None]).all(axis=0))
        around = [w for w, is_in in zip(witnesses, group, strict=True) if is_in]
        if len(around) < 2:
            continue
        older = np.array([np.searchsorted(w.keys, keys[mine], side="left") for w in around])
        newer = np.array([len(w.keys) - np.searchsorted(w.keys, keys[mine], side="right") for w in around])
        sizes = np.array([[len(w.keys)] for w in around])
        is_whole = ((sizes > 0) & (sizes < whole)).any() & (holes.opens[mine] < whole_before_s)
        found = np.select(
            [
                ~((newer > 0).any(axis=0) | is_whole),
                ~(older > 0).any(axis=0),
                ~(np.abs(older - newer) >= 2).any(axis=0),
            ],
            [Doubt.NEWER, Doubt.OLDER, Doubt.MIDDLE],
            Doubt.NONE,
        ).astype(np.int64)
        if not any(w.heard.says_empty for w in around):
            _add_rows(found, older, newer, around)
        else:
            found[:] = Doubt.NONE
        doubts[mine] = found
        with np.errstate(divide="ignore", invalid="ignore"):
            highest, lowest = ((older + 1) / sizes).min(axis=0), ((older - 1) / sizes).max(axis=0)
        is_confirming = np.array([[w.position > 0] for w in around])
        encloses = ((older > 0) & (newer > 0) & is_confirming).any(axis=0)
        weak[mine] = ~(encloses & (lowest >= highest))
    return Judged(doubts, weak)


class _Witness:
    """An answer that brought all that it had to, with the gaps between its bars."""

    def __init__(self, heard: Heard, position: int, expected: ExpectedBars, timeframe: Timeframe) -> None:
        self.heard, self.position = heard, position
        self.keys = np.unique(period_keys(timeframe, heard.stamps))
        self._expected, self._timeframe = expected, timeframe
        self._gaps: IntArray | None = None
        self._first = 1

    @property
    def gaps(self) -> tuple[IntArray, int]:
        """How many expected bars are missing before each bar of the answer (and after the last); from which on that is known."""
        if self._gaps is None:
            known = period_keys(self._timeframe, self._expected.opens)
            lacking = known[~match_held(self._expected, self.heard.stamps, self._timeframe)]
            at = np.searchsorted(self.keys, lacking)
            self._gaps = np.bincount(at, minlength=len(self.keys) + 1)
            self._first = max(1, int(np.searchsorted(self.keys, known[0], side="right")) if len(known) else 1)
        return self._gaps, self._first


def _find_witnesses(expected: ExpectedBars, heard: Sequence[Heard], timeframe: Timeframe) -> list[_Witness]:
    stamps = [h.stamps for h in heard if len(h.stamps)]
    if not len(expected):
        return []
    known = match_held(expected, np.unique(np.concatenate(stamps)) if stamps else np.empty(0, np.int64), timeframe)
    begins = np.minimum(np.minimum(expected.begins, expected.aliases), expected.opens)
    witnesses = []
    for position, each in enumerate(heard):
        owed = known & (begins >= each.from_s) & (expected.closes <= each.end_s)
        if owed.any() and not match_held(expected.take(owed), each.stamps, timeframe).all():
            continue
        # An empty answer without a word may be a failure: it says nothing.
        if len(each.stamps) or each.says_empty:
            witnesses.append(_Witness(each, position, expected, timeframe))
    return witnesses


def _add_rows(found: IntArray, older: IntArray, newer: IntArray, around: Sequence[_Witness]) -> None:
    """Mark the holes that one rule "every n-th bar is left out", counted from either end, explains in all of the answers."""
    gaps = [w.gaps for w in around]
    turned = [(g[::-1], 1, len(g) - first) for g, first in gaps]
    forward = [(g, first, len(g) - 1) for g, first in gaps]
    for places, sides in ((older, forward), (newer, turned)):
        open_ = np.flatnonzero(found == Doubt.NONE)
        if not len(open_):
            return
        mine = places[:, open_]
        shift = np.gcd.reduce(np.abs(mine[1:] - mine[0]), axis=0)
        for step in range(1, LONGEST_ROW):  # every n-th bar lacking leaves n - 1 of them between two holes
            possible = np.flatnonzero(shift % step == 0)
            if not len(possible):
                continue
            count = np.zeros(len(possible), np.int64)
            single, longest = count.copy(), count.copy()
            explained = np.ones(len(possible), np.bool_)
            chance = np.ones(len(possible))
            for at, (gap, first, stop) in zip(mine[:, possible], sides, strict=True):
                total, filled, ones = _count_rows(gap, first, stop, step)
                explained &= filled[at % step] == total[at % step]
                # By chance as often as between the other bars; where there are no others, as often as exactly one is lacking.
                others = total.sum() - total[at % step]
                outside = (filled.sum() - filled[at % step] + 1) / (others + 2)
                share = np.where(others > 0, outside, (ones.sum() + 1) / (total.sum() + 2) / 2)
                chance = np.minimum(chance, share ** total[at % step])
                count += total[at % step]
                longest = np.maximum(longest, total[at % step])
                single += ones[at % step]
            # Mostly one bar is lacking at each place of the row: holes of all lengths are no such rule.
            row = explained & (longest >= _FEWEST_IN_ROW) & (2 * single >= count) & (chance < _BY_CHANCE)
            found[open_[possible[row]]] = Doubt.REGULAR


def _count_rows(gap: IntArray, first: int, stop: int, step: int) -> tuple[IntArray, IntArray, IntArray]:
    """For each remainder: how many places of ``gap`` between ``first`` and ``stop`` have it, at how many bars are missing, and at
    how many exactly one."""
    inside = gap[first:stop]
    rest = np.arange(first, first + len(inside)) % step
    return (
        np.bincount(rest, minlength=step),
        np.bincount(rest, weights=inside > 0, minlength=step).astype(np.int64),
        np.bincount(rest, weights=inside == 1, minlength=step).astype(np.int64),
    )
