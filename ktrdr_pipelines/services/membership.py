"""Which series exist: what `ktrdr universe` does between parsing and printing.

Changing the file is `universe/file.py`'s, finding out what IB means by a name `ib/discovery.py`'s. No bars are asked for, no
files of bars are touched.
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
"""Fields of an entry that say which contract is meant; with one of them IB is not asked."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One series of the universe, and what is held of it. Times are bar opens. ``problem`` when its files cannot be read; the
    rest is None then, which is not the same as nothing."""

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
    """What became of the universe file. ``already``: series that were in it before. ``kept``: files of removed series."""

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
    """The series called ``symbol`` at ``timeframe``, of an instrument that the universe names; IB is not asked.

    Raises:
        InputError: no such timeframe, or the universe names no such instrument.
    """
    wanted = parse_timeframe(timeframe)
    return Series(name_instrument(symbol, settings, timeframe=timeframe), wanted)


def name_instrument(symbol: str, settings: Settings, *, timeframe: str = "1d") -> Instrument:
    """The instrument that the universe calls ``symbol``; IB is not asked.

    Raises:
        InputError: it names none; ``timeframe`` is that of the load which would look it up.
    """
    file_symbol(symbol)
    instrument = universe_of(settings).find_instrument(symbol)
    if instrument is None:
        raise InputError(
            f"{symbol} is not in the universe",
            doing=f"reading {settings.universe_path}",
            advice=f"`ktrdr ib-load {symbol} {timeframe}` looks it up at IB and adds it; or add it to that file.",
        )
    return instrument


def list_series(settings: Settings | None = None) -> list[Listed]:
    """Every series of the universe with what is held; looks at the ends of each file only.

    Raises:
        InputError: the universe file cannot be read.
    """
    settings = settings or load_settings()
    now = datetime.now(UTC)
    store = open_store(settings.data_dir)
    return [look_at(series, store, now) for series in universe_of(settings)]


def look_at(series: Series, store: Store, now: datetime) -> Listed:
    """What is held of one series."""
    try:
        with peek(store, series, now=now) as (view, _):
            extent = view.extent(series)
            rows = view.read_sidecar(series).rows if extent else 0
    except KtrdrError as error:
        return Listed(series, None, None, None, error)
    return Listed(series, rows, extent.first if extent else None, extent.last if extent else None)


def add_to_universe(
    symbol: str, timeframes: Sequence[str], said: Mapping[str, object] | None = None, settings: Settings | None = None
) -> Change:
    """Add ``symbol`` at ``timeframes``. What a person ``said`` of it are fields of `universe.file.Entry`.

    IB is asked only about a symbol that the universe does not name and of which nobody said which contract is meant.

    Raises:
        KtrdrError: the input cannot be meant, contradicts the universe, or IB does not know the symbol.
    """
    settings = settings or load_settings()
    file_symbol(symbol)
    said = {name: value for name, value in (said or {}).items() if value not in (None, "")}
    wanted = [parse_timeframe(name) for name in dict.fromkeys(timeframes)]
    universe = universe_of(settings)
    known = universe.find_instrument(symbol)
    if known is not None:
        instrument = _agree(known, said, settings)
    elif said.keys() & set(_NAMING):
        instrument = _describe({"symbol": symbol.strip().upper(), **said})
    else:
        from ktrdr_pipelines.ib.discovery import identify_series

        with _ask_gateway(settings) as history:
            instrument = identify_series(symbol, wanted[0], universe, history).instrument
        instrument = _vary(instrument, said)
    series = [Series(instrument, timeframe) for timeframe in wanted]
    there = set(universe)
    add_series(settings.universe_path, *series)
    return Change(
        settings.universe_path,
        added=tuple(each for each in series if each not in there),
        already=tuple(each for each in series if each in there),
    )


def remove_from_universe(symbol: str, timeframes: Sequence[str], settings: Settings | None = None) -> Change:
    """Take ``symbol`` out of the universe, at ``timeframes`` or altogether. Files of bars stay where they are.

    Raises:
        InputError: the universe does not name it.
    """
    settings = settings or load_settings()
    wanted = [parse_timeframe(name) for name in timeframes] or None
    file_symbol(symbol)
    instrument = universe_of(settings).find_instrument(symbol)
    if instrument is None:
        raise InputError(f"{symbol} is not in the universe", advice="`ktrdr universe list` shows what is.")
    removed = remove_series(settings.universe_path, instrument, wanted)
    return Change(settings.universe_path, removed=tuple(removed), kept=tuple(_files_of(removed, settings)))


def _ask_gateway(settings: Settings) -> IBHistory:
    from ktrdr_pipelines.ib.history import IBHistory
    from ktrdr_pipelines.orchestration.resources import GatewayResource

    return IBHistory(GatewayResource.of(settings).address())


def _agree(known: Instrument, said: Mapping[str, object], settings: Settings) -> Instrument:
    """``known``, if what was said says the same."""
    for name, value in said.items():
        has = getattr(known, name)
        if str(has) != str(value):
            raise InputError(
                f"{known.symbol} is in the universe with {name} {has or 'not given'}, not {value}",
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


def _vary(instrument: Instrument, said: Mapping[str, object]) -> Instrument:
    """``instrument`` with the hours and what to show that were asked for, if its kind has them."""
    if not said:
        return instrument
    varied = replace(
        instrument,
        hours=Hours(str(said.get("hours", instrument.hours))),
        what_to_show=str(said.get("what_to_show", instrument.what_to_show)),
    )
    fields = {"symbol": varied.symbol, "sec_type": varied.sec_type, "exchange": varied.exchange, **said}
    _describe(fields)  # refuses what the universe file would refuse
    return varied


def _files_of(removed: Iterable[Series], settings: Settings) -> list[Path]:
    store = open_store(settings.data_dir)
    paths = [path for series in removed for path in (store.csv_path(series), store.sidecar_path(series))]
    return [path for path in paths if path.exists()]
