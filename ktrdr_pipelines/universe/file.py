"""The universe file: which series exist, and how their contracts are described; adding and removing series.

`data/universe.yaml` lists instruments and their timeframes. Without the file, a small default universe counts. The contract
of a description is resolved in `ib/contracts.py`.

```yaml
series:
  - symbol: AAPL                  # a US stock by default
    timeframes: [1h, 1d]
    hours: extended               # default: regular for stocks, everything for other kinds
  - symbol: EURUSD
    sec_type: CASH
    timeframes: [1m, 1h]
```
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ktrdr_pipelines.domain.instruments import (
    DEFAULT_EXCHANGES,
    DEFAULT_WHAT_TO_SHOW,
    Hours,
    Instrument,
    Series,
    file_symbol,
    forex,
    future_product,
    is_future_code,
)
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Timeframe, parse_timeframe
from ktrdr_pipelines.errors import ConfigurationError, InputError, StoreError
from ktrdr_pipelines.universe.editing import append_items, comments_of, cut_items, set_timeframes

if TYPE_CHECKING:
    from ktrdr_pipelines.settings import Settings

_QUOTES = ("MIDPOINT", "BID", "ASK", "BID_ASK")
SHOWN_OF = {
    "STK": ("TRADES", *_QUOTES, "ADJUSTED_LAST"),
    "CASH": _QUOTES,
    "FUT": ("TRADES", *_QUOTES),
    "CONTFUT": ("TRADES", *_QUOTES),
    "IND": ("TRADES",),
    "CRYPTO": ("AGGTRADES", *_QUOTES),
    "CFD": _QUOTES,
}
"""What to show, by kind; IB rejects everything else with error 162 or 321."""

_PAIR = re.compile("([A-Z]{3})[./]([A-Z]{3})")
_DEFAULT_TIMEFRAMES = ("1m", "5m", "1h", "1d")


class Entry(BaseModel):
    """One instrument of the universe file. Missing fields take the defaults of its kind."""

    model_config = ConfigDict(extra="forbid")

    symbol: str
    timeframes: list[str] = Field(min_length=1)
    sec_type: Literal["STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO", "CFD"] = "STK"
    exchange: str | None = None
    primary_exchange: str = ""
    currency: str | None = None
    ib_symbol: str = ""
    expiry: str = ""
    what_to_show: str | None = None
    hours: Hours | None = None
    con_id: int = 0
    calendar: str = ""

    def instrument(self) -> Instrument:
        """The instrument with the defaults of its kind filled in (IB's what-to-show, exchange, hours)."""
        if self.sec_type == "CASH":
            pair = forex(self.symbol)
            symbol, ib_symbol, currency = pair.symbol, pair.ib_symbol, pair.currency
        else:
            symbol, ib_symbol, currency = self.symbol, self.ib_symbol, self.currency or "USD"
        if self.sec_type == "FUT" and not ib_symbol and is_future_code(symbol):
            ib_symbol = future_product(symbol)
        exchange = self.exchange or DEFAULT_EXCHANGES.get(self.sec_type)
        if exchange is None:
            raise InputError(f"{self.symbol}: a {self.sec_type} needs an exchange")
        default_hours = Hours.REGULAR if self.sec_type == "STK" else Hours.EXTENDED
        if self.hours is Hours.REGULAR and self.sec_type != "STK":
            raise InputError(f"{self.symbol}: only stocks have regular hours", advice="Omit `hours`.")
        if self.sec_type == "FUT" and not (self.expiry or self.con_id or is_future_code(symbol)):
            raise InputError(
                f"{self.symbol}: a future needs an expiry",
                advice="Name it by its code (ESZ4), or write `expiry:`; a continuous future is sec_type CONTFUT.",
            )
        if self.expiry:
            _check_expiry(self.symbol, self.expiry)
        if self.what_to_show is not None and self.what_to_show not in SHOWN_OF[self.sec_type]:
            raise InputError(
                f"{self.symbol}: IB has no what_to_show {self.what_to_show!r} for {self.sec_type}",
                advice=f"It has {', '.join(SHOWN_OF[self.sec_type])}.",
            )
        return Instrument(
            symbol=symbol,
            sec_type=self.sec_type,
            exchange=exchange,
            currency=currency,
            ib_symbol=ib_symbol,
            primary_exchange=self.primary_exchange,
            expiry=self.expiry,
            what_to_show=self.what_to_show or DEFAULT_WHAT_TO_SHOW.get(self.sec_type, "TRADES"),
            hours=self.hours or default_hours,
            con_id=self.con_id,
            calendar=self.calendar,
        )


def _check_expiry(symbol: str, text: str) -> None:
    try:
        if not re.fullmatch("[0-9]{6}([0-9]{2})?", text):
            raise ValueError
        date(int(text[:4]), int(text[4:6]), int(text[6:] or 1))
    except ValueError:
        raise InputError(
            f"{symbol}: {text[:40]!r} is not an expiry", advice="Write the contract month like 202412, or its last day."
        ) from None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    series: list[Entry]


def entry_for(instrument: Instrument, timeframes: Iterable[str]) -> Entry:
    """The universe entry that describes ``instrument``, without the fields that are defaults of its kind."""
    full = {
        "symbol": instrument.symbol, "sec_type": instrument.sec_type, "exchange": instrument.exchange,
        "primary_exchange": instrument.primary_exchange, "currency": instrument.currency,
        "ib_symbol": instrument.ib_symbol, "expiry": instrument.expiry, "what_to_show": instrument.what_to_show,
        "hours": instrument.hours, "con_id": instrument.con_id, "calendar": instrument.calendar,
    }  # fmt: skip
    kind: dict[str, object] = {"symbol": instrument.symbol, "sec_type": instrument.sec_type, "timeframes": ["1d"]}
    if instrument.sec_type == "FUT":
        kind |= {"expiry": instrument.expiry, "con_id": instrument.con_id}
    plain = Entry.model_validate(kind | {"exchange": instrument.exchange}).instrument()
    fields = {k: v for k, v in full.items() if k in ("con_id", "expiry") or v != getattr(plain, k)}
    if instrument.sec_type != "STK":
        fields["sec_type"] = instrument.sec_type
    if instrument.exchange != DEFAULT_EXCHANGES.get(instrument.sec_type):
        fields["exchange"] = instrument.exchange
    fields = {k: v for k, v in fields.items() if v}
    return Entry.model_validate(fields | {"symbol": instrument.symbol, "timeframes": list(timeframes)})


@dataclass(frozen=True)
class Universe:
    """Every series that exists, by symbol. Build with `read_universe`."""

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Series]:
        for entry in self.entries:
            instrument = entry.instrument()
            for name in entry.timeframes:
                yield Series(instrument, parse_timeframe(name))

    def find_instrument(self, symbol: str) -> Instrument | None:
        """The instrument ``symbol``: as typed, else in upper case; ``EUR.USD`` and ``EUR/USD`` are ``EURUSD``."""
        pair = _PAIR.fullmatch(symbol.upper())
        for wanted in (symbol, symbol.upper(), *(["".join(pair.groups())] if pair else [])):
            for entry in self.entries:
                instrument = entry.instrument()
                if wanted == instrument.symbol:
                    return instrument
        return None

    def find(self, symbol: str, timeframe: Timeframe) -> Series | None:
        """The series, or None if the universe has no such instrument, or not at this timeframe."""
        instrument = self.find_instrument(symbol)
        series = Series(instrument, timeframe) if instrument else None
        return series if series and series in set(self) else None


