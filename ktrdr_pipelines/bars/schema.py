"""The bars table: columns and types, and the rules for its rows (pandera).

A bars table is a pandas DataFrame with the columns `COLUMNS`: ``timestamp`` (``datetime64[us, UTC]``, the bar's open), the
four prices and the volume (``float64``), and a RangeIndex. Pure: no files, no network, no clock (callers pass ``now_s``).
The CSV format is in `store/csv_format.py`, expected opens in `calendars/expected.py`, the conversion of answers in `answer.py`.
Where a table is made or checked, pandas and pandera are imported: together they take a second, and many commands need neither.
Stamps and forming bars: docs/ib_facts.md, 3 and 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.calendars import session_starts_off
from ktrdr_pipelines.domain.arrays import BoolArray, FloatArray, IntArray
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd
    import pandera.pandas as pa

COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
"""Column names of a bars table, in order; also the header of the CSV."""

STAMP_DTYPE = "datetime64[us, UTC]"

LATEST_SESSION_END_S = 6 * 3600
"""The latest end of a session after midnight UTC: US extended hours end at 20:00 New York, 01:00 UTC in winter. Without a
calendar, a daily bar counts as complete this long after its nominal end."""

MOST = 2.0**53
"""Upper bound of prices and volumes (excluded); integers from here on are not exact. IB's marks for a value that is not set (the
largest double, 2^63 - 1 and 2^127 - 1) are larger."""

_UNSET_INTEGER = 2.0**31 - 1

SHOWN_ROWS = 10
_SIGNED_KINDS = ("FUT", "CONTFUT", "IND")
"""Kinds that may trade at or below zero (crude oil on 2020-04-20, spreads, TICK-NYSE) and whose sessions may open off the
quarter hour (Eurex at 01:10 Frankfurt)."""


# ---------------------------------------------------------------------------------------------------- the table


def bars_from_columns(
    opens_s: npt.ArrayLike,
    open_: npt.ArrayLike,
    high: npt.ArrayLike,
    low: npt.ArrayLike,
    close: npt.ArrayLike,
    volume: npt.ArrayLike,
) -> pd.DataFrame:
    """A bars table from columns; ``opens_s`` in epoch seconds UTC. It is not checked: see `validate_bars`."""
    import pandas as pd

    stamps = np.asarray(opens_s, dtype=np.int64).astype("datetime64[s]").astype("datetime64[us]")
    prices = {
        name: np.asarray(values, dtype=np.float64)
        for name, values in zip(COLUMNS[1:], (open_, high, low, close, volume), strict=True)
    }
    return pd.DataFrame({"timestamp": pd.DatetimeIndex(stamps).tz_localize("UTC"), **prices})


def empty_bars() -> pd.DataFrame:
    """A bars table without rows."""
    return bars_from_columns([], [], [], [], [], [])


def opens_of(bars: pd.DataFrame) -> IntArray:
    """The stamps of a bars table as epoch seconds UTC.

    Raises:
        DataError: a stamp is missing or is not a whole second.
    """
    stamps_us = stamps_us_of(bars["timestamp"])
    if len(stamps_us) and ((stamps_us % 1_000_000 != 0).any() or stamps_us.min() == np.iinfo(np.int64).min):
        raise DataError("a bar's timestamp is missing or not a whole second", rows=bars.head(SHOWN_ROWS).to_string())
    return stamps_us // 1_000_000


def stamps_us_of(stamps: pd.Series[Any]) -> IntArray:
    """Microseconds UTC; a missing stamp is the smallest integer."""
    return stamps.to_numpy(dtype="datetime64[us]").view(
        np.int64
    )  # numpy's stamps are UTC, whatever the zone of pandas'


# ---------------------------------------------------------------------------------------------------- the rules


def grid_seconds(timeframe: Timeframe, *, any_open: bool = False) -> int:
    """The step in seconds of which every bar open is a whole multiple, counted from midnight UTC.

    A session's first bar has the session's open as stamp, which may be off the timeframe's own step: 09:30 for ``1h``, forex's
    17:15 for ``1h`` and, being an odd minute, for ``2m``. So: up to 1m and 5m their own length, 2m and 3m a minute, 10m and
    20m five minutes, 15m and longer intraday bars fifteen (five with ``any_open``: Eurex opens at 01:10), daily and longer
    midnight.
    """
    seconds = timeframe.seconds
    if not timeframe.is_intraday:
        return 86400
    if seconds in (120, 180):
        return 60
    if seconds <= 300:
        return seconds
    return 300 if any_open or seconds in (600, 1200) else 900


@dataclass(frozen=True, slots=True)
class BarArrays:
    """The columns of a bars table as plain arrays; stamps in microseconds, so that fractions of a second are visible."""

    stamps_us: IntArray
    open: FloatArray
    high: FloatArray
    low: FloatArray
    close: FloatArray
    volume: FloatArray

    @classmethod
    def of(cls, bars: pd.DataFrame) -> BarArrays:
        values = [bars[name].to_numpy(np.float64) for name in COLUMNS[1:]]
        return cls(stamps_us_of(bars["timestamp"]), *values)


Rule = tuple[str, Callable[[BarArrays], BoolArray]]
"""The text of a failure, and the test that is True for rows that pass."""


def _prices_are_finite(b: BarArrays) -> BoolArray:
    return np.isfinite(b.open) & np.isfinite(b.high) & np.isfinite(b.low) & np.isfinite(b.close)


def is_unset(volume: FloatArray) -> BoolArray:
    """True for IB's marks for a volume that is not set, and for impossible volumes."""
    unset: BoolArray = (volume >= MOST) | (volume == _UNSET_INTEGER)
    return unset


