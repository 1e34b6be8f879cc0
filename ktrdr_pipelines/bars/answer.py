"""The answer to one request: the columns as IB sent them, and their conversion to a table of bars.

`ib/wire/decoding.py` makes real answers, tests have fakes. Pure, without a clock (callers pass ``now_s``). Stamps and forming
bars: docs/ib_facts.md, 3 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ktrdr_pipelines.bars.schema import bars_from_columns, describe_check, is_unset, show_rows
from ktrdr_pipelines.domain.arrays import FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_END_OF_TIME_S = 253_402_300_800
"""10000-01-01: stamps are written with four-digit years."""


class Answer(Protocol):
    """Bars of one request as IB sent them; see `ib.wire.decoding.RawBars`."""

    @property
    def opens_s(self) -> IntArray: ...
    @property
    def open(self) -> FloatArray: ...
    @property
    def high(self) -> FloatArray: ...
    @property
    def low(self) -> FloatArray: ...
    @property
    def close(self) -> FloatArray: ...
    @property
    def volume(self) -> FloatArray: ...
    @property
    def no_data_text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NormalisedAnswer:
    """One answer of IB as a table of bars."""

    bars: pd.DataFrame
    """Sorted, unique, inside the window, complete. Not validated: the store does that when it writes them."""
    volume_missing: bool
    """IB sent -1 as the volume of a kept bar: there is no volume."""


def normalise_answer(
    raw: Answer, series: Series, window: Window, *, now_s: float, closes_s: IntArray
) -> NormalisedAnswer:
    """Convert an answer, its bars in any order, into bars of the half-open ``window`` that are complete at ``now_s``.

    ``closes_s``: when each bar of ``raw`` closes, epoch seconds. A bar is forming while its close is after ``now_s``. Rows
    outside the window and forming bars are dropped before their values are looked at, and all but one of equal rows. A volume
    of -1 becomes 0; for an instrument without volume IB's marks for "not set" do too.

    Raises:
        DataError: a stamp is after the year 9999, or two different bars have one stamp.
    """
    opens_s = raw.opens_s
    if (opens_s >= _END_OF_TIME_S).any():
        raise DataError("a bar's stamp is after the year 9999", doing=describe_check(series, window))
    values = np.column_stack([raw.open, raw.high, raw.low, raw.close, raw.volume]) + 0.0  # no -0.0
    kept = np.flatnonzero((opens_s >= window.start_s) & (opens_s < window.end_s) & (closes_s <= now_s))
    kept = kept[np.argsort(opens_s[kept], kind="stable")]
    opens_s, values = opens_s[kept], values[kept]

    # -1 means no volume. A mark for "not set" means it only where no volume is expected; else the bar is invalid.
    is_none = values[:, 4] == -1
    if not series.instrument.has_volume:
        is_none |= is_unset(values[:, 4]) & np.isfinite(values[:, 4])
    values[:, 4] = np.where(is_none, 0.0, values[:, 4])
    same_stamp = np.flatnonzero(np.diff(opens_s) == 0)
    conflicts = [i for i in same_stamp.tolist() if not np.array_equal(values[i], values[i + 1], equal_nan=True)]
    if conflicts:
        rows = bars_from_columns(opens_s, *values.T)
        shown = sorted({row for i in conflicts for row in (i, i + 1)})
        raise DataError(
            f"{len(conflicts)} timestamps have two different bars each",
            rows=show_rows(rows, shown),
            doing=describe_check(series, window),
            advice=f"Nothing of this window was written; first pair:\n{show_rows(rows, shown[:2], header=False)}",
        )
    is_first = np.ones(len(opens_s), np.bool_)
    is_first[same_stamp + 1] = False
    return NormalisedAnswer(bars_from_columns(opens_s[is_first], *values[is_first].T), bool(is_none.any()))
