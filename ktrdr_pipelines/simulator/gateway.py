"""State that all connections of one simulated gateway share: market, pacing judge, faults, client ids, the log of requests.

No sockets and no clock: the caller passes the time. Sessions are in `client_session.py`, sockets in `server.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ktrdr_pipelines.simulator import refusals
from ktrdr_pipelines.simulator.disturbances import DELAYED, EMPTY, Disturbance
from ktrdr_pipelines.simulator.faults import CONNECT, Asked, Delivery, FaultBook, FaultRule
from ktrdr_pipelines.simulator.habits import USUAL, Habits
from ktrdr_pipelines.simulator.history_service import Answer, HistoryRules, check_request, find_head, look_up
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines.simulator.market import Listing, Market
from ktrdr_pipelines.simulator.messages import MAX_VERSION, HeadRequest, HistoryRequest
from ktrdr_pipelines.simulator.refusals import RequestRefusedError
from ktrdr_pipelines.simulator.request_reach import DurationRule

_LONGEST_TEXT = 200


@dataclass(frozen=True)
class RequestRecord:
    """One line of the log. ``time`` is epoch seconds, ``kind`` history, schedule, head or cancel; ``outcome`` is "bars",
    "sessions", "head", "silent", "cancelled" or the error's code and text; ``pacing`` the broken rule, ``faults`` the applied
    faults. ``first`` and ``last`` are the stamps sent, in epoch seconds (0: none)."""

    time: float
    kind: str
    client_id: int
    req_id: int
    symbol: str = ""
    con_id: int = 0
    sec_type: str = ""
    exchange: str = ""
    bar_size: str = ""
    end: str = ""
    duration: str = ""
    what: str = ""
    use_rth: bool = False
    outcome: str = ""
    bars: int = 0
    first: int = 0
    last: int = 0
    pacing: str = ""
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Planned:
    """An answer and its delivery. ``is_delayed``: it is sent at the end of an outage."""

    answer: Answer
    delivery: Delivery
    is_delayed: bool = False


class Gateway:
    """Shared state. ``on_record`` is called with each `RequestRecord` as it is made; ``latency_s`` delays every answer.

    ``server_version`` is the highest protocol version offered, to test old layouts. ``judge`` None: pacing is not judged.
    ``pace_clock`` (seconds) is the judge's clock, by default the market's.
    """

    max_clients = 32
    max_open_requests = 50
    max_messages_per_s = 50
    max_records = 100_000
    """The newest lines of the log are kept, at most so many."""

    def __init__(
        self,
        market: Market,
        *,
        judge: PacingJudge | None = None,
        faults: Iterable[FaultRule] = (),
        zone: str = "America/New_York",
        durations: DurationRule = DurationRule.SESSIONS,
        habits: Habits = USUAL,
        account: str = "SIM0000001",
        server_version: int = MAX_VERSION,
        latency_s: float = 0.0,
        pace_clock: Callable[[], float] | None = None,
        on_record: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.market = market
        self.judge = judge
        self.faults = FaultBook(faults)
        self.rules = HistoryRules(zone, durations, habits)
        self.account = account
        self.server_version = server_version
        self.latency_s = latency_s
        self.requests: list[RequestRecord] = []
        self.client_ids: set[int] = set()
        self.open_requests = 0
        self.outages: list[Disturbance] = []
        self.clock_lag_s = 0.0
        self._pace_clock = pace_clock
        self._on_record = on_record
        self._number = 0

    def record(self, record: RequestRecord) -> None:
        """Add a line to the log; longer texts than a real client sends are cut."""
        long: dict[str, Any] = {name: text[:_LONGEST_TEXT] for name, text in vars(record).items() if _is_long(text)}
        record = replace(record, **long) if long else record
        self.requests.append(record)
        del self.requests[: -self.max_records]
        if self._on_record:
            self._on_record(record)

    def begin(self, disturbance: Disturbance) -> None:
        """Apply a disturbance to requests from now on. `end` ends an outage."""
        if disturbance.is_outage:
            self.outages.append(disturbance)
        elif disturbance.kind == "stale_clock":
            self.clock_lag_s = disturbance.seconds

    def end(self, disturbance: Disturbance) -> None:
        """End an outage."""
        if disturbance in self.outages:
            self.outages.remove(disturbance)

    def plan_connection(self, client_id: int, now: float) -> Planned:
        """What a new client gets: nothing special, a refusal, or a disturbance."""
        asked = Asked(CONNECT, self._number, client_id, "", "", "", "", "", "", "", False, now)
        answer, delivery, _ = self.faults.apply(asked, Answer())
        self._begin_at_once(delivery)
        return Planned(answer, delivery)

    def _begin_at_once(self, delivery: Delivery) -> None:
        for disturbance in delivery.begins:
            if disturbance.delay_s <= 0:
                self.begin(disturbance)

    def plan_history(self, client_id: int, request: HistoryRequest, now: float) -> Planned:
        """Judge and look up one history or schedule request, and apply the faults."""
        kind = "schedule" if request.what == "SCHEDULE" else "history"
        record = RequestRecord(
            time=now,
            kind=kind,
            client_id=client_id,
            req_id=request.req_id,
            symbol=request.contract.symbol,
            con_id=request.contract.con_id,
            sec_type=request.contract.sec_type,
            exchange=request.contract.exchange,
            bar_size=request.bar_size,
            end=request.end,
            duration=request.duration,
            what=request.what,
            use_rth=request.use_rth,
        )
        local_symbol = request.contract.local_symbol
        try:
            if self.open_requests >= self.max_open_requests:
                raise RequestRefusedError(refusals.TOO_MANY_OPEN)
            lookup = check_request(self.market, request, int(now), self.rules)
            local_symbol = lookup.name
            record = _with_listing(record, lookup.listing, lookup.exchange)
            self._judge(record)
            answer = look_up(self.market, lookup, int(now), self.rules)
        except RequestRefusedError as refused:
            answer = Answer(refusal=refused.refusal)
            record = replace(record, pacing=refused.detail)
        return self._finish(record, local_symbol, answer)

    def plan_head(self, client_id: int, request: HeadRequest, now: float) -> Planned:
        """Judge and look up one head timestamp; it counts as a history request for pacing."""
        record = RequestRecord(
            time=now,
            kind="head",
            client_id=client_id,
            req_id=request.req_id,
            symbol=request.contract.symbol,
            con_id=request.contract.con_id,
            sec_type=request.contract.sec_type,
            exchange=request.contract.exchange,
            what=request.what,
            use_rth=request.use_rth,
        )
        local_symbol = request.contract.local_symbol
        try:
            listing, exchange, head = find_head(self.market, request, now)
            local_symbol = listing.local_symbol or listing.symbol
            record = _with_listing(record, listing, exchange)
            self._judge(record)
            head = self.rules.habits.shift_head(head)
            if head is None or head > now:
                raise RequestRefusedError(refusals.report_no_data(local_symbol, exchange, request.what))
            answer = Answer(head=head)
        except RequestRefusedError as refused:
            answer = Answer(refusal=refused.refusal)
            record = replace(record, pacing=refused.detail)
        return self._finish(record, local_symbol, answer)

    def _judge(self, record: RequestRecord) -> None:
        if self.judge is None:
            return
        group = (record.con_id, record.exchange, record.what)
        identity = (*group, record.kind, record.end, record.bar_size, record.duration, record.use_rth)
        at = self._pace_clock() if self._pace_clock else record.time
        broken = self.judge.judge(at, group, identity, weight=2 if record.what == "BID_ASK" else 1)
        if broken:
            raise RequestRefusedError(refusals.PACING, broken)

    def _finish(self, record: RequestRecord, local_symbol: str, answer: Answer) -> Planned:
        self._number += 1
        asked = Asked(
            kind=record.kind,
            number=self._number,
            client_id=record.client_id,
            symbol=record.symbol,
            local_symbol=local_symbol,
            exchange=record.exchange,
            bar_size=record.bar_size,
            duration=record.duration,
            end=record.end,
            what=record.what,
            use_rth=record.use_rth,
            now=record.time,
        )
        answer, delivery, faults = self.faults.apply(asked, answer)
        self._begin_at_once(delivery)
        meanwhile = self.outages[-1].meanwhile if self.outages else ""
        if meanwhile == EMPTY:
            answer = Answer(refusal=refusals.report_no_data(local_symbol, record.exchange, record.what))
        elif meanwhile:
            delivery = replace(delivery, silent=True)
        self.record(_with_outcome(replace(record, faults=faults), answer, delivery))
        delivery = replace(delivery, delay_s=delivery.delay_s + self.latency_s)
        return Planned(answer, delivery, is_delayed=meanwhile == DELAYED)


def _is_long(value: object) -> bool:
    return isinstance(value, str) and len(value) > _LONGEST_TEXT


def _with_listing(record: RequestRecord, listing: Listing, exchange: str) -> RequestRecord:
    return replace(record, symbol=listing.symbol, con_id=listing.con_id, sec_type=listing.sec_type, exchange=exchange)


def _with_outcome(record: RequestRecord, answer: Answer, delivery: Delivery) -> RequestRecord:
    if delivery.silent:
        return replace(record, outcome="silent")
    if answer.refusal:
        return replace(record, outcome=f"{answer.refusal.code} {answer.refusal.text}")
    if answer.bars is not None:
        stamps = answer.bars.stamp
        first, last = (int(stamps[0]), int(stamps[-1])) if len(stamps) else (0, 0)
        return replace(record, outcome="bars", bars=len(stamps), first=first, last=last)
    if answer.sessions is not None:
        return replace(record, outcome="sessions", bars=len(answer.sessions))
    return replace(record, outcome="head", first=answer.head or 0)