def _stamps_increase(b: BarArrays) -> BoolArray:
    return np.concatenate([np.ones(min(1, len(b.stamps_us)), np.bool_), np.diff(b.stamps_us) > 0])


_INCREASING: Rule = ("timestamps do not strictly increase", _stamps_increase)
_RULES = "breaks a rule"
"""pandera's name for the check of all rules; it never reaches users."""


@lru_cache(maxsize=1024)
def row_rules(
    timeframe: Timeframe,
    *,
    allow_nonpositive: bool = False,
    any_open: bool = False,
    odd_opens: tuple[int, ...] = (),
) -> tuple[Rule, ...]:
    """The rules for each row alone. NaN fails them (a comparison written as "not below" would let it pass). ``odd_opens``: valid
    opens off the grid, in epoch seconds."""
    step_us = grid_seconds(timeframe, any_open=any_open) * 1_000_000
    odd_us = np.array(odd_opens, dtype=np.int64) * 1_000_000

    def is_on_grid(b: BarArrays) -> BoolArray:
        passes = b.stamps_us % step_us == 0
        known: BoolArray = passes if passes.all() else passes | np.isin(b.stamps_us, odd_us)
        return known

    rules: list[Rule] = [
        (f"timestamp is off the {timeframe.name} grid", is_on_grid),
        ("a price is not a finite number", _prices_are_finite),
        (
            'a price is IB\'s mark for "not set", or impossibly large',
            lambda b: ~(np.maximum(np.abs(b.high), np.abs(b.low)) >= MOST),
        ),
        ("high is below open, close or low", lambda b: b.high >= np.maximum(np.maximum(b.open, b.close), b.low)),
        ("low is above open, close or high", lambda b: b.low <= np.minimum(np.minimum(b.open, b.close), b.high)),
        ("volume is not a finite number", lambda b: np.isfinite(b.volume)),
        ("volume is negative", lambda b: ~(b.volume < 0)),
        ('volume is IB\'s mark for "not set", or impossibly large', lambda b: ~is_unset(b.volume)),
    ]
    if not allow_nonpositive:
        rules.append(
            ("a price is not positive", lambda b: ~((b.open <= 0) | (b.high <= 0) | (b.low <= 0) | (b.close <= 0)))
        )
    return tuple(rules)


def rules_for(series: Series) -> tuple[Rule, ...]:
    """`row_rules` with the allowances of the series' kind (`_allowances`)."""
    return row_rules(series.timeframe, **_allowances(series))


class _Allowances(TypedDict):
    allow_nonpositive: bool
    any_open: bool
    odd_opens: tuple[int, ...]


def _allowances(series: Series) -> _Allowances:
    """Futures and indices may be negative and open off the quarter hour; others open off the grid only where their calendar has
    such an open (New York at 09:32 on a day with a minute of silence)."""
    signed = series.instrument.sec_type in _SIGNED_KINDS
    odd: tuple[int, ...] = ()
    if not signed and series.timeframe.is_intraday and series.timeframe.seconds > 60:
        with suppress(InputError):  # without a calendar there are no known opens
            odd = session_starts_off(series.instrument, grid_seconds(series.timeframe))
    return {"allow_nonpositive": signed, "any_open": signed, "odd_opens": odd}


def find_faults(arrays: BarArrays, rules: Sequence[Rule]) -> dict[int, str]:
    """Row number -> the texts of all its failures; empty if every row passes every rule."""
    faults: dict[int, list[str]] = {}
    with np.errstate(invalid="ignore"):
        for text, passes in rules:
            for row in np.flatnonzero(~passes(arrays)).tolist():
                faults.setdefault(row, []).append(text)
    return {row: "; ".join(texts) for row, texts in sorted(faults.items())}


