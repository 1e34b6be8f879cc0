"""From a person's instrument to IB's contract: which candidates there are, which one is meant, what gets pinned.

Pure: the library's details come in and become `ContractInfo`. Never ``details[0]``: several candidates are an error
that shows them all. Discovery in the specification's order (CASH, STK) lives here as a list of candidates to try.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ktrdr_pipelines.errors import InputError, PermanentError
from ktrdr_pipelines.series import Instrument, forex, stock


@dataclass(frozen=True, slots=True)
class ContractInfo:
    """What IB's contract details say of one contract; strings as IB spells them, empty where it says nothing."""

    con_id: int
    symbol: str
    sec_type: str
    exchange: str
    currency: str
    primary_exchange: str = ""
    local_symbol: str = ""
    trading_class: str = ""
    expiry: str = ""
    """Last trade date, ``20241220``."""
    contract_month: str = ""
    """``202412``; energy futures trade last in the month before it."""
    multiplier: str = ""
    long_name: str = ""
    time_zone: str = ""
    valid_exchanges: str = ""

    def describe(self) -> str:
        """One line for a person who has to choose."""
        where = self.primary_exchange or self.exchange
        parts = [self.symbol, self.sec_type, where, self.currency, self.expiry, self.long_name, f"conId {self.con_id}"]
        return " ".join(part for part in parts if part)


def list_candidates(symbol: str) -> list[Instrument]:
    """What a bare ``symbol`` may mean, in the order to ask IB: a currency pair (CASH) first, then a US stock (STK).

    Raises:
        InputError: ``symbol`` is not a symbol at all.
    """
    wanted = symbol.strip().upper()
    candidates: list[Instrument] = []
    if re.fullmatch(r"[A-Z]{3}[./]?[A-Z]{3}", wanted):
        candidates.append(forex(wanted))
    candidates.append(stock(wanted))
    return candidates


def choose_contract(instrument: Instrument, details: Sequence[ContractInfo]) -> ContractInfo:
    """The one contract that ``instrument`` means among what IB answered.

    Raises:
        PermanentError: none fits.
        InputError: several fit; the message lists each with its conId.
    """
    fitting = {d.con_id: d for d in details if _fits(instrument, d)}
    if not fitting:
        offered = "; ".join(d.describe() for d in list(details)[:5]) or "nothing"
        raise PermanentError(
            f"IB knows no {instrument.sec_type} {instrument.ib_symbol} in {instrument.currency} (it offered: {offered})",
            advice="Check symbol, security type, exchange and currency.",
        )
    if len(fitting) > 1:
        listed = "; ".join(d.describe() for d in list(fitting.values())[:8])
        raise InputError(
            f"{instrument.symbol} is ambiguous: {listed}",
            advice="Choose one: put its con_id (or primary_exchange) in the universe file.",
        )
    return next(iter(fitting.values()))


def _fits(instrument: Instrument, info: ContractInfo) -> bool:
    if instrument.con_id:
        return info.con_id == instrument.con_id
    return (
        (not info.sec_type or info.sec_type == instrument.sec_type)
        and (not info.currency or info.currency == instrument.currency)
        and (not instrument.primary_exchange or instrument.primary_exchange in _homes(info))
        and (not instrument.expiry or _expires(info, instrument.expiry))
    )


def _expires(info: ContractInfo, expiry: str) -> bool:
    # A month means the contract month, which may lie after the last trade date; only where IB does not tell it, that date's.
    if len(expiry) == len("202412") and info.contract_month:
        return info.contract_month == expiry
    return info.expiry.startswith(expiry)


def _homes(info: ContractInfo) -> Sequence[str]:
    """What can be meant by the contract's primary exchange: what IB says, or, where it says nothing, wherever it trades."""
    if info.primary_exchange:
        return (info.primary_exchange, info.exchange)
    return (info.exchange, *info.valid_exchanges.split(","))


def pin_contract(instrument: Instrument, info: ContractInfo) -> Instrument:
    """``instrument`` with what IB said of it: conId and time zone, which are no part of its identity."""
    return replace(
        instrument,
        con_id=info.con_id,
        time_zone=info.time_zone,
    )
