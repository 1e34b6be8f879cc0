"""One request for a load, as a value: which series, which mode, which times, which contract.

Each entry point parses its input into a `LoadRequest` once. From there it travels whole, as run config, to the asset, which
resolves mode and window (`planning/modes.py`). Pure: no file, no clock, no gateway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from ktrdr_pipelines.domain.instruments import SECURITY_TYPES, file_symbol
from ktrdr_pipelines.domain.time import Time, format_instant, parse_range
from ktrdr_pipelines.domain.timeframes import Timeframe, parse_timeframe
from ktrdr_pipelines.errors import InputError


class Mode(StrEnum):
    """``tail``: from the last held bar to now. ``backfill``: older than the first held bar, one longest request back or to
    the given start. ``full``: every gap between start and now. With no CSV each is a full initialisation."""

    TAIL = "tail"
    BACKFILL = "backfill"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Choice:
    """What chooses among several contracts of one symbol. Empty, or 0: not given.

    Raises:
        InputError: an unknown security type, an invalid currency, exchange or conId.
    """

    sec_type: str = ""
    exchange: str = ""
    """The venue it is asked at (``IBIS``), or a stock's primary exchange."""
    currency: str = ""
    con_id: int = 0

    def __post_init__(self) -> None:
        for name in ("sec_type", "exchange", "currency"):
            object.__setattr__(self, name, getattr(self, name).strip().upper())
        if self.sec_type and self.sec_type not in SECURITY_TYPES:
            raise InputError(
                f"unknown security type {self.sec_type!r}", advice=f"Use one of {', '.join(SECURITY_TYPES)}."
            )
        if self.currency and not re.fullmatch(r"[A-Z]{3}", self.currency):
            raise InputError(f"{self.currency[:40]!r} is not a currency", advice="Write it like USD.")
        if self.exchange and not re.fullmatch(r"[A-Z0-9][A-Z0-9.]{0,15}", self.exchange):
            raise InputError(f"{self.exchange[:40]!r} is not an exchange", advice="Write IB's code, like SMART or CME.")
        if not 0 <= self.con_id < 1 << 63:
            raise InputError(f"{self.con_id} is not a conId", advice="It is a positive number.")


NO_CHOICE = Choice()


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load. Equal requests are one load.

    ``start`` is included, ``end`` is not; both are UTC and whole seconds. No end means now; what no start means depends on
    the mode. ``symbol`` is the user's spelling until the universe or IB has identified it.
    """

    symbol: str
    timeframe: Timeframe
    mode: Mode = Mode.TAIL
    start: datetime | None = None
    end: datetime | None = None
    choice: Choice = NO_CHOICE

    @classmethod
    def parse(
        cls,
        symbol: str,
        timeframe: str,
        mode: str = Mode.TAIL,
        *,
        start: Time | None = None,
        end: Time | None = None,
        choice: Choice = NO_CHOICE,
        now: datetime | None = None,
    ) -> LoadRequest:
        """The request that a user's words mean; times as `domain.time.parse_instant` reads them.

        Raises:
            InputError: an invalid symbol, timeframe, mode or time; start is not before end, or (with ``now``) is in the future.
        """
        file_symbol(symbol)
        parsed_timeframe = parse_timeframe(timeframe)
        if mode not in tuple(Mode):
            raise InputError(f"unknown mode {str(mode)[:40]!r}", advice=f"Use one of {', '.join(Mode)}.")
        first, last = parse_range(start, end, now=now)
        return cls(symbol, parsed_timeframe, Mode(mode), _round_up(first), _round_up(last), choice)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> LoadRequest:
        """The request whose `to_config` is ``config``; keys that are not the request's are ignored.

        Raises:
            InputError: as `parse`.
        """
        text = {name: str(config.get(name) or "") for name in _TEXTS}
        return cls.parse(
            text["symbol"],
            text["timeframe"],
            text["mode"],
            start=text["start"] or None,
            end=text["end"] or None,
            choice=Choice(text["sec_type"], text["exchange"], text["currency"], int(str(config.get("con_id") or 0))),
        )

    def to_config(self) -> dict[str, str | int]:
        """Plain values for run config and JSON; an empty text is not given."""
        return {
            "symbol": self.symbol,
            "timeframe": self.timeframe.name,
            "mode": self.mode.value,
            "start": format_instant(self.start) if self.start else "",
            "end": format_instant(self.end) if self.end else "",
            "sec_type": self.choice.sec_type,
            "exchange": self.choice.exchange,
            "currency": self.choice.currency,
            "con_id": self.choice.con_id,
        }


_TEXTS = ("symbol", "timeframe", "mode", "start", "end", "sec_type", "exchange", "currency")


def _round_up(instant: datetime | None) -> datetime | None:
    """To a whole second, as `Window.start_s` counts: bars open on whole seconds, so no bar is added or left out."""
    if instant is None or not instant.microsecond:
        return instant
    return instant.replace(microsecond=0) + timedelta(seconds=1)
