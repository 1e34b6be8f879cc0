"""The fields of each message, by the protocol version negotiated: parsers of what clients send, builders of what they get.

Layouts were learned from the clients (ib_insync 0.9.86 and ib_async 2.1.0 ``client.py``, ``ib_insync/decoder.py``, versions 157
to 178; ibapi 9.81 for those below). Which message may follow which is in `client_session.py`; framing in `wire.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from ktrdr_pipelines.simulator.market import ContractQuery, Listing

MIN_VERSION = 100
MAX_VERSION = 178
"""Versions served. From 201 on the protocol is another one (protocol buffers)."""

Fields = tuple[object, ...]


class MessageError(ValueError):
    """A client's message has too few fields, or text where a number belongs."""


class FieldReader:
    """Takes the fields of one message in order. Missing or malformed ones raise `MessageError`."""

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
    capabilities: str = ""


@dataclass(frozen=True)
class ContractRequest:
    req_id: int
    contract: ContractQuery


@dataclass(frozen=True)
class HistoryRequest:
    """``end``, ``bar_size``, ``duration``, ``what`` and ``format_date`` are the client's own texts, not yet judged."""

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
    """A message of which only the kind and the request id (-1: none) matter. ``fields`` are the others, as sent."""

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
    client_id = fields.take_int()
    return StartApi(client_id, fields.take() if fields.has_more else "")


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


PARSERS: dict[int, tuple[str, Callable[[FieldReader], Incoming]]] = {
    1: ("market data", _simple("market data", has_id=True)),
    2: ("cancel market data", _simple("ignored")),
    3: ("place order", _simple("order", skip=0, has_id=True)),
    4: ("cancel order", _simple("ignored")),
    5: ("open orders", _simple("open orders")),
    6: ("account updates", _simple("account updates")),
    7: ("executions", _simple("executions", has_id=True)),
    8: ("ids", _simple("ids")),
    9: ("contract details", _parse_contract_request),
    14: ("log level", _simple("ignored")),
    15: ("auto open orders", _simple("ignored")),
    16: ("all open orders", _simple("open orders")),
    17: ("managed accounts", _simple("managed accounts")),
    20: ("historical data", _parse_history),
    25: ("cancel historical data", _parse_cancel_history),
    49: ("current time", _simple("current time")),
    50: ("real-time bars", _simple("market data", has_id=True)),
    51: ("cancel real-time bars", _simple("ignored")),
    58: ("global cancel", _simple("ignored")),
    59: ("market data type", _simple("ignored")),
    61: ("positions", _simple("positions")),
    62: ("account summary", _simple("account summary", has_id=True)),
    63: ("cancel account summary", _simple("ignored")),
    64: ("cancel positions", _simple("ignored")),
    71: ("start", _parse_start),
    76: ("account updates multi", _simple("account updates multi", has_id=True)),
    77: ("cancel account updates multi", _simple("ignored")),
    80: ("family codes", _simple("family codes", skip=0)),
    81: ("matching symbols", _parse_symbols),
    87: ("head timestamp", _parse_head),
    90: ("cancel head timestamp", _simple("ignored", skip=0)),
    99: ("completed orders", _simple("completed orders", skip=0)),
    104: ("user info", _simple("user info", skip=0, has_id=True)),
}
"""By message id: a name for people, and how to read the fields that follow the id."""


def parse_message(fields: Sequence[str], version: int) -> Incoming | None:
    """What a client sent, or None for a kind of message this gateway does not know.

    Raises:
        MessageError: the id is not a number, or fields are missing or malformed.
    """
    reader = FieldReader(fields, version)
    entry = PARSERS.get(reader.take_int())
    return entry[1](reader) if entry else None


_VERSIONS = re.compile(r"v([0-9]{1,6})(?:\.\.([0-9]{1,6}))?")


def parse_versions(text: str) -> tuple[int, int]:
    """``v157..176`` (connection options may follow after a space) as (lowest, highest); ``v176`` means just that one.

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
    """One contract of an answer to a contract-details request; ``exchange`` as the client routed it."""
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
    """Everything of a history answer before its bars."""
    return (17, 3, req_id, start, end, count) if version < 124 else (17, req_id, start, end, count)


def build_schedule(req_id: int, start: str, end: str, zone: str, sessions: Sequence[tuple[str, str, str]]) -> Fields:
    """An answer to SCHEDULE: opens, closes and reference dates as IB writes them."""
    return (106, req_id, start, end, zone, len(sessions), *(text for session in sessions for text in session))


def build_handshake(version: int, now: datetime) -> Fields:
    """The server version and the time of the connection, in words."""
    return (version, now.strftime("%Y%m%d %H:%M:%S ") + (now.tzname() or ""))


def build_managed_accounts(account: str) -> Fields:
    return (15, 1, account)


def build_next_valid_id(order_id: int) -> Fields:
    return (9, 1, order_id)
