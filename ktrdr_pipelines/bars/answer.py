"""The answer to one request: the columns as IB sent them, and their conversion to a table of bars.

`ib/wire/decoding.py` makes real answers, tests have fakes. Pure, without a clock (callers pass ``now_s``). Stamps and forming
bars: docs/ib_facts.md, 3 and 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from ktrdr_pipelines.bars.schema import (
    COLUMNS,
    LATEST_SESSION_END_S,
    SHOWN_ROWS,
    bars_from_columns,
    describe_check,
    is_unset,
    show_rows,
    stamps_us_of,
)
from ktrdr_pipelines.domain.arrays import FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError

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


Closes = Mapping[int, int] | npt.ArrayLike | Callable[[IntArray], npt.ArrayLike]
"""When bars close, in epoch seconds: a mapping open -> close for the known opens, an array parallel to the answer's rows, or a
function from opens to closes."""


@dataclass(frozen=True, slots=True)
class NormalisedAnswer:
    """One answer of IB as bars, with counts of what was dropped and repaired."""

    bars: pd.DataFrame
    """Sorted, unique, inside the window, complete at ``now_s``. Not validated: the store does that when it writes them."""
    received: int
    """Rows in the answer."""
    outside: int
    """Rows dropped because their open is outside the window."""
    forming: int
    """Rows of the window dropped because they close after ``now_s``."""
    duplicates: int
    """Rows dropped because an equal one is kept."""
    out_of_order: bool
    """The answer's stamps were not ascending."""
    volume_missing: bool
    """IB sent -1 as the volume of a kept bar: there is no volume."""
    earliest_open_s: int | None
    """The earliest open of the whole answer, also outside the window. None if the answer is empty."""


def normalise_answer(
    raw: pd.DataFrame | Mapping[str, npt.ArrayLike],
    series: Series,
    window: Window,
    *,
    now_s: float,
    closes: Closes | None = None,
) -> NormalisedAnswer:
    """Convert an answer into bars of the half-open ``window`` that are complete at ``now_s``.

    ``raw`` has the columns `COLUMNS` in any order, rows in any order; ``timestamp`` is in epoch seconds or aware datetimes.
    A bar is forming while its close is after ``now_s``. Without ``closes`` an intraday bar closes at its open plus
    the timeframe's seconds (never too early: short bars of a session close before that), a daily or longer one
    `LATEST_SESSION_END_S` after its nominal end. Rows outside the window and forming bars are dropped before their values
    are checked. A volume of -1 becomes 0; for an instrument without volume IB's marks for "not set" do too.

    Raises:
        DataError: a stamp is not a whole second, or two different bars have one stamp.
    """
    doing = describe_check(series, window)
    missing = [name for name in COLUMNS if name not in raw]
    if missing:
        raise DataError(f"the answer has no {', '.join(missing)}", doing=doing)
    opens_s = _whole_seconds(raw["timestamp"], doing)
    values = np.column_stack([np.asarray(raw[name], dtype=np.float64) for name in COLUMNS[1:]]) + 0.0  # no -0.0
    if len(values) != len(opens_s):
        raise DataError("the answer's columns differ in length", doing=doing)
    closes_s = _closes(opens_s, series.timeframe, closes)

    inside = (opens_s >= window.start_s) & (opens_s < window.end_s)
    complete = inside & (closes_s <= now_s)
    order = np.argsort(opens_s[complete], kind="stable")
    kept_opens, kept = opens_s[complete][order], values[complete][order]

    # -1 means no volume. A mark for "not set" means it only where no volume is expected; else the bar is invalid.
    is_none = kept[:, 4] == -1
    if not series.instrument.has_volume:
        is_none |= is_unset(kept[:, 4]) & np.isfinite(kept[:, 4])
    volume_missing = bool(is_none.any())
    kept[:, 4] = np.where(is_none, 0.0, kept[:, 4])
    same_stamp = np.flatnonzero(np.diff(kept_opens) == 0)
    conflicts = [i for i in same_stamp.tolist() if not np.array_equal(kept[i], kept[i + 1], equal_nan=True)]
    if conflicts:
        rows = bars_from_columns(kept_opens, *kept.T)
        shown = sorted({row for i in conflicts for row in (i, i + 1)})
        raise DataError(
            f"{len(conflicts)} timestamps have two different bars each",
            rows=show_rows(rows, shown),
            doing=doing,
            advice=f"Nothing of this window was written; first pair:\n{show_rows(rows, shown[:2], header=False)}",
        )
    first_of_stamp = np.ones(len(kept_opens), np.bool_)
    first_of_stamp[same_stamp + 1] = False

    bars = bars_from_columns(kept_opens[first_of_stamp], *kept[first_of_stamp].T)
    return NormalisedAnswer(
        bars=bars,
        received=len(opens_s),
        outside=int((~inside).sum()),
        forming=int((inside & ~complete).sum()),
        duplicates=len(same_stamp),
        out_of_order=bool((np.diff(opens_s) < 0).any()),
        volume_missing=volume_missing,
        earliest_open_s=int(opens_s.min()) if len(opens_s) else None,
    )


def _closes(opens_s: IntArray, timeframe: Timeframe, closes: Closes | None) -> IntArray:
    nominal = opens_s + timeframe.seconds + (0 if timeframe.is_intraday else LATEST_SESSION_END_S)
    if closes is None:
        return nominal
    if isinstance(closes, Mapping):
        return np.array([closes.get(o, n) for o, n in zip(opens_s.tolist(), nominal.tolist(), strict=True)], np.int64)
    known = np.asarray(closes(opens_s) if callable(closes) else closes, dtype=np.int64)
    if known.shape != opens_s.shape:
        raise ValueError(f"{len(opens_s)} opens, but closes of shape {known.shape}")
    return known


def _whole_seconds(stamps: Any, doing: str) -> IntArray:
    """Epoch seconds from numbers or aware datetimes; anything else, and fractions, are refused."""
    values: pd.Series[Any] = pd.Series(stamps)
    if not len(values):
        return np.empty(0, np.int64)
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        stamps_us = stamps_us_of(values)
        seconds = stamps_us // 1_000_000
        whole = (stamps_us % 1_000_000 == 0) & values.notna().to_numpy(np.bool_)
    elif values.dtype.kind in "iuf":
        numbers = values.to_numpy(np.float64)
        whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < _END_OF_TIME_S)
        seconds = np.where(whole, numbers, 0).astype(np.int64)
    else:
        raise DataError(
            f"bar stamps are neither epoch seconds nor datetimes with a zone: {values.iloc[0]!r}", doing=doing
        )
    if not whole.all():
        rows = values[~whole].head(SHOWN_ROWS).to_string()
        raise DataError(f"{int((~whole).sum())} bar stamps are not whole seconds", rows=rows, doing=doing)
    return np.asarray(seconds, dtype=np.int64)
