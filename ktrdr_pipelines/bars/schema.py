"""What a bar is: the table, the rules it has to keep, and how IB's answers become such a table.

A bars table is a pandas DataFrame with the columns `COLUMNS`: ``timestamp`` (``datetime64[us, UTC]``, the bar's open), the
four prices and the volume (``float64``), and a RangeIndex. Pure: no files, no network, no clock (callers pass ``now_s``).
How the table is kept on disk is in `store/csv_format.py`; which opens there should be, in `calendars/expected.py`. Why
stamps and forming bars need care: `docs/ib_facts.md`, 3 and 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaErrors

from ktrdr_pipelines.calendars import session_starts_off
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import DataError, InputError

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

COLUMNS = ("timestamp", "open", "high", "low", "close", "volume")
"""Column names of a bars table, in order; also the header of the CSV."""

STAMP_DTYPE = pd.DatetimeTZDtype("us", "UTC")

LATEST_SESSION_END_S = 6 * 3600
"""How long after midnight UTC a session may still run: US extended hours end at 20:00 New York, 01:00 UTC in winter.
Without a calendar's word, a daily bar counts as complete this long after its nominal end."""

_END_OF_TIME_S = 253_402_300_800
"""10000-01-01: stamps are written with four digits for the year."""

MOST = 2.0**53
"""No price or volume reaches it; whole numbers from here on are not exact. IB's marks for a value that is not set (the largest
double, 2^63 - 1 and 2^127 - 1) lie above."""

_UNSET_INTEGER = 2.0**31 - 1

_SHOWN_ROWS = 10
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
    """A bars table from columns; ``opens_s`` in epoch seconds UTC. Nothing is checked: see `validate_bars`."""
    stamps = np.asarray(opens_s, dtype=np.int64).astype("datetime64[s]").astype("datetime64[us]")
    prices = {
        name: np.asarray(values, dtype=np.float64)
        for name, values in zip(COLUMNS[1:], (open_, high, low, close, volume), strict=True)
    }
    return pd.DataFrame({"timestamp": pd.DatetimeIndex(stamps).tz_localize("UTC"), **prices})


def empty_bars() -> pd.DataFrame:
    """A bars table without rows."""
    return bars_from_columns([], [], [], [], [], [])


def opens_of(bars: pd.DataFrame) -> Int64Array:
    """The stamps of a bars table as epoch seconds UTC.

    Raises:
        DataError: a stamp is missing or is no whole second.
    """
    stamps_us = _stamps_us(bars["timestamp"])
    if len(stamps_us) and ((stamps_us % 1_000_000 != 0).any() or stamps_us.min() == np.iinfo(np.int64).min):
        raise DataError("a bar's timestamp is missing or no whole second", rows=bars.head(_SHOWN_ROWS).to_string())
    return stamps_us // 1_000_000


def _stamps_us(stamps: pd.Series[Any]) -> Int64Array:
    return np.asarray(stamps.dt.as_unit("us").astype("int64"), dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- the rules


def grid_seconds(timeframe: Timeframe, *, any_open: bool = False) -> int:
    """The step in seconds of which every bar open is a whole multiple, counted from midnight UTC.

    A session's first bar carries the session's open, which may lie off the timeframe's own step: 09:30 for ``1h``, forex's
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
    """The columns of a bars table as plain arrays; stamps in microseconds, so that half seconds can be seen."""

    stamps_us: Int64Array
    open: FloatArray
    high: FloatArray
    low: FloatArray
    close: FloatArray
    volume: FloatArray

    @classmethod
    def of(cls, bars: pd.DataFrame) -> BarArrays:
        values = [bars[name].to_numpy(np.float64) for name in COLUMNS[1:]]
        return cls(_stamps_us(bars["timestamp"]), *values)


Rule = tuple[str, Callable[[BarArrays], BoolArray]]
"""What is wrong when a row fails, and the test that is true for rows that pass."""


def _prices_are_finite(b: BarArrays) -> BoolArray:
    return np.isfinite(b.open) & np.isfinite(b.high) & np.isfinite(b.low) & np.isfinite(b.close)


def _is_unset(volume: FloatArray) -> BoolArray:
    """IB's marks for a volume that is not set, and what no market trades."""
    unset: BoolArray = (volume >= MOST) | (volume == _UNSET_INTEGER)
    return unset


def _stamps_increase(b: BarArrays) -> BoolArray:
    return np.concatenate([np.ones(min(1, len(b.stamps_us)), np.bool_), np.diff(b.stamps_us) > 0])


@lru_cache(maxsize=1024)
def row_rules(
    timeframe: Timeframe,
    *,
    allow_nonpositive: bool = False,
    any_open: bool = False,
    odd_opens: tuple[int, ...] = (),
) -> tuple[Rule, ...]:
    """The rules that each bar keeps by itself. NaN fails them (a comparison written as "not below" would let it pass).
    ``odd_opens``: epoch seconds off the grid that are opens all the same."""
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
            "a price is IB's mark for none, or beyond all markets",
            lambda b: ~(np.maximum(np.abs(b.high), np.abs(b.low)) >= MOST),
        ),
        ("high is below open, close or low", lambda b: b.high >= np.maximum(np.maximum(b.open, b.close), b.low)),
        ("low is above open, close or high", lambda b: b.low <= np.minimum(np.minimum(b.open, b.close), b.high)),
        ("volume is not a finite number", lambda b: np.isfinite(b.volume)),
        ("volume is negative", lambda b: ~(b.volume < 0)),
        ("volume is IB's mark for none, or beyond all markets", lambda b: ~_is_unset(b.volume)),
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
    """Futures and indices may be negative and open off the quarter hour; others open off the grid only where their calendar
    says so (New York at 09:32 on a day that began with a minute of silence)."""
    signed = series.instrument.sec_type in _SIGNED_KINDS
    odd: tuple[int, ...] = ()
    if not signed and series.timeframe.is_intraday and series.timeframe.seconds > 60:
        with suppress(InputError):  # no calendar is known: then no open is either
            odd = session_starts_off(series.instrument, grid_seconds(series.timeframe))
    return {"allow_nonpositive": signed, "any_open": signed, "odd_opens": odd}


