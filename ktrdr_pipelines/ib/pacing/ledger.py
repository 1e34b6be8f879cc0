"""The pacing ledger: which process may send the next history request, decided for all processes of one gateway login.

`rules.decide` has the rules, `ledger_rows.py` the past, `backends.py` the storage; this module has the transactions that combine
them. A request is granted, written to the socket, stamped, and finished when answered; from the grant to the stamp it counts as
sent at this very moment, so that no delay of its process in between breaks a rule.

Waiters are served first come, first served. One may overtake only while those before it wait for rules that do not concern
it, and then leaves them their room in the budget: without this, the process that asks most often gets nearly everything.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.pacing.backends import LedgerStore, Transaction
from ktrdr_pipelines.ib.pacing.clock import Clock, SystemClock
from ktrdr_pipelines.ib.pacing.ledger_rows import GRANT_VALID_S, LedgerRows
from ktrdr_pipelines.ib.pacing.postgres_backend import PostgresStore
from ktrdr_pipelines.ib.pacing.rules import (
    MARGIN_S,
    PENALTY_MEMORY_S,
    WINDOW_UNITS,
    Ask,
    Entry,
    Go,
    Rule,
    Wait,
    decide,
    penalty_s,
    used_units,
)
from ktrdr_pipelines.ib.pacing.sqlite_backend import SqliteStore, ledger_path

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Longest sleep of a waiter: what it waits for may change, and it may be cancelled."""
QUEUE_POLL_S = 0.2
"""When an earlier waiter may go first, look again after this long: it is waking up just now."""


class GrantExpired(TransientError):
    """A grant was not used in time (the process was stopped, or the machine slept). Nothing was sent: acquire again."""


class WaitCancelled(TransientError):
    """The caller cancelled the wait for a grant. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class PauseOfAll:
    """A pause of all processes: until when (wall clock, seconds since 1970) and why."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Budget:
    """A snapshot of the ledger. ``used`` of ``limit`` units are taken; ``next_free_at_s`` (seconds since 1970) is when the next
    plain request could go, not counting the ``waiting`` ones; ``open`` requests are unanswered; ``past`` and ``pause_until_s``
    are arguments of `rules.decide`."""

    now_s: float
    used: int
    limit: int
    next_free_at_s: float
    waiting: int
    open: int
    pauses: tuple[PauseOfAll, ...]
    past: tuple[Entry, ...]

    @property
    def pause_until_s(self) -> float | None:
        """When the last pause ends; None without one."""
        return max((pause.until_s for pause in self.pauses), default=None)


OnWait = Callable[[float, Rule, float], None]
"""Called when a wait begins, changes its rule, or moves by more than a second: seconds, rule, until (seconds since 1970)."""


class Grant:
    """Permission to send one request. Write to the socket inside `sending`, call `finished` when it is answered or given up.

    As a context manager it is finished at the end of the block, or given back if nothing was sent.
    """

    def __init__(self, ledger: Ledger, ask: Ask, token: str, granted_at_s: float) -> None:
        self.ask = ask
        self.token = token
        self.granted_at_s = granted_at_s
        self.sent_at_s: float | None = None
        self.waited_s = 0.0
        """How long `Ledger.acquire` waited for it."""
        self._ledger = ledger
        self._is_used = False
        self._is_over = False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """A block for the write and nothing else: it begins with a last look at the ledger, and ends with the stamp.

        Raises:
            GrantExpired: more than `GRANT_VALID_S` passed since the grant, or the ledger was replaced meanwhile. Do not send.
            StoreError: the ledger cannot be read. Do not send.
        """
        if not self._ledger.may_send(self.token):
            self._is_over = True
            raise GrantExpired(
                f"a grant was not used within {GRANT_VALID_S:.0f} s, or the pacing ledger was replaced",
                advice="Nothing was sent; ask again.",
            )
        self._is_used = True
        try:
            yield
        finally:  # a write that failed may have reached the gateway
            try:
                self.sent_at_s = self._ledger.mark_sent(self.token, self.ask)
            except StoreError as failure:
                # Unstamped, it counts as sent as late as the grant was valid: the cautious side.
                log.warning("the pacing ledger could not record that a request was sent: %s", failure.message)

    def sent(self) -> float | None:
        """Stamp the request as sent now, without a write to guard; returns that time (seconds since 1970)."""
        with self.sending():
            pass
        return self.sent_at_s

    def finished(self) -> None:
        """The request is not open any more: answered, failed, or cancelled. Harmless when repeated."""
        if not self._is_over:
            self._is_over = True
            self._ledger.mark_finished(self.token)

    def give_back(self) -> None:
        """Return the unit: nothing was sent, nor will be. Does nothing once `sending` was entered."""
        if not self._is_used and not self._is_over:
            self._is_over = True
            self._ledger.delete_unsent(self.token)

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()
        try:
            self.finished()
        except StoreError as failure:
            # The answer (or its error) must not be lost because the ledger fails. Left open, the request counts longer than
            # needed, which is the cautious side.
            log.warning("the pacing ledger could not record that a request ended: %s", failure.message)


