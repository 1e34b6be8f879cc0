"""Answers to the requests that are not about history: accounts, positions, orders, the time. A table, one line a request.

The account is empty and the gateway read-only, so most answers are only an end marker. Every request that ib_insync and
ib_async send while connecting is here; a client that misses one of these answers waits for its time-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from ktrdr_pipelines.simulator import refusals
from ktrdr_pipelines.simulator.messages import (
    Fields,
    Simple,
    build_error,
    build_managed_accounts,
    build_next_valid_id,
)


@dataclass(frozen=True)
class Question:
    """A simple message and everything that its answer depends on. ``now`` is epoch seconds, ``zone`` the gateway's."""

    message: Simple
    version: int
    account: str
    zone: str
    now: float

    def refuse(self, code: int, text: str) -> list[Fields]:
        return [build_error(self.version, self.message.req_id, code, text)]


def _list_account_values(q: Question) -> list[Fields]:
    if q.message.fields[:1] == ("0",):
        return []
    clock = datetime.fromtimestamp(q.now, UTC).astimezone(ZoneInfo(q.zone)).strftime("%H:%M")
    values = [("AccountType", "SIMULATED", ""), ("AccountReady", "true", ""), ("CashBalance", "0.00", "BASE")]
    lines: list[Fields] = [(6, 2, key, value, currency, q.account) for key, value, currency in values]
    return [*lines, (8, 1, clock), (54, 1, q.account)]


REPLIES: dict[str, Callable[[Question], list[Fields]]] = {
    "ignored": lambda _: [],
    "current time": lambda q: [(49, 1, int(q.now))],
    "managed accounts": lambda q: [build_managed_accounts(q.account)],
    "ids": lambda _: [build_next_valid_id(1)],
    "open orders": lambda _: [(53, 1)],
    "completed orders": lambda _: [(102,)],
    "executions": lambda q: [(55, 1, q.message.req_id)],
    "positions": lambda _: [(62, 1)],
    "account updates": _list_account_values,
    "account updates multi": lambda q: [
        (73, 1, q.message.req_id, q.account, "", "CashBalance", "0.00", "BASE"),
        (74, 1, q.message.req_id),
    ],
    "account summary": lambda q: [
        (63, 1, q.message.req_id, q.account, "AccountType", "SIMULATED", ""),
        (64, 1, q.message.req_id),
    ],
    "family codes": lambda _: [(78, 0)],
    "user info": lambda q: [(107, q.message.req_id, "")],
    "order": lambda q: q.refuse(refusals.READ_ONLY.code, refusals.READ_ONLY.text),
    "market data": lambda q: q.refuse(354, "Requested market data is not subscribed."),
}
"""The answers, by the kind of `Simple` message."""