def find_faults(arrays: BarArrays, rules: Sequence[Rule]) -> dict[int, str]:
    """Row number -> everything that is wrong with it; empty when every row keeps every rule."""
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
    trade below zero, ``any_open`` for those whose sessions open off the quarter hour (`grid_seconds`)."""

    def as_check(rule: Rule) -> pa.Check:
        text, passes = rule

        def check(bars: pd.DataFrame) -> pd.Series[bool]:
            with np.errstate(invalid="ignore"):
                return pd.Series(passes(BarArrays.of(bars)), index=bars.index)

        return pa.Check(check, error=text, ignore_na=False)

    rules = row_rules(timeframe, allow_nonpositive=allow_nonpositive, any_open=any_open, odd_opens=odd_opens)
    increasing: Rule = ("timestamps do not strictly increase", _stamps_increase)
    return pa.DataFrameSchema(
        {
            "timestamp": pa.Column(STAMP_DTYPE, nullable=False),
            **{name: pa.Column("float64", nullable=True) for name in COLUMNS[1:]},
        },
        checks=[as_check(rule) for rule in (increasing, *rules)],
        strict=True,
        ordered=True,
        coerce=False,
        name=f"bars_{timeframe.name}",
    )


def validate_bars(bars: pd.DataFrame, series: Series, window: Window | None = None) -> None:
    """Check ``bars`` against the schema of ``series`` (futures and indices: negative prices allowed).

    ``window`` only names what is checked. An empty table passes when its columns and types are right.

    Raises:
        DataError: lists every failing rule at once; ``rows`` holds the offending rows as text.
    """
    if tuple(bars.columns) != COLUMNS:
        raise DataError(
            f"columns are {', '.join(map(str, bars.columns))}; expected are, in this order, {', '.join(COLUMNS)}",
            doing=describe_check(series, window),
        )
    try:
        bar_schema(series.timeframe, **_allowances(series)).validate(bars, lazy=True)
    except SchemaErrors as failure:
        cases = failure.failure_cases
        counts: dict[str, set[Any]] = {}
        for check, column, case, index in zip(
            cases["check"], cases["column"], cases["failure_case"], cases["index"], strict=True
        ):
            text = str(check) if " " in str(check) and pd.notna(index) else f"{column} fails {check} ({case})"
            counts.setdefault(text, set()).add(index)
        rows = sorted({int(index) for index in cases["index"].dropna()})
        listed = "; ".join(f"{text} ({len(hits)} rows)" if len(hits) > 1 else text for text, hits in counts.items())
        first = f" First bad row: {_show_rows(bars, rows[:1], header=False)}" if rows else ""
        raise DataError(
            f"bars break the rules: {listed}",
            rows=_show_rows(bars, rows),
            doing=describe_check(series, window),
            advice=f"Nothing of this window was written.{first}",
        ) from None


def describe_check(series: Series, window: Window | None) -> str:
    """``checking bars of AAPL 5m 2024-03-11..2024-03-12``."""
    return f"checking bars of {series}" + (f" {window}" if window is not None else "")


def _show_rows(bars: pd.DataFrame, indexes: Sequence[int], *, header: bool = True) -> str:
    shown = bars.iloc[list(indexes[:_SHOWN_ROWS])].to_string(header=header, index=header)
    more = len(indexes) - _SHOWN_ROWS
    return shown + (f"\n... and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------- IB's answers

Closes = Mapping[int, int] | npt.ArrayLike | Callable[[Int64Array], npt.ArrayLike]
"""When bars close, in epoch seconds: a mapping open -> close for the opens that are known, an array alongside the answer's
rows, or a function from opens to closes."""


@dataclass(frozen=True, slots=True)
class NormalisedAnswer:
    """One answer of IB as bars, and what had to be done to it."""

    bars: pd.DataFrame
    """Sorted, unique, inside the window, complete at ``now_s``, valid."""
    received: int
    """Rows in the answer."""
    outside: int
    """Rows dropped because their open lies outside the window."""
    forming: int
    """Rows of the window dropped because they close after ``now_s``."""
    duplicates: int
    """Rows dropped because an equal one is kept."""
    out_of_order: bool
    """The answer's stamps went backwards somewhere."""
    volume_missing: bool
    """IB sent -1 for a kept bar's volume: it has none for this series."""
    earliest_open_s: int | None
    """The first open of the whole answer, inside the window or not: how far back the answer reached. None if empty."""


