"""Answers that are sound bar by bar and yet cannot be what they seem: shifted against the calendar, or with labels that fit two
periods.

Pure. The rules that each bar has to keep are in `schema.py`, restated prices in `restatement.py`, missing bars in
`loading/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import describe_check, opens_of
from ktrdr_pipelines.calendars import ExpectedBars, find_unexpected, match_held
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError


def list_lacking_beside_unexpected(opens: IntArray, wanted: ExpectedBars, timeframe: Timeframe) -> ExpectedBars:
    """Of an answer (its ``opens``, sorted epoch seconds) that has bars where none is expected: the bars of ``wanted`` that it
    lacks between its first and last. A calendar that is wrong looks like that, and so does an answer that is shifted."""
    if timeframe.seconds > 86400 or not find_unexpected(wanted, opens, timeframe).any():
        return wanted.take(slice(0, 0))
    covered = wanted.take(np.flatnonzero((wanted.opens >= opens[0]) & (wanted.opens <= opens[-1])))
    return covered.take(np.flatnonzero(~match_held(covered, opens, timeframe)))


def refuse_disagreement(
    timeframe: Timeframe, doing: str, expected: ExpectedBars, doubted: pd.DataFrame, others: Sequence[pd.DataFrame]
) -> None:
    """``doubted`` bars stand if ``others`` repeat them where they overlap: the same bars where none is expected, the same prices.

    Raises:
        DataError: they do not, or there is nothing to compare; which of them is right cannot be told, and none is written.
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
            "an answer has bars where the calendar has none and lacks some that it has, and a second answer does not agree "
            "with it",
            doing=doing,
            advice="Nothing of this window was written; run the load again.",
        )


def refuse_ambiguous_labels(opens_s: IntArray, series: Series, *, end_s: float, round_the_clock: bool) -> None:
    """Refuse weeks labelled with Sundays and months with their calendar's last days where nothing trades then: whether such a
    label ends its week or stands before it cannot be told, and a mistake would shift every bar by one. A label after the
    request's end (``end_s``) tells: those labels end their weeks. All labels of an answer have to be like that, not one.

    Raises:
        DataError: the answer's labels are such.
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
            f"the {series.timeframe.name} bars are labelled with days on which nothing trades, the newest with "
            f"{days.max().astype('datetime64[D]')}: whether with the day before their period or its last one cannot be told",
            doing=describe_check(series, None),
            advice="Nothing was written. Load daily bars; weeks and months can be made of them.",
        )