class Ledger:
    """The budget of one gateway login. Open it with `open_ledger`, as a context manager or with `close` on every path. Safe for
    threads and after a fork.

    Every method is one transaction, and raises StoreError when the ledger cannot be read or written: then nothing is granted.
    """

    def __init__(self, store: LedgerStore, login: str, clock: Clock) -> None:
        """``clock`` measures delays of this process; the times of requests come from the store's clock."""
        self._store = store
        self._login = login
        self._clock = clock

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def try_acquire(self, ask: Ask, *, work: WorkClass = WorkClass.INTERACTIVE) -> Grant | Wait:  # noqa: ARG002
        """A grant if ``ask`` may be sent now, else how long to wait and why. Takes no place in the queue."""
        return self._store.run(lambda tx: self._decide(tx, ask, ticket=None))

    def acquire(
        self,
        ask: Ask,
        *,
        work: WorkClass = WorkClass.INTERACTIVE,  # noqa: ARG002
        sleep: Callable[[float], object] = time.sleep,
        on_wait: OnWait | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Grant:
        """Wait until ``ask`` may be sent and return its grant. Blocks the thread.

        ``sleep`` gets at most `POLL_S` at a time; ``cancel`` is asked before each.

        Raises:
            WaitCancelled: ``cancel`` returned True.
        """
        ticket = uuid.uuid4().hex
        waited_s = 0.0
        reported: Wait | None = None
        reported_until_s = 0.0
        is_granted = False
        try:
            while True:
                if cancel is not None and cancel():
                    raise WaitCancelled("the wait for a grant was cancelled", advice="Nothing was sent.")
                answer, now_s = self._store.run(lambda tx: (self._decide(tx, ask, ticket), tx.read_clock().wall_s))
                if isinstance(answer, Grant):
                    is_granted = True
                    answer.waited_s = waited_s
                    return answer
                until_s = now_s + answer.seconds
                is_news = reported is None or (
                    answer.rule is not Rule.QUEUE
                    and (reported.rule is not answer.rule or abs(until_s - reported_until_s) > 1.0)
                )
                if on_wait and is_news:
                    reported, reported_until_s = answer, until_s
                    on_wait(answer.seconds, answer.rule, until_s)
                pause_s = min(answer.seconds, POLL_S)
                sleep(pause_s)
                waited_s += pause_s
        finally:
            if not is_granted:
                with suppress(
                    StoreError
                ):  # a ticket left behind ends with its process; the first error is the one to raise
                    self._store.run(lambda tx: LedgerRows(tx, self._login).remove_ticket(ticket))

    def penalise(self, reason: str, seconds: float | None = None) -> float:
        """Pause all processes for ``seconds``, because IB reported a pacing violation or the like; returns how long.

        Without ``seconds`` it is 15 s, and longer for each that follows within twenty minutes, up to ten minutes
        (`rules.PENALTIES_S`). Further violations during such a pause are about requests sent before it and change nothing.
        """

        def body(tx: Transaction) -> float:
            rows = LedgerRows(tx, self._login)
            length_s = seconds
            if length_s is None:
                penalties = [pause for pause in rows.pauses() if pause.is_penalty]
                left_s = max((pause.left_s for pause in penalties), default=0.0)
                if left_s > 0:
                    return left_s
                length_s = penalty_s(sum(pause.age_s <= PENALTY_MEMORY_S for pause in penalties))
            rows.add_pause(length_s, reason, is_penalty=seconds is None)
            return length_s

        return self._store.run(body)

    def snapshot(self) -> Budget:
        """The state of the budget now, for display and for forecasts."""

        def body(tx: Transaction) -> Budget:
            rows = LedgerRows(tx, self._login)
            past, now_s = rows.past(), rows.now.wall_s
            active = sorted((pause.left_s, pause.reason) for pause in rows.pauses() if pause.left_s > 0)
            pauses = tuple(PauseOfAll(now_s + left_s, why) for left_s, why in active)
            answer = decide(past, Ask("", ""), now_s, pauses[-1].until_s if pauses else None)
            return Budget(
                now_s=now_s,
                used=used_units(past, now_s),
                limit=WINDOW_UNITS,
                next_free_at_s=now_s + (answer.seconds if isinstance(answer, Wait) else 0.0),
                waiting=len(rows.waiting(None)),
                open=sum(entry.is_open for entry in past),
                pauses=pauses,
                past=tuple(past),
            )

        return self._store.run(body)

    def close(self) -> None:
        """Close the file or the database connections. The ledger may be used again afterwards."""
        self._store.close()

    # -- the one transaction that decides

    def _decide(self, tx: Transaction, ask: Ask, ticket: str | None) -> Grant | Wait:
        rows = LedgerRows(tx, self._login)
        past, ahead, now_s = rows.past(), rows.waiting(ticket), rows.now.wall_s
        left_s, why = max(((pause.left_s, pause.reason) for pause in rows.pauses()), default=(0.0, ""))
        pause_until_s = now_s + left_s if left_s > 0 else None
        # As if all earlier waiters were sent first: a later one must not take the room that they will need.
        promised = [Entry(now_s, other, is_open=True) for other in ahead]
        answer = decide(past + promised, ask, now_s, pause_until_s)
        if isinstance(answer, Go):
            for place, other in enumerate(ahead):
                if isinstance(decide(past + promised[:place], other, now_s, pause_until_s), Go):
                    answer = Wait(QUEUE_POLL_S, Rule.QUEUE)
                    break
        if isinstance(answer, Go):
            token = uuid.uuid4().hex
            rows.add_request(token, ask)
            if ticket is not None:
                rows.remove_ticket(ticket)
            return Grant(self, ask, token, now_s)
        if ticket is not None:
            rows.show(ask, ticket)
        reason = why if answer.rule is Rule.PAUSE else f"{len(ahead)} waiting before this one" if ahead else ""
        return replace(answer, reason=reason)

    # -- a grant after it was given: called by `Grant`

    def may_send(self, token: str) -> bool:
        """Whether a grant is still valid, as of no more than `MARGIN_S` ago."""
        while True:
            began = self._clock.read()
            if not self._store.run(lambda tx: LedgerRows(tx, self._login).may_send(token)):
                return False
            # A look that took long (a stopped process, a slow disk) is too old to decide by.
            if self._clock.read().age_of(began) <= MARGIN_S:
                return True

    def mark_sent(self, token: str, ask: Ask) -> float:
        """Stamp a request as sent now; returns that time (seconds since 1970)."""

        def body(tx: Transaction) -> float:
            rows = LedgerRows(tx, self._login)
            rows.mark_sent(token, ask)
            return rows.now.wall_s

        return self._store.run(body)

    def mark_finished(self, token: str) -> None:
        """The request is not open any more."""
        self._store.run(lambda tx: LedgerRows(tx, self._login).mark_finished(token))

    def delete_unsent(self, token: str) -> None:
        """Delete a grant, unless its request was sent."""
        self._store.run(lambda tx: LedgerRows(tx, self._login).delete_unsent(token))


def open_ledger(where: Path | str, login: str, clock: Clock | None = None) -> Ledger:
    """The ledger of ``login`` (the account, or ``host:port``: one name in all programs of one login).

    ``where`` is a directory for one SQLite file per login, or a PostgreSQL URL of SQLAlchemy (``postgresql+psycopg://...``).
    Nothing is opened before the first use. ``clock``: the machine's; for PostgreSQL the server's.

    Raises:
        InputError: an URL that is not PostgreSQL's, or whose driver is missing.
    """
    local = clock or SystemClock()
    if isinstance(where, str) and "://" in where:
        return Ledger(PostgresStore(where, login, clock), login, local)
    return Ledger(SqliteStore(ledger_path(Path(where), login), login, local), login, local)
