"""Restatement: do an answer and the held bars have one price scale, or has IB restated the history?

TRADES are split-adjusted as of the day of the request, so after a split every held bar is wrong by the ratio, and new bars beside
them would make a file with two price scales. A revision changes some prices of a bar; a split changes all four by the same ratio.
Pure. This module also selects the held bars that are requested again for the comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.bars.answer import Answer
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import ExpectedBars, match_held
from ktrdr_pipelines.domain.arrays import BoolArray, FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

RESTATED_KINDS = ("STK", "CFD", "CONTFUT")
"""Kinds whose history IB restates: shares and CFDs (splits), continuous futures (rolls). Not pairs, indices, plain futures."""

LEAST_CHANGE = 0.02
"""A smaller change of the ratio is no split: the smallest stock dividends that IB adjusts for are a few per cent."""

BARS_TO_SHOW_A_ROLL = 3
"""At a roll IB may restate a continuous future by the distance of two contracts, however small: so many bars must agree, else it
may be a revision."""

_PRICES = ("open", "high", "low", "close")


class ScaleChanged(DataError):
    """The held bars have another price scale than IB's answers. Nothing may be added to the file."""


def find_ratio(held: pd.DataFrame, answer: Answer, *, may_roll: bool = False) -> float | None:
    """The answer's prices as a multiple of the ``held`` ones, if at least half of the common bars agree; None if the price
    scale is the same, or there is no common bar."""
    at, of_answer = _common(opens_of(held), np.asarray(answer.opens_s))
    if not len(at):
        return None
    old = held[list(_PRICES)].to_numpy(np.float64)[at]
    new = np.column_stack([np.asarray(getattr(answer, name), dtype=np.float64)[of_answer] for name in _PRICES])
    with np.errstate(all="ignore"):
        ratios = new / old
        ratio = np.median(ratios, axis=1)
        # Prices are rounded to ticks on both sides.
        is_uniform = (np.abs(new - old * ratio[:, None]) <= 0.005 * np.abs(new) + 0.011).all(axis=1)
        has_moved = (np.abs(ratio - 1) > LEAST_CHANGE) & (ratio > 0) & np.isfinite(ratio)
        all_moved = (np.abs(ratios - 1) > LEAST_CHANGE / 2).all(axis=1)
    changed = is_uniform & has_moved & all_moved
    if may_roll and len(at) >= BARS_TO_SHOW_A_ROLL:
        changed |= _has_rolled(old, new)
    return float(np.median(ratio[changed])) if 2 * int(changed.sum()) >= len(at) else None


def _has_rolled(old: FloatArray, new: FloatArray) -> BoolArray:
    """True for each bar (a row of four prices) whose prices all moved in one direction by about the same amount."""
    with np.errstate(all="ignore"):
        moved = new - old
        usual = np.median(moved, axis=1)[:, None]
        return np.asarray((np.abs(moved - usual) <= np.abs(usual) / 2).all(axis=1) & (usual[:, 0] != 0))


def refuse_restatement(series: Series, held: pd.DataFrame, answer: Answer, doing: str) -> None:
    """Compare every bar of ``answer``, also outside its window, with the ``held`` ones.

    Raises:
        ScaleChanged: they differ by a ratio, or by the distance of a roll.
    """
    ratio = find_ratio(held, answer, may_roll=series.instrument.sec_type == "CONTFUT") if len(held) else None
    if ratio is not None:
        raise report_split(series, held, answer, ratio).while_doing(doing)


def report_split(series: Series, held: pd.DataFrame, answer: Answer, ratio: float) -> ScaleChanged:
    """The error for a ratio of `find_ratio`, with one bar as held and as IB sends it now."""
    at, of_answer = _common(opens_of(held), np.asarray(answer.opens_s))
    i, j = int(at[-1]), int(of_answer[-1])
    stamp = format_instant(held["timestamp"].iloc[i].to_pydatetime())
    is_rolled = series.instrument.sec_type == "CONTFUT"
    why = "probably at the roll to another contract" if is_rolled else "probably for a split"
    words = f"by 1:{1 / ratio:.4g}" if ratio < 1 else f"by {ratio:.4g}:1"
    if is_rolled:
        words = f"by about {answer.close[j] - held['close'].iloc[i]:+.6g}"
    return ScaleChanged(
        f"IB restated the history of {series.instrument.symbol}, {why}: the bar {stamp} has close "
        f"{held['close'].iloc[i]:g} in the file and {answer.close[j]:g} in IB's answer (all four prices {words})",
        advice=f"Nothing was written: the file would mix two price scales. Move {series.name}.csv and {series.name}.meta.json "
        f"away and run `ktrdr ib-load {series.instrument.symbol!r} {series.timeframe} --mode full`.",
    )


def _common(held_s: IntArray, answer_s: IntArray) -> tuple[npt.NDArray[np.intp], ...]:
    _, at, of_answer = np.intersect1d(held_s, answer_s, return_indices=True)
    return at, of_answer


def list_anchors(expected: ExpectedBars, asked: ExpectedBars, held_opens: IntArray, timeframe: Timeframe) -> list[int]:
    """Indexes of ``expected``, oldest first: the held bars next to the ``asked`` ones, before and after each run.
    Requested again, each shows whether the file still has IB's price scale."""
    if not len(asked) or not len(expected):
        return []
    is_held = match_held(expected, held_opens, timeframe)
    at = np.searchsorted(expected.opens, asked.opens)
    beside = np.unique(np.concatenate([at - 1, at + 1]))
    beside = beside[(beside >= 0) & (beside < len(expected))]
    return [int(i) for i in beside[is_held[beside]]]