DEFAULT_UNIVERSE = Universe((
    *(Entry(symbol=s, timeframes=list(_DEFAULT_TIMEFRAMES)) for s in ("AAPL", "MSFT", "SPY", "GOOG")),
    Entry(symbol="EURUSD", sec_type="CASH", timeframes=list(_DEFAULT_TIMEFRAMES)),
))  # fmt: skip


def parse_universe(text: str, origin: str = "universe file") -> Universe:
    """A universe from YAML text.

    Raises:
        InputError: malformed YAML, an unknown field or timeframe, or a series listed twice; names it and its line or field.
    """
    doing = f"reading {origin}"
    try:
        raw: Any = yaml.safe_load(text)
    except RecursionError:
        raise InputError("nested too deeply", doing=doing, advice="Correct the file, or restore it.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number out of Python's range
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"not YAML{where}", doing=doing, advice="Correct the line, or restore the file.") from None
    try:
        entries = tuple(_File.model_validate(raw if raw is not None else {"series": []}).series)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{where}: {first['msg']}", doing=doing, advice="See README, The universe file.") from None
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        try:
            instrument = entry.instrument()
            timeframes = [parse_timeframe(name) for name in entry.timeframes]
        except InputError as error:
            raise error.while_doing(f"{doing}, {entry.symbol}") from None
        for timeframe in timeframes:
            key = (file_symbol(instrument.symbol), timeframe.name)
            # Two symbols that differ only in case would share a file on some file systems.
            if (folded := (key[0].lower(), key[1])) in seen:
                raise InputError(
                    f"{instrument.symbol} {timeframe.name} is listed twice",
                    doing=doing,
                    advice="Remove one of the two.",
                )
            seen.add(folded)
    return Universe(entries)


