"""The contracts of a symbol at IB: the one that a load would take, all of them, and those found before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktrdr_pipelines.domain.instruments import Instrument, file_symbol
from ktrdr_pipelines.domain.load_request import NO_CHOICE, Choice
from ktrdr_pipelines.ib.contracts import ContractInfo, list_candidates
from ktrdr_pipelines.ib.discovery import discover, find_similar, symbols_file, unknown_symbol
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.services.gateway.question import quick_address
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import universe_of


@dataclass(frozen=True, slots=True)
class Found:
    """The contracts that IB has for a symbol, in the order in which they were tried."""

    symbol: str
    contracts: tuple[ContractInfo, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        fields = (
            "con_id", "symbol", "sec_type", "exchange", "currency", "primary_exchange", "local_symbol", "expiry",
            "long_name", "time_zone",
        )  # fmt: skip
        return {
            "symbol": self.symbol,
            "contracts": [{name: getattr(each, name) for name in fields} for each in self.contracts],
        }


def list_discovered(settings: Settings) -> list[Instrument]:
    """Instruments that were found at IB and are still remembered; sends no request."""
    with IBHistory(quick_address(settings)) as history:
        return [known.instrument for known in symbols_file(history).list_found() if known.instrument is not None]


def discover_symbol(settings: Settings, symbol: str, choice: Choice = NO_CHOICE) -> Instrument:
    """The instrument ``symbol``, with its conId: without ``choice`` from the universe, else the contract that IB finds.

    Raises:
        InputError: invalid symbol, or several contracts fit. PermanentError: IB has none. TransientError: IB did not answer.
    """
    file_symbol(symbol)
    universe = universe_of(settings)
    instrument = universe.find_instrument(symbol) if choice == NO_CHOICE else None
    with IBHistory(quick_address(settings)) as history:
        return history.pin(instrument) if instrument else discover(symbol, history=history, choice=choice).instrument


def look_up(settings: Settings, symbol: str) -> Found:
    """Every contract that IB has for ``symbol``, in the order of a load; nothing is remembered.

    Raises:
        PermanentError: IB has none. GatewayUnreachable: no gateway.
    """
    file_symbol(symbol)
    contracts: dict[int, ContractInfo] = {}
    candidates = list_candidates(symbol)
    with IBHistory(replace(GatewayAddress.of(settings), outage_patience_s=0.0)) as history:
        for candidate in candidates:
            for info in history.describe(candidate, f"looking up {symbol} as {candidate.sec_type}"):
                contracts.setdefault(info.con_id, info)
        if not contracts:
            raise unknown_symbol(symbol, candidates, find_similar(symbol, history))
    return Found(symbol, tuple(contracts.values()))
