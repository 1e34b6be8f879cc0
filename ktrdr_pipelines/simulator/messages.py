"""The fields of each message, by the negotiated protocol version: parsers of client messages, builders of answers.

Sources of the layouts: the clients (ib_insync 0.9.86 and ib_async 2.1.0 client and decoder, versions 157 to
178; ibapi 9.81 for those below). The order of messages is in `client_session.py`; framing in `wire.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ktrdr_pipelines.simulator.market import ContractQuery, Listing

MIN_VERSION = 100
MAX_VERSION = 178
"""The versions served. From 201 on the protocol uses protocol buffers instead."""

Fields = tuple[object, ...]


class MessageError(ValueError):
    """A client's message has too few fields, or text in place of a number."""


class FieldReader:
    """Reads the fields of one message in order. Missing or malformed ones raise `MessageError`."""

    def __init__(self, fields: Sequence[str], version: int) -> None:
        self.version = version
        self._fields = fields
        self._next = 0

    def take(self) -> str:
        if self._next >= len(self._fields):
            raise MessageError(f"message ends after {len(self._fields)} fields")
        self._next += 1
        return self._fields[self._next - 1]

    def take_int(self) -> int:
        text = self.take()
        try:
            return int(text or 0)
        except ValueError:
            raise MessageError(f'Unable to parse data. For input string: "{text[:40]}"') from None

    def take_bool(self) -> bool:
        return self.take() in ("1", "true", "True")

    @property
    def has_more(self) -> bool:
        return self._next < len(self._fields)


# --- from clients ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartApi:
    client_id: int


@dataclass(frozen=True)
class ContractRequest:
    req_id: int
    contract: ContractQuery


@dataclass(frozen=True)
class HistoryRequest:
    """``end``, ``bar_size``, ``duration``, ``what`` and ``format_date`` are the client's texts, not yet checked."""

    req_id: int
    contract: ContractQuery
    end: str
    bar_size: str
    duration: str
    use_rth: bool
    what: str
    format_date: str
    keep_up_to_date: bool = False


@dataclass(frozen=True)
class HeadRequest:
    req_id: int
    contract: ContractQuery
    use_rth: bool
    what: str
    format_date: str


@dataclass(frozen=True)
class SymbolsRequest:
    req_id: int
    pattern: str


@dataclass(frozen=True)
class CancelHistory:
    req_id: int


@dataclass(frozen=True)
class Simple:
    """A message of which only the kind and the request id (-1: none) matter. ``fields`` are the rest, as sent."""

    kind: str
    req_id: int = -1
    fields: tuple[str, ...] = ()


Incoming = StartApi | ContractRequest | HistoryRequest | HeadRequest | SymbolsRequest | CancelHistory | Simple


def _read_contract(fields: FieldReader) -> ContractQuery:
    values = {"con_id": fields.take_int(), "symbol": fields.take(), "sec_type": fields.take(), "expiry": fields.take()}
    names = (
        "strike",
        "right",
        "multiplier",
        "exchange",
        "primary_exchange",
        "currency",
        "local_symbol",
        "trading_class",
    )
    texts = {name: fields.take() for name in names}
    return ContractQuery(**values, **texts, include_expired=fields.take_bool())  # type: ignore[arg-type]


def _parse_start(fields: FieldReader) -> StartApi:
    fields.take_int()
    return StartApi(fields.take_int())


def _parse_contract_request(fields: FieldReader) -> ContractRequest:
    fields.take_int()
    req_id = fields.take_int()
    return ContractRequest(req_id, _read_contract(fields))


def _parse_history(fields: FieldReader) -> HistoryRequest:
    if fields.version < 124:
        fields.take_int()
    req_id = fields.take_int()
    contract = _read_contract(fields)
    end, size, duration = fields.take(), fields.take(), fields.take()
    use_rth, what, format_date = fields.take_bool(), fields.take(), fields.take()
    if contract.sec_type == "BAG":
        for _ in range(4 * fields.take_int()):
            fields.take()
    keep = fields.take_bool() if fields.version >= 124 else False
    return HistoryRequest(req_id, contract, end, size, duration, use_rth, what, format_date, keep)


def _parse_head(fields: FieldReader) -> HeadRequest:
    req_id = fields.take_int()
    return HeadRequest(req_id, _read_contract(fields), fields.take_bool(), fields.take(), fields.take())


def _parse_symbols(fields: FieldReader) -> SymbolsRequest:
    return SymbolsRequest(fields.take_int(), fields.take())


def _parse_cancel_history(fields: FieldReader) -> CancelHistory:
    fields.take_int()
    return CancelHistory(fields.take_int())


def _simple(kind: str, *, skip: int = 1, has_id: bool = False) -> Callable[[FieldReader], Simple]:
    def parse(fields: FieldReader) -> Simple:
        for _ in range(skip):
            fields.take()
        req_id = fields.take_int() if has_id else -1
        rest = []
        while fields.has_more:
            rest.append(fields.take())
        return Simple(kind, req_id, tuple(rest))

    return parse


