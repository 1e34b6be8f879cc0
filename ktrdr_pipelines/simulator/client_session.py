"""One client's connection as a state machine without I/O: bytes and the time go in, actions come out.

States: PREFIX (waiting for ``API``), VERSIONS (waiting for the version range), START (waiting for startApi), READY, CLOSED.
Only READY serves requests. Field layouts are in `messages.py`, the state shared between connections in `gateway.py`. The driver
(`client_connection.py`, or a test) carries out the actions in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any
from zoneinfo import ZoneInfo

from ktrdr_pipelines.simulator import messages, refusals
from ktrdr_pipelines.simulator.disturbances import Disturbance
from ktrdr_pipelines.simulator.encoding import encode_history, write_head, write_schedule
from ktrdr_pipelines.simulator.faults import Delivery
from ktrdr_pipelines.simulator.gateway import Gateway, Planned, RequestRecord
from ktrdr_pipelines.simulator.history_service import Answer, write_hours
from ktrdr_pipelines.simulator.housekeeping import REPLIES, Question
from ktrdr_pipelines.simulator.market import find_listings, match_symbols
from ktrdr_pipelines.simulator.messages import (
    CancelHistory,
    ContractRequest,
    Fields,
    HeadRequest,
    HistoryRequest,
    MessageError,
    Simple,
    StartApi,
    SymbolsRequest,
)
from ktrdr_pipelines.simulator.refusals import Refusal
from ktrdr_pipelines.simulator.wire import (
    HANDSHAKE_PREFIX,
    LENGTH_BYTES,
    MAX_ANSWER_BYTES,
    FrameDecoder,
    WireError,
    encode,
    split_fields,
)

NO_REQUEST = -1


class State(Enum):
    PREFIX = "prefix"
    VERSIONS = "versions"
    START = "start"
    READY = "ready"
    CLOSED = "closed"


@dataclass(frozen=True)
class Send:
    """Write these bytes."""

    data: bytes


@dataclass(frozen=True)
class Wait:
    """Call `Session.wake` with ``token`` after ``delay_s`` seconds."""

    delay_s: float
    token: int


@dataclass(frozen=True)
class Close:
    """Close the connection once what was sent is out. ``reason`` is for the log."""

    reason: str


@dataclass(frozen=True)
class Begin:
    """A disturbance of the whole gateway begins, after its delay."""

    disturbance: Disturbance


Action = Send | Wait | Close | Begin


@dataclass(frozen=True)
class _Open:
    """A history or head request that has not been answered."""

    request: HistoryRequest | HeadRequest
    planned: Planned
    token: int


class Session:
    """One connection. Call `receive` with arriving bytes, `wake` when a `Wait` is over, `release` when the socket is gone."""

    def __init__(self, gateway: Gateway) -> None:
        self.state = State.PREFIX
        self.client_id = NO_REQUEST
        self.version = 0
        self._gateway = gateway
        self._prefix = b""
        self._frames = FrameDecoder()
        self._open: dict[int, _Open] = {}
        self._tokens = 0
        self._arrivals: deque[float] = deque()
        self._excesses = 0

    # --- bytes in -----------------------------------------------------------------------------------------------------

    @property
    def is_unready(self) -> bool:
        """True until the client has finished the handshake."""
        return self.state in (State.PREFIX, State.VERSIONS, State.START)

    @property
    def has_message(self) -> bool:
        """True if `receive` has kept a message because of its ``limit``."""
        return self.state is not State.CLOSED and self._frames.has_payload

    def receive(self, data: bytes, now: float, at: float | None = None, limit: int = 1 << 30) -> list[Action]:
        """The actions for ``data``, or for its first ``limit`` messages: the rest is kept (`has_message`) for the next
        call. ``now`` is the market's time in epoch seconds; ``at``, which counts messages a second, is any monotonic clock in
        seconds and matters where ``now`` stands still. After a `Close` there are no actions.
        """
        at = now if at is None else at
        now -= self._gateway.clock_lag_s
        if self.state is State.CLOSED:
            return []
        if self.state is State.PREFIX:
            self._prefix += data
            head, data = self._prefix[: len(HANDSHAKE_PREFIX)], self._prefix[len(HANDSHAKE_PREFIX) :]
            if not HANDSHAKE_PREFIX.startswith(head):
                return [self._close("peer does not speak the protocol")]
            if len(head) < len(HANDSHAKE_PREFIX):
                return []
            self.state, self._prefix = State.VERSIONS, b""
        actions: list[Action] = []
        try:
            for payload in self._frames.feed(data):
                actions += self._take_payload(payload, now, at)
                limit -= 1
                if self.state is State.CLOSED or not limit:
                    break
        except WireError as error:
            actions.append(self._close(f"broken framing: {error}"))
        return actions

    def _take_payload(self, payload: bytes, now: float, at: float) -> list[Action]:
        if self.state is State.VERSIONS:
            return self._negotiate(payload.rstrip(b"\0"), now)
        fields = split_fields(payload)
        actions = self._count_message(at)
        if self.state is State.CLOSED:
            return actions
        try:
            message = messages.parse_message(fields, self.version)
        except MessageError as error:
            return [*actions, self._refuse(NO_REQUEST, refusals.report_unreadable(fields[0][:20], str(error)))]
        if message is None:
            return [
                *actions,
                self._refuse(NO_REQUEST, refusals.report_unreadable(fields[0][:20], "Unknown message id.")),
            ]
        if self.state is State.START and not isinstance(message, StartApi):
            return [*actions, self._refuse(NO_REQUEST, Refusal(504, "Not connected"))]
        return [*actions, *_HANDLERS[type(message)](self, message, now)]

    def _count_message(self, at: float) -> list[Action]:
        """More than 50 messages a second: error 100; at the third such second the connection is closed, as IB does."""
        arrivals = self._arrivals
        while arrivals and not 0 <= at - arrivals[0] < 1.0:
            arrivals.popleft()
        arrivals.append(at)
        if len(arrivals) <= self._gateway.max_messages_per_s:
            return []
        excess: Action = self._refuse(NO_REQUEST, refusals.report_rate(len(arrivals)))
        arrivals.clear()
        self._excesses += 1
        return [excess, self._close("too many messages")] if self._excesses >= 3 else [excess]

    # --- handshake and requests ----------------------------------------------------------------------------------------

    def _negotiate(self, text: bytes, now: float) -> list[Action]:
        try:
            low, high = messages.parse_versions(text.decode("ascii", "replace"))
        except MessageError as error:
            return [self._close(str(error))]
        version = min(high, self._gateway.server_version)
        if version < max(low, messages.MIN_VERSION):
            return [self._close(f"no common version: client {low} to {high}")]
        self.version, self.state = version, State.START
        local = datetime.fromtimestamp(now, UTC).astimezone(ZoneInfo(self._gateway.rules.zone))
        return [self._send(messages.build_handshake(version, local))]

    def _start(self, message: StartApi, now: float) -> list[Action]:
        gateway = self._gateway
        if self.state is State.READY:
            return [self._refuse(NO_REQUEST, Refusal(501, "Already connected."))]
        if message.client_id in gateway.client_ids:
            return [self._refuse(NO_REQUEST, refusals.BUSY_CLIENT_ID), self._close("client id is in use")]
        if len(gateway.client_ids) >= gateway.max_clients:
            return [self._close(f"more than {gateway.max_clients} clients")]
        planned = gateway.plan_connection(message.client_id, now)
        if planned.answer.refusal is not None:
            return [self._refuse(NO_REQUEST, planned.answer.refusal), self._close("refused by a fault rule")]
        gateway.client_ids.add(message.client_id)
        self.client_id, self.state = message.client_id, State.READY
        return [
            self._send(messages.build_managed_accounts(gateway.account)),
            self._send(messages.build_next_valid_id(1)),
            *(self._refuse(NO_REQUEST, notice) for notice in refusals.FARM_NOTICES),
            *(self._refuse(NO_REQUEST, outage.begin) for outage in gateway.outages if outage.begin is not None),
            *(Begin(disturbance) for disturbance in planned.delivery.begins),
        ]

    def _describe_contracts(self, message: ContractRequest, now: float) -> list[Action]:
        market = self._gateway.market
        found = find_listings(market, message.contract, now)
        if not found:
            return [self._refuse(message.req_id, refusals.UNKNOWN_CONTRACT)]
        actions: list[Action] = []
        for listing in found:
            sessions = market.sessions(listing)
            local = datetime.fromtimestamp(now, UTC).astimezone(ZoneInfo(listing.zone))
            today = local.date().toordinal() - datetime(1970, 1, 1, tzinfo=UTC).toordinal()
            hours = [write_hours(sessions, today, 6, regular=regular) for regular in (False, True)]
            exchange = message.contract.exchange or listing.default_exchange
            actions.append(
                self._send(
                    messages.build_contract_details(self.version, message.req_id, listing, exchange, hours[0], hours[1])
                )
            )
        return [*actions, self._send(messages.build_contract_details_end(message.req_id))]

    def _match_symbols(self, message: SymbolsRequest, _now: float) -> list[Action]:
        found = match_symbols(self._gateway.market, message.pattern)
        return [self._send(messages.build_symbol_samples(self.version, message.req_id, found))]

    def _look_up(self, message: HistoryRequest | HeadRequest, now: float) -> list[Action]:
        if message.req_id in self._open:
            return [self._refuse(message.req_id, Refusal(102, "Duplicate ticker ID."))]
        if isinstance(message, HistoryRequest):
            planned = self._gateway.plan_history(self.client_id, message, now)
        else:
            planned = self._gateway.plan_head(self.client_id, message, now)
        delivery = planned.delivery
        actions: list[Action] = [Begin(disturbance) for disturbance in delivery.begins]
        actions += [self._refuse(message.req_id, notice) for notice in planned.answer.notices]
        if not delivery.silent and delivery.delay_s <= 0:
            return [*actions, *self._deliver(message, planned)]
        self._remember(message, planned)
        return actions if delivery.silent else [*actions, Wait(delivery.delay_s, self._tokens)]

    def _remember(self, request: HistoryRequest | HeadRequest, planned: Planned) -> None:
        self._tokens += 1
        self._open[request.req_id] = _Open(request, planned, self._tokens)
        self._gateway.open_requests += 1

    def wake(self, token: int) -> list[Action]:
        """The answer whose `Wait` is over; no actions if its request was cancelled in between."""
        for req_id, entry in list(self._open.items()):
            if entry.token == token and self.state is State.READY:
                self._forget(req_id)
                return self._deliver(entry.request, entry.planned)
        return []

    def deliver_delayed(self) -> list[Action]:
        """The answers that an outage has delayed."""
        delayed = [(req_id, entry) for req_id, entry in self._open.items() if entry.planned.is_delayed]
        actions: list[Action] = []
        for req_id, entry in delayed:
            self._forget(req_id)
            actions += self._deliver(entry.request, entry.planned)
        return actions

    def _cancel(self, message: CancelHistory, now: float) -> list[Action]:
        entry = self._open.get(message.req_id)
        if entry is None:
            return [self._refuse(message.req_id, refusals.report_unknown_query(message.req_id))]
        self._forget(message.req_id)
        request = entry.request
        self._gateway.record(
            RequestRecord(
                time=now,
                kind="cancel",
                client_id=self.client_id,
                req_id=message.req_id,
                symbol=request.contract.symbol,
                what=request.what,
                outcome="cancelled",
            )
        )
        actions: list[Action] = [self._refuse(message.req_id, refusals.confirm_cancel(message.req_id))]
        if entry.planned.delivery.after_cancel:
            actions += self._deliver(request, entry.planned)
        return actions

    def _forget(self, req_id: int) -> None:
        del self._open[req_id]
        self._gateway.open_requests -= 1

    def _deliver(self, request: HistoryRequest | HeadRequest, planned: Planned) -> list[Action]:
        answer = planned.answer
        data = b""
        if answer.refusal is not None:
            data = self._refuse(request.req_id, answer.refusal).data
        elif isinstance(request, HeadRequest):
            text = write_head(answer.head or 0, request.format_date)
            data = encode(*messages.build_head_timestamp(request.req_id, text))
        elif answer.sessions is not None:
            data = encode(*write_schedule(request.req_id, answer.sessions, regular=request.use_rth))
        elif answer.bars is not None:
            data = encode_history(
                self.version,
                request.req_id,
                answer.bars,
                answer.start_s,
                answer.end_s,
                format_date=request.format_date,
                zone=self._gateway.rules.zone,
            )
            if len(data) > LENGTH_BYTES + MAX_ANSWER_BYTES:
                data = self._refuse(request.req_id, refusals.TOO_LONG).data
        cut = planned.delivery.drop_after
        if cut is not None:
            return [Send(data[:cut]), self._close(f"dropped after {cut} bytes")]
        if isinstance(request, HistoryRequest) and request.keep_up_to_date and answer.bars is not None:
            # Updates are not simulated: the subscription stays open without messages until it is cancelled.
            self._remember(request, Planned(Answer(), Delivery(silent=True)))
        return [Send(data)]

    def _answer_simple(self, message: Simple, now: float) -> list[Action]:
        question = Question(message, self.version, self._gateway.account, self._gateway.rules.zone, now)
        return [self._send(fields) for fields in REPLIES[message.kind](question)]

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _send(self, fields: Fields) -> Send:
        return Send(encode(*fields))

    def _refuse(self, req_id: int, refusal: Refusal) -> Send:
        return self._send(messages.build_error(self.version, req_id, refusal.code, refusal.text))

    def broadcast(self, refusal: Refusal) -> list[Action]:
        """A notice that belongs to no request (1100, 2105, ...), for a client that is READY."""
        return [self._refuse(NO_REQUEST, refusal)] if self.state is State.READY else []

    def _close(self, reason: str) -> Close:
        self.release()
        return Close(reason)

    def release(self) -> None:
        """Free the client id and the open requests. Safe to call more than once."""
        if self.state is State.READY:
            self._gateway.client_ids.discard(self.client_id)
        for req_id in list(self._open):
            self._forget(req_id)
        self.state = State.CLOSED


_HANDLERS: dict[type, Callable[[Session, Any, float], list[Action]]] = {
    StartApi: Session._start,
    ContractRequest: Session._describe_contracts,
    SymbolsRequest: Session._match_symbols,
    HistoryRequest: Session._look_up,
    HeadRequest: Session._look_up,
    CancelHistory: Session._cancel,
    Simple: Session._answer_simple,
}