def normalise_answer(
    raw: pd.DataFrame | Mapping[str, npt.ArrayLike],
    series: Series,
    window: Window,
    *,
    now_s: float,
    closes: Closes | None = None,
) -> NormalisedAnswer:
    """Turn what IB sent into bars of the half-open ``window`` that are complete at ``now_s``.

    ``raw`` has the columns `COLUMNS` in any order, rows in any order; ``timestamp`` is in epoch seconds or aware datetimes.
    A bar is forming while its close lies after ``now_s``. Without ``closes`` an intraday bar closes at its open plus
    the timeframe's seconds (never too early: a session's short bars close before), a daily or longer one
    `LATEST_SESSION_END_S` after its nominal end. Rows outside the window and forming bars are dropped before their values
    are judged. A volume of -1 becomes 0, and of an instrument without volume IB's marks for "not set" as well.

    Raises:
        DataError: a stamp is no whole second, two different bars carry one stamp, or a kept bar breaks the schema.
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

    # -1 says that there is none. A mark for "not set" says so only where none is expected; else it is a fault of the bar.
    is_none = kept[:, 4] == -1
    if not series.instrument.has_volume:
        is_none |= _is_unset(kept[:, 4]) & np.isfinite(kept[:, 4])
    volume_missing = bool(is_none.any())
    kept[:, 4] = np.where(is_none, 0.0, kept[:, 4])
    same_stamp = np.flatnonzero(np.diff(kept_opens) == 0)
    conflicts = [i for i in same_stamp.tolist() if not np.array_equal(kept[i], kept[i + 1], equal_nan=True)]
    if conflicts:
        rows = bars_from_columns(kept_opens, *kept.T)
        shown = sorted({row for i in conflicts for row in (i, i + 1)})
        raise DataError(
            f"{len(conflicts)} timestamps carry two different bars",
            rows=_show_rows(rows, shown),
            doing=doing,
            advice=f"Nothing of this window was written; first pair:\n{_show_rows(rows, shown[:2], header=False)}",
        )
    first_of_stamp = np.ones(len(kept_opens), np.bool_)
    first_of_stamp[same_stamp + 1] = False

    bars = bars_from_columns(kept_opens[first_of_stamp], *kept[first_of_stamp].T)
    validate_bars(bars, series, window)
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


def latest_complete_open_s(timeframe: Timeframe, now_s: float) -> int:
    """The latest second at which a bar may open and surely be complete at ``now_s``, knowing no calendar."""
    slack = 0 if timeframe.is_intraday else LATEST_SESSION_END_S
    return int(np.floor(now_s)) - timeframe.seconds - slack


def _closes(opens_s: Int64Array, timeframe: Timeframe, closes: Closes | None) -> Int64Array:
    nominal = opens_s + timeframe.seconds + (0 if timeframe.is_intraday else LATEST_SESSION_END_S)
    if closes is None:
        return nominal
    if isinstance(closes, Mapping):
        return np.array([closes.get(o, n) for o, n in zip(opens_s.tolist(), nominal.tolist(), strict=True)], np.int64)
    known = np.asarray(closes(opens_s) if callable(closes) else closes, dtype=np.int64)
    if known.shape != opens_s.shape:
        raise ValueError(f"{len(opens_s)} opens, but closes of shape {known.shape}")
    return known


def _whole_seconds(stamps: Any, doing: str) -> Int64Array:
    """Epoch seconds from numbers or aware datetimes; anything else, and fractions, are refused."""
    values: pd.Series[Any] = pd.Series(stamps)
    if not len(values):
        return np.empty(0, np.int64)
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        stamps_us = _stamps_us(values)
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
        rows = values[~whole].head(_SHOWN_ROWS).to_string()
        raise DataError(f"{int((~whole).sum())} bar stamps are no whole seconds", rows=rows, doing=doing)
    return np.asarray(seconds, dtype=np.int64)