PARSERS: dict[int, Callable[[FieldReader], Incoming]] = {
    1: _simple("market data", has_id=True),
    2: _simple("ignored"),  # cancel market data
    3: _simple("order", skip=0, has_id=True),  # place order
    4: _simple("ignored"),  # cancel order
    5: _simple("open orders"),
    6: _simple("account updates"),
    7: _simple("executions", has_id=True),
    8: _simple("ids"),
    9: _parse_contract_request,  # contract details
    14: _simple("ignored"),  # log level
    15: _simple("ignored"),  # auto open orders
    16: _simple("open orders"),  # all open orders
    17: _simple("managed accounts"),
    20: _parse_history,  # historical data
    25: _parse_cancel_history,  # cancel historical data
    49: _simple("current time"),
    50: _simple("market data", has_id=True),  # real-time bars
    51: _simple("ignored"),  # cancel real-time bars
    58: _simple("ignored"),  # global cancel
    59: _simple("ignored"),  # market data type
    61: _simple("positions"),
    62: _simple("account summary", has_id=True),
    63: _simple("ignored"),  # cancel account summary
    64: _simple("ignored"),  # cancel positions
    71: _parse_start,  # start
    76: _simple("account updates multi", has_id=True),
    77: _simple("ignored"),  # cancel account updates multi
    80: _simple("family codes", skip=0),
    81: _parse_symbols,  # matching symbols
    87: _parse_head,  # head timestamp
    90: _simple("ignored", skip=0),  # cancel head timestamp
    99: _simple("completed orders", skip=0),
    104: _simple("user info", skip=0, has_id=True),
}
"""How to read the fields after the message id, by that id."""


def parse_message(fields: Sequence[str], version: int) -> Incoming | None:
    """The client's message, or None for an unknown message id.

    Raises:
        MessageError: the id is not a number, or fields are missing or malformed.
    """
    reader = FieldReader(fields, version)
    parse = PARSERS.get(reader.take_int())
    return parse(reader) if parse else None


_VERSIONS = re.compile(r"v([0-9]{1,6})(?:\.\.([0-9]{1,6}))?")


def parse_versions(text: str) -> tuple[int, int]:
    """``v157..176`` (connection options may follow after a space) as (lowest, highest); ``v176`` is that one alone.

    Raises:
        MessageError: anything else.
    """
    found = _VERSIONS.fullmatch(text.split(" ")[0])
    if not found:
        raise MessageError(f"not a version range: {text[:40]!r}")
    low, high = found.groups()
    return int(low), int(high or low)


# --- to clients -----------------------------------------------------------------------------------------------------


def build_error(version: int, req_id: int, code: int, text: str) -> Fields:
    """An error or notice; ``req_id`` -1 for one that belongs to no request. Non-ASCII text goes out escaped since 153."""
    if version >= 153:
        text = text.encode("ascii", "backslashreplace").decode()
    fields: Fields = (4, 2, req_id, code, text)
    return (*fields, "") if version >= 166 else fields


def build_contract_details(
    version: int, req_id: int, listing: Listing, exchange: str, trading_hours: str, liquid_hours: str
) -> Fields:
    """One contract of an answer to a contract-details request; ``exchange`` is the one the client asked for."""
    x = listing
    fields: list[object] = [10] if version >= 164 else [10, 8]
    fields += [req_id, x.symbol, x.sec_type, x.expiry, "0", "", exchange, x.currency, x.local_symbol, x.trading_class]
    fields += [x.trading_class, x.con_id, f"{x.min_tick:.10g}"]
    if 110 <= version < 164:
        fields += [1]
    order_types = "ADJUST,ALERT,DAY,GTC,LMT,MKT,STP"
    fields += [x.multiplier, order_types, ",".join(x.exchanges), 1, 0, x.long_name]
    fields += [x.primary_exchange if x.sec_type == "STK" else "", x.expiry[:6], x.industry, "", "", x.zone]
    fields += [trading_hours, liquid_hours, "", 0, 0]
    gated: list[tuple[bool, list[object]]] = [
        (version >= 121, [1]),
        (version >= 122, [x.symbol if x.sec_type == "FUT" else "", "IND" if x.sec_type == "FUT" else ""]),
        (version >= 126, [",".join(["26"] * len(x.exchanges))]),
        (version >= 134, [x.expiry]),
        (version >= 152, [x.stock_type]),
        (version == 163, ["1"]),
        (version >= 164, ["1", "1", "100"]),
    ]
    for present, values in gated:
        if present:
            fields += values
    return tuple(fields)


def build_contract_details_end(req_id: int) -> Fields:
    return (52, 1, req_id)


def build_symbol_samples(version: int, req_id: int, listings: Iterable[Listing]) -> Fields:
    found = list(listings)
    fields: list[object] = [79, req_id, len(found)]
    for x in found:
        fields += [x.con_id, x.symbol, x.sec_type, x.primary_exchange, x.currency, len(x.derivatives), *x.derivatives]
        if version >= 176:
            fields += [x.long_name, ""]
    return tuple(fields)


def build_head_timestamp(req_id: int, text: str) -> Fields:
    return (88, req_id, text)


def build_history_head(version: int, req_id: int, start: str, end: str, count: int) -> Fields:
    """The fields of a history answer before its bars."""
    return (17, 3, req_id, start, end, count) if version < 124 else (17, req_id, start, end, count)


def build_schedule(req_id: int, start: str, end: str, zone: str, sessions: Sequence[tuple[str, str, str]]) -> Fields:
    """An answer to SCHEDULE: opens, closes and reference dates as IB writes them."""
    return (106, req_id, start, end, zone, len(sessions), *(text for session in sessions for text in session))


def build_handshake(version: int, now: datetime) -> Fields:
    """The server version and the time of the connection as text."""
    return (version, now.strftime("%Y%m%d %H:%M:%S ") + (now.tzname() or ""))


def build_managed_accounts(account: str) -> Fields:
    return (15, 1, account)


def build_next_valid_id(order_id: int) -> Fields:
    return (9, 1, order_id)