def read_universe(path: Path, *, must_exist: bool = False) -> Universe:
    """The universe of ``path``; the default universe if the file is missing, unless it ``must_exist`` (a setting names it).

    Raises:
        ConfigurationError: see `parse_universe`; or the file is missing and must exist.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        if must_exist:
            raise ConfigurationError(
                f"{path} does not exist", advice="Correct KTRDR_UNIVERSE, or create the file."
            ) from None
        return DEFAULT_UNIVERSE
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot be read: {error}", doing=f"reading {path}", advice="Correct or remove the file."
        ) from None
    try:
        return parse_universe(text, str(path))
    except InputError as error:
        raise ConfigurationError(error.observed, doing=error.doing, advice=error.advice) from None


def universe_of(settings: Settings) -> Universe:
    """The universe of ``settings``; the default one if the file is missing, unless a setting names it.

    Raises:
        ConfigurationError: see `read_universe`.
    """
    return read_universe(settings.universe_path, must_exist=settings.universe_file is not None)


def add_series(path: Path, *wanted: Series) -> Universe:
    """Add series to the universe file (created from the default universe if missing) and return the result.

    Atomic, under a lock beside the file. A series that is there already changes nothing.

    Raises:
        InputError: the universe has another instrument with that symbol.
        StoreError: the folder cannot be written.
    """
    with _changing(path):
        universe = read_universe(path)
        entries = list(universe.entries)
        held = set(universe)
        places: dict[Instrument, int] = {}
        for i, entry in enumerate(entries):
            places.setdefault(entry.instrument(), i)
        for series in wanted:
            if series in held:
                continue
            held.add(series)
            at = places.setdefault(series.instrument, len(entries))
            if at == len(entries):
                entries.append(entry_for(series.instrument, [series.timeframe.name]))
            else:
                names = sorted({*entries[at].timeframes, series.timeframe.name}, key=_length_of)
                entries[at] = entries[at].model_copy(update={"timeframes": names})
        return _write(path, universe, Universe(tuple(entries)))


def remove_series(path: Path, instrument: Instrument, timeframes: Iterable[Timeframe] | None = None) -> list[Series]:
    """Remove ``instrument`` from the universe file, at ``timeframes`` (default: at all). Returns the removed series.

    Atomic, under a lock beside the file. Files of bars are kept.

    Raises:
        InputError: the universe has no such instrument, or not at one of the timeframes; then nothing is removed.
        StoreError: the folder cannot be written.
    """
    with _changing(path):
        universe = read_universe(path)
        mine = [series for series in universe if series.instrument == instrument]
        wanted = list(dict.fromkeys(timeframes)) if timeframes is not None else [series.timeframe for series in mine]
        held = {series.timeframe for series in mine}
        unknown = [str(timeframe) for timeframe in wanted if timeframe not in held]
        if unknown or not mine:
            has = (
                f"has {instrument.symbol} at {', '.join(str(series.timeframe) for series in mine)}"
                if mine
                else "does not have it"
            )
            raise InputError(
                f"{instrument.symbol} {', '.join(unknown)}".strip() + f" is not in the universe, which {has}",
                doing=f"changing {path}",
            )
        entries = []
        for entry in universe.entries:
            if entry.instrument() == instrument:
                names = [name for name in entry.timeframes if parse_timeframe(name) not in wanted]
                if not names:
                    continue
                entry = entry.model_copy(update={"timeframes": names})
            entries.append(entry)
        _write(path, universe, Universe(tuple(entries)))
        return [series for series in mine if series.timeframe in wanted]


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=30):
            yield
    except Timeout:
        raise StoreError(f"{path} is locked by another process", advice="Try again in a moment.") from None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}",
            advice="Make the data folder writable, or set KTRDR_DATA_DIR.",
        ) from None


def _length_of(name: str) -> int:
    return list(TIMEFRAMES).index(parse_timeframe(name).name)


def _render(entries: Iterable[Entry]) -> str:
    rows = [e.model_dump(mode="json", exclude_defaults=True, exclude_none=True) for e in entries]
    return yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _write(path: Path, before: Universe, after: Universe) -> Universe:
    """Write ``after`` and return it. The user's text is edited, so that comments and layout stay; if the edited text would not
    mean ``after``, the file is rendered new, and the old one is kept beside it if a comment is lost."""
    if before == after:
        return after
    rows = _render(after.entries)
    text = "# Which series exist. See README, The universe file.\nseries:" + (
        "\n" + rows if after.entries else f" {rows}"
    )
    old = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    edited = _edit(old, before, after) if old else ""
    if _means(edited, after):
        text = edited
    parse_universe(text, str(path))  # raises, for example, if two symbols share a file
    if set(comments_of(old)) - set(comments_of(text)):
        path.with_name(f"{path.name}.bak").write_text(old, encoding="utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return after


def _edit(text: str, before: Universe, after: Universe) -> str:
    """``text`` with the smallest edits that should turn ``before`` into ``after``."""
    then = {entry.instrument(): entry for entry in after.entries}
    known = [entry.instrument() for entry in before.entries]
    changed = {
        i: then[instrument].timeframes
        for i, instrument in enumerate(known)
        if instrument in then and then[instrument] != before.entries[i]
    }
    text = set_timeframes(text, changed)
    new = [entry for entry in after.entries if entry.instrument() not in known]
    if new:
        text = append_items(text, _render(new))
    return cut_items(text, [i for i, instrument in enumerate(known) if instrument not in then])


def _means(text: str, universe: Universe) -> bool:
    try:
        return parse_universe(text) == universe
    except InputError:
        return False
