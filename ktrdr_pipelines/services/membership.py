"""List, add and remove series of the universe, for `ktrdr universe`. Requests no bars and changes no file of bars.

`universe/file.py` changes the file, `ib/discovery.py` finds the contract of a symbol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, file_symbol
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import InputError, KtrdrError
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines.universe.file import Entry, add_series, remove_series, universe_of

if TYPE_CHECKING:
    from ktrdr_pipelines.ib.history import IBHistory

_NAMING = ("sec_type", "exchange", "primary_exchange", "currency", "ib_symbol", "expiry", "con_id")
"""Fields of an entry that identify a contract; with one of them IB is not searched."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One series of the universe and the bars held. Times are bar opens. If its files cannot be read, ``problem`` is set and
    the other fields are None: unknown, not empty."""

    series: Series
    rows: int | None
    first: datetime | None
    last: datetime | None
    problem: KtrdrError | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        instrument = self.series.instrument
        return {
            "symbol": instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "sec_type": instrument.sec_type,
            "exchange": instrument.exchange,
            "currency": instrument.currency,
            "expiry": instrument.expiry or None,
            "con_id": instrument.con_id or None,
            "hours": str(instrument.hours),
            "what_to_show": instrument.what_to_show,
            "rows": self.rows,
            "first": format_instant(self.first) if self.first else None,
            "last": format_instant(self.last) if self.last else None,
            "problem": str(self.problem) if self.problem else None,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the universe file. ``already``: series that were in it before. ``kept``: files of removed series."""

    path: Path
    added: tuple[Series, ...] = ()
    already: tuple[Series, ...] = ()
    removed: tuple[Series, ...] = ()
    kept: tuple[Path, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "universe": str(self.path),
            "added": [_names(series) for series in self.added],
            "already_there": [_names(series) for series in self.already],
            "removed": [_names(series) for series in self.removed],
            "files_kept": [str(path) for path in self.kept],
        }


def _names(series: Series) -> dict[str, str]:
    return {"symbol": series.instrument.symbol, "timeframe": series.timeframe.name}


def name_series(symbol: str, timeframe: str, settings: Settings) -> Series:
    """The series ``symbol`` at ``timeframe``. Its instrument must be in the universe; sends no request.

    Raises:
        InputError: unknown timeframe, or the instrument is not in the universe.
    """
    wanted = parse_timeframe(timeframe)
    return Series(name_instrument(symbol, settings, timeframe=timeframe), wanted)


def name_instrument(symbol: str, settings: Settings, *, timeframe: str = "1d") -> Instrument:
    """The instrument ``symbol`` of the universe; sends no request.

    Raises:
        InputError: it is not in the universe. The advice names a load at ``timeframe``, which would add it.
    """
    file_symbol(symbol)
    instrument = universe_of(settings).find_instrument(symbol)
    if instrument is None:
        raise InputError(
            f"{symbol} is not in the universe",
            doing=f"reading {settings.universe_path}",
            advice=f"`ktrdr ib-load {symbol} {timeframe}` finds it at IB and adds it; or add it to that file.",
        )
    return instrument


def list_series(settings: Settings | None = None) -> list[Listed]:
    """Every series of the universe with the bars held; reads only the ends of each file.

    Raises:
        InputError: the universe file cannot be read.
    """
    settings = settings or load_settings()
    now = datetime.now(UTC)
    store = open_store(settings.data_dir)
    return [look_at(series, store, now) for series in universe_of(settings)]


def look_at(series: Series, store: Store, now: datetime) -> Listed:
    """The bars held of one series."""
    try:
        with peek(store, series, now=now) as (view, _):
            extent = view.extent(series)
            rows = view.read_sidecar(series).rows if extent else 0
    except KtrdrError as error:
        return Listed(series, None, None, None, error)
    return Listed(series, rows, extent.first if extent else None, extent.last if extent else None)


