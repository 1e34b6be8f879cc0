"""Answers whose bars are valid one by one but whose stamps are suspicious: shifted against the calendar, or ambiguous.

Pure. The rules for each bar are in `schema.py`, restated prices in `restatement.py`, missing bars in `loading/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ktrdr_pipelines.bars.schema import describe_check, opens_of
from ktrdr_pipelines.calendars import ExpectedBars, find_unexpected, match_held
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def list_missing_beside_unexpected(opens: IntArray, wanted: ExpectedBars, timeframe: Timeframe) -> ExpectedBars:
    """The bars of ``wanted`` that are missing between the first and last of ``opens`` (sorted epoch seconds), if it also has
    unexpected bars; else none. The cause is a wrong calendar or a shifted answer."""
    if timeframe.seconds > 86400 or not find_unexpected(wanted, opens, timeframe).any():
        return wanted.take(slice(0, 0))
    covered = wanted.take(np.flatnonzero((wanted.opens >= opens[0]) & (wanted.opens <= opens[-1])))
    return covered.take(np.flatnonzero(~match_held(covered, opens, timeframe)))


def refuse_disagreement(
    timeframe: Timeframe, doing: str, expected: ExpectedBars, doubted: pd.DataFrame, others: Sequence[pd.DataFrame]
) -> None:
    """Accept ``doubted`` bars only if ``others`` repeat them where they overlap: the same unexpected bars, the same prices.

    Raises:
        DataError: they differ, or nothing overlaps. Which answer is right is unknown, so none is written.
    """
    ours = doubted.set_index("timestamp")[["open", "high", "low", "close"]]
    overlaps = False
    for theirs in (other.set_index("timestamp")[ours.columns] for other in others if len(other)):
        mine = ours.loc[(ours.index >= theirs.index[0]) & (ours.index <= theirs.index[-1])]
        alien = find_unexpected(expected, opens_of(mine.reset_index()), timeframe)
        both = mine.index.intersection(theirs.index)
        overlaps |= len(both) > 0
        differs = mine.loc[both].ne(theirs.loc[both]).any(axis=1).any()
        if differs or not mine.index[alien].isin(theirs.index).all():
            overlaps = False
            break
    if not overlaps:
        raise DataError(
            "an answer has bars that the calendar does not expect, expected bars are missing, and a second answer does not "
            "confirm it",
            doing=doing,
            advice="Nothing of this window was written; run the load again.",
        )


def refuse_ambiguous_labels(opens_s: IntArray, series: Series, *, end_s: float, round_the_clock: bool) -> None:
    """Refuse weeks that are all stamped with Sundays, and months that are all stamped with their last calendar day, some of them
    weekend days: such a stamp can be the last day of its period or the day before it, and a mistake would shift every bar by one.
    A stamp after the request's end (``end_s``) settles it: those stamps end their periods. Markets that trade round the clock
    are not affected.

    Raises:
        DataError: the answer's stamps are ambiguous.
    """
    if series.timeframe.name not in ("1w", "1mo") or round_the_clock or not len(opens_s):
        return
    days = opens_s // 86400
    months = days.astype("datetime64[D]").astype("datetime64[M]")
    is_sunday, is_weekend = (days + 3) % 7 == 6, (days + 3) % 7 >= 5
    is_month_end = (days + 1).astype("datetime64[D]").astype("datetime64[M]") > months
    is_odd = is_sunday.all() if series.timeframe.name == "1w" else is_month_end.all() and is_weekend.any()
    if is_odd and opens_s.max() <= end_s:
        raise DataError(
            f"the {series.timeframe.name} bars are stamped with days without trading, the newest with "
            f"{days.max().astype('datetime64[D]')}: the day before their period, or its last day",
            doing=describe_check(series, None),
            advice="Nothing was written. Load daily bars and build weeks and months from them.",
        )