@lru_cache(maxsize=1024)
def bar_schema(
    timeframe: Timeframe,
    *,
    allow_nonpositive: bool = False,
    any_open: bool = False,
    odd_opens: tuple[int, ...] = (),
) -> pa.DataFrameSchema:
    """The pandera schema of a bars table (built once per timeframe and calendar): exact columns and types, `row_rules`, and
    stamps that strictly increase, hence are unique. Nothing is coerced. ``allow_nonpositive`` is for instruments that may
    trade below zero, ``any_open`` for those whose sessions open off the quarter hour (`grid_seconds`).

    All rules are one check on arrays that are taken from the table once: pandera's own work for each check costs more than the
    rules (docs/dependencies.md). `validate_bars` names the rules that fail.
    """
    import pandas as pd
    import pandera.pandas as pa

    rules = row_rules(timeframe, allow_nonpositive=allow_nonpositive, any_open=any_open, odd_opens=odd_opens)

    def keeps_rules(bars: pd.DataFrame) -> pd.Series[bool]:
        arrays = BarArrays.of(bars)
        passes: BoolArray = np.ones(len(bars), np.bool_)
        with np.errstate(invalid="ignore"):
            for _, rule in (_INCREASING, *rules):
                passes &= rule(arrays)
        return pd.Series(passes, index=bars.index)

    return pa.DataFrameSchema(
        {
            "timestamp": pa.Column(STAMP_DTYPE, nullable=False),
            **{name: pa.Column("float64", nullable=True) for name in COLUMNS[1:]},
        },
        checks=[pa.Check(keeps_rules, error=_RULES, ignore_na=False)],
        strict=True,
        ordered=True,
        coerce=False,
        name=f"bars_{timeframe.name}",
    )


def validate_bars(bars: pd.DataFrame, series: Series, window: Window | None = None) -> None:
    """Check ``bars`` against the schema of ``series`` (futures and indices: negative prices allowed).

    ``window`` is only for the error message. An empty table passes if its columns and types are right.

    Raises:
        DataError: lists every failing rule; ``rows`` contains the invalid rows as text.
    """
    from pandera.errors import SchemaErrors

    if tuple(bars.columns) != COLUMNS:
        raise DataError(
            f"columns are {', '.join(map(str, bars.columns))}; expected are, in this order, {', '.join(COLUMNS)}",
            doing=describe_check(series, window),
        )
    try:
        bar_schema(series.timeframe, **_allowances(series)).validate(bars, lazy=True)
    except SchemaErrors as failure:
        counts = _count_failures(failure.failure_cases, bars, series)
        rows = sorted({row for hits in counts.values() for row in hits if row is not None})
        listed = "; ".join(f"{text} ({len(hits)} rows)" if len(hits) > 1 else text for text, hits in counts.items())
        first = f" First bad row: {show_rows(bars, rows[:1], header=False)}" if rows else ""
        raise DataError(
            f"bars break the rules: {listed}",
            rows=show_rows(bars, rows),
            doing=describe_check(series, window),
            advice=f"Nothing of this window was written.{first}",
        ) from None


def _count_failures(cases: pd.DataFrame, bars: pd.DataFrame, series: Series) -> dict[str, set[int | None]]:
    """Failure -> its rows (None: the table as a whole), from pandera's ``cases``. The rules are named only in a table with the
    right columns and types."""
    import pandas as pd

    counts: dict[str, set[int | None]] = {}
    columns = (cases[name] for name in ("check", "column", "failure_case", "index"))
    for check, column, case, index in zip(*columns, strict=True):
        if check != _RULES:
            row = int(index) if pd.notna(index) else None
            counts.setdefault(f"{column} fails {check} ({case})", set()).add(row)
    if not counts:
        for row, text in find_faults(BarArrays.of(bars), (_INCREASING, *rules_for(series))).items():
            for each in text.split("; "):
                counts.setdefault(each, set()).add(row)
    return counts


def describe_check(series: Series, window: Window | None) -> str:
    """``checking bars of AAPL 5m 2024-03-11..2024-03-12``."""
    return f"checking bars of {series}" + (f" {window}" if window is not None else "")


def show_rows(bars: pd.DataFrame, indexes: Sequence[int], *, header: bool = True) -> str:
    shown = bars.iloc[list(indexes[:SHOWN_ROWS])].to_string(header=header, index=header)
    more = len(indexes) - SHOWN_ROWS
    return shown + (f"\n... and {more} more" if more > 0 else "")


def latest_closes(timeframe: Timeframe, opens_s: IntArray) -> IntArray:
    """When bars are complete under any calendar, epoch seconds: short bars of a session close before that."""
    return opens_s + _longest_s(timeframe)


def latest_complete_open_s(timeframe: Timeframe, now_s: float) -> int:
    """The latest open, in epoch seconds, of a bar that is certainly complete at ``now_s`` under any calendar."""
    return int(np.floor(now_s)) - _longest_s(timeframe)


def _longest_s(timeframe: Timeframe) -> int:
    return timeframe.seconds + (0 if timeframe.is_intraday else LATEST_SESSION_END_S)