def add_to_universe(
    symbol: str,
    timeframes: Sequence[str],
    options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Change:
    """Add ``symbol`` at ``timeframes``. ``options`` are fields of `universe.file.Entry`.

    IB is searched only for a symbol that is not in the universe and has none of the options that identify a contract.

    Raises:
        KtrdrError: the input is invalid or contradicts the universe, or IB has no such symbol.
    """
    settings = settings or load_settings()
    file_symbol(symbol)
    options = {name: value for name, value in (options or {}).items() if value not in (None, "")}
    wanted = [parse_timeframe(name) for name in dict.fromkeys(timeframes)]
    universe = universe_of(settings)
    known = universe.find_instrument(symbol)
    if known is not None:
        instrument = _check_same(known, options, settings)
    elif options.keys() & set(_NAMING):
        instrument = _describe({"symbol": symbol.strip().upper(), **options})
    else:
        from ktrdr_pipelines.ib.discovery import identify_series

        with _open_history(settings) as history:
            instrument = identify_series(symbol, wanted[0], universe, history).instrument
        instrument = _with_options(instrument, options)
    series = [Series(instrument, timeframe) for timeframe in wanted]
    before = set(universe)
    add_series(settings.universe_path, *series)
    return Change(
        settings.universe_path,
        added=tuple(each for each in series if each not in before),
        already=tuple(each for each in series if each in before),
    )


def remove_from_universe(symbol: str, timeframes: Sequence[str], settings: Settings | None = None) -> Change:
    """Remove ``symbol`` from the universe, at ``timeframes`` or at all. Files of bars are kept.

    Raises:
        InputError: it is not in the universe.
    """
    settings = settings or load_settings()
    wanted = [parse_timeframe(name) for name in timeframes] or None
    file_symbol(symbol)
    instrument = universe_of(settings).find_instrument(symbol)
    if instrument is None:
        raise InputError(f"{symbol} is not in the universe", advice="`ktrdr universe list` shows the symbols.")
    removed = remove_series(settings.universe_path, instrument, wanted)
    return Change(settings.universe_path, removed=tuple(removed), kept=tuple(_files_of(removed, settings)))


def _open_history(settings: Settings) -> IBHistory:
    from ktrdr_pipelines.ib.endpoint import GatewayAddress
    from ktrdr_pipelines.ib.history import IBHistory

    return IBHistory(GatewayAddress.of(settings))


def _check_same(known: Instrument, options: Mapping[str, object], settings: Settings) -> Instrument:
    """``known``, if the options are the same as in the universe."""
    for name, value in options.items():
        has = getattr(known, name)
        if str(has) != str(value):
            raise InputError(
                f"{known.symbol} is in the universe with {name} {has or 'not set'}, not {value}",
                advice=f"Change it in {settings.universe_path}, or remove it there first.",
            )
    return known


def _describe(fields: Mapping[str, object]) -> Instrument:
    try:
        return Entry.model_validate({**fields, "timeframes": ["1d"]}).instrument()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{fields['symbol']}: {where}: {first['msg']}", advice="See README, The universe file."
        ) from None


def _with_options(instrument: Instrument, options: Mapping[str, object]) -> Instrument:
    """``instrument`` with the hours and what to show of ``options``, if its kind has them."""
    if not options:
        return instrument
    varied = replace(
        instrument,
        hours=Hours(str(options.get("hours", instrument.hours))),
        what_to_show=str(options.get("what_to_show", instrument.what_to_show)),
    )
    fields = {"symbol": varied.symbol, "sec_type": varied.sec_type, "exchange": varied.exchange, **options}
    _describe(fields)  # raises for what the universe file does not allow
    return varied


def _files_of(removed: Iterable[Series], settings: Settings) -> list[Path]:
    store = open_store(settings.data_dir)
    paths = [path for series in removed for path in (store.csv_path(series), store.sidecar_path(series))]
    return [path for path in paths if path.exists()]
