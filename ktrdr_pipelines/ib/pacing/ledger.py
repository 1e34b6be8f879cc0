"""The pacing ledger: which process may send the next history request, decided for all processes of one gateway login.

`rules.decide` has the rules, `ledger_rows.py` the past, `backends.py` the storage; this module has the transactions that combine
them. A request is granted, written to the socket, stamped, and finished when answered; from the grant to the stamp it counts as
sent at this very moment, so that no delay of its process in between breaks a rule.

Waiters are served by class of work, and first come, first served within a class. One may overtake only while those before it
wait for rules that do not concern it, and then leaves them their room in the budget: without this, the process that asks
most often gets nearly everything. What a class leaves to higher ones is in `shares.py`; `budget.py` shows the state.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from types import TracebackType

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.pacing.backends import LedgerStore, Transaction
from ktrdr_pipelines.ib.pacing.budget import Budget, measure, order_of_service
from ktrdr_pipelines.ib.pacing.clock import Clock, SystemClock
from ktrdr_pipelines.ib.pacing.ledger_rows import GRANT_VALID_S, LOOK_S, LedgerRows, Pause, Waiter
from ktrdr_pipelines.ib.pacing.postgres_backend import PostgresStore
from ktrdr_pipelines.ib.pacing.rules import MOST_DELAY_S, PENALTY_MEMORY_S, Ask, Entry, Go, Rule, Wait, penalty_s
from ktrdr_pipelines.ib.pacing.shares import decide_share, is_starved
from ktrdr_pipelines.ib.pacing.sqlite_backend import SqliteStore, ledger_path

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Longest sleep of a waiter: what it waits for may change, and it may be cancelled."""
QUEUE_POLL_S = 0.2
"""When an earlier waiter may go first, look again after this long at the latest: it is waking up just now."""
QUEUE_FIRST_POLL_S = 0.01
"""The first such look; each further one in a row comes after twice as long."""


class GrantExpired(TransientError):
    """A grant was not used in time (the process was stopped, or the machine slept). Nothing was sent: acquire again."""


class WaitCancelled(TransientError):
    """The caller cancelled the wait for a grant. Nothing was sent."""


OnWait = Callable[[float, Rule, float], None]
"""Called when a wait begins, changes its rule, or moves by more than a second: seconds, rule, until (seconds since 1970)."""


class Grant:
    """Permission to send one request. Write to the socket inside `sending`, call `finished` when it is answered or given up.

    As a context manager it is finished at the end of the block, or given back if nothing was sent.
    """

    def __init__(self, ledger: Ledger, ask: Ask, work: WorkClass, token: str, granted_at_s: float) -> None:
        self.ask = ask
        self.work = work
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
                self.sent_at_s = self._ledger.mark_sent(self.token, self.ask, self.work)
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
            self._ledger.mark_finished(self.token, self.sent_at_s)

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


class Place:
    """A place in the queue of waiters, taken at the first `look` that is not a grant, kept by looking every few seconds, and left
    at the end of the block."""

    def __init__(self, ledger: Ledger, ask: Ask, work: WorkClass) -> None:
        self.ask = ask
        self.work = work
        self.looked_at_s = 0.0
        """The time of the last decision, seconds since 1970."""
        self._ledger = ledger
        self._ticket = uuid.uuid4().hex
        self._is_granted = False
        self._queue_poll_s = QUEUE_FIRST_POLL_S

    def look(self) -> Grant | Wait:
        """The grant, if it may be sent now, else how long to wait (`Wait.look_again_s`) and why."""
        answer, self.looked_at_s = self._ledger.look(self.ask, self.work, self._ticket)
        if isinstance(answer, Grant):
            self._is_granted = True
        elif answer.rule is Rule.QUEUE:
            answer = replace(answer, again_s=self._queue_poll_s)
            self._queue_poll_s = min(2 * self._queue_poll_s, QUEUE_POLL_S)
        else:
            self._queue_poll_s = QUEUE_FIRST_POLL_S
        return answer

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_granted:
            with suppress(
                StoreError
            ):  # a ticket left behind ends with its process; the first error is the one to raise
                self._ledger.leave(self._ticket)


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
        self._fastest_s = inf
        """The shortest time from the stamp of a request of this process to its end."""

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def try_acquire(self, ask: Ask, *, work: WorkClass = WorkClass.INTERACTIVE) -> Grant | Wait:
        """A grant if ``ask`` may be sent now, else how long to wait and why. Takes no place in the queue."""
        return self.look(ask, work)[0]

    def acquire(
        self,
        ask: Ask,
        *,
        work: WorkClass = WorkClass.INTERACTIVE,
        sleep: Callable[[float], object] = time.sleep,
        on_wait: OnWait | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Grant:
        """Wait until ``ask`` may be sent and return its grant. Blocks the thread; several threads may wait at once.

        ``work`` decides which waiters go first and how much room is left to others. ``sleep`` gets at most `POLL_S` at a time;
        ``cancel`` is asked before the first and after each.

        Raises:
            WaitCancelled: ``cancel`` returned True.
        """
        waited_s = 0.0
        reported: Wait | None = None
        reported_until_s = 0.0
        with self.line_up(ask, work=work) as place:
            while True:
                if cancel is not None and cancel():
                    raise WaitCancelled("the wait for a grant was cancelled", advice="Nothing was sent.")
                answer = place.look()
                if isinstance(answer, Grant):
                    answer.waited_s = waited_s
                    return answer
                until_s = place.looked_at_s + answer.seconds
                is_news = reported is None or (
                    answer.rule is not Rule.QUEUE
                    and (reported.rule is not answer.rule or abs(until_s - reported_until_s) > 1.0)
                )
                if on_wait and is_news:
                    reported, reported_until_s = answer, until_s
                    on_wait(answer.seconds, answer.rule, until_s)
                pause_s = min(answer.look_again_s, POLL_S)
                sleep(pause_s)
                waited_s += pause_s

    def line_up(self, ask: Ask, *, work: WorkClass = WorkClass.INTERACTIVE) -> Place:
        """A place in the queue, for callers that wait in their own way. Use it as a context manager."""
        return Place(self, ask, work)

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

        def body(tx: Transaction) -> tuple[list[Entry], list[Waiter], list[Pause], float]:
            rows = LedgerRows(tx, self._login)
            return rows.past(), rows.waiters(), rows.pauses(), rows.now.wall_s

        return measure(*self._store.run(body))  # outside the transaction: no other process waits for the estimates

    def interrupt(self) -> None:
        """End the waits of this process for another one that keeps the ledger locked; they raise StoreError."""
        self._store.interrupt()

    def close(self) -> None:
        """Close the file or the database connections. The ledger may be used again afterwards."""
        self._store.close()

    # -- the one transaction that decides

    def look(self, ask: Ask, work: WorkClass, ticket: str | None = None) -> tuple[Grant | Wait, float]:
        """A grant, or how long to wait, and the time of the decision (seconds since 1970)."""

        def body(tx: Transaction) -> tuple[Grant | Wait, float]:
            answer = self._decide(tx, ask, work, ticket)
            return answer, tx.read_clock().wall_s

        return self._store.run(body)

    def leave(self, ticket: str) -> None:
        """Give up the place in the queue that ``ticket`` has."""
        self._store.run(lambda tx: LedgerRows(tx, self._login).remove_ticket(ticket))

    def _decide(self, tx: Transaction, ask: Ask, work: WorkClass, ticket: str | None) -> Grant | Wait:
        rows = LedgerRows(tx, self._login)
        past, now_s = rows.past(), rows.now.wall_s
        own, ahead = _line_up(rows.waiters(ticket), past, work, ticket, now_s)
        waited_s = own.waited_s if own else 0.0
        pauses = [pause for pause in rows.pauses() if pause.left_s > 0]
        longest = max(pauses, key=lambda pause: pause.left_s, default=None)
        pause_until_s = now_s + longest.left_s if longest else None
        # As if all earlier waiters were sent first: a later one must not take the room that they will need.
        promised = [Entry(now_s, other.ask, True, other.work, other.waited_s) for other in ahead]
        answer = decide_share([*past, *promised], ask, now_s, pause_until_s, work=work, waited_s=waited_s)
        if isinstance(answer, Go) and _may_one_go(ahead, past, promised, now_s, pause_until_s):
            answer = Wait(QUEUE_POLL_S, Rule.QUEUE)
        if isinstance(answer, Go):
            token = uuid.uuid4().hex
            rows.add_request(token, ask, work, waited_s=waited_s)
            if ticket is not None:
                rows.remove_ticket(ticket)
            return Grant(self, ask, work, token, now_s)
        if ticket is not None:
            rows.show(ask, work, ticket)
        if longest and answer.rule is Rule.PAUSE:
            return replace(answer, reason=longest.reason)
        return replace(answer, reason=f"{len(ahead)} waiting before this one") if ahead else answer

    # -- a grant after it was given: called by `Grant`

    def may_send(self, token: str) -> bool:
        """Whether a grant is still valid, as of no more than `LOOK_S` ago."""
        while True:
            began = self._clock.read()
            if not self._store.run(lambda tx: LedgerRows(tx, self._login).may_send(token)):
                return False
            # A look that took long (a stopped process, a slow disk) is too old to decide by.
            if self._clock.read().age_of(began) <= LOOK_S:
                return True

    def mark_sent(self, token: str, ask: Ask, work: WorkClass) -> float:
        """Stamp a request as sent now; returns that time (seconds since 1970)."""

        def body(tx: Transaction) -> float:
            rows = LedgerRows(tx, self._login)
            rows.mark_sent(token, ask, work)
            return rows.now.wall_s

        return self._store.run(body)

    def mark_finished(self, token: str, sent_at_s: float | None = None) -> None:
        """The request, stamped at ``sent_at_s``, is not open any more. If its answer took longer than the fastest one, the
        gateway may have read it so much later: it counts from then on, `MOST_DELAY_S` later at most."""

        def body(tx: Transaction) -> None:
            rows = LedgerRows(tx, self._login)
            took_s = 0.0 if sent_at_s is None else max(0.0, rows.now.wall_s - sent_at_s)
            if sent_at_s is not None:
                self._fastest_s = min(self._fastest_s, took_s)
            rows.mark_finished(token, min(MOST_DELAY_S, max(0.0, took_s - self._fastest_s)))

        self._store.run(body)

    def delete_unsent(self, token: str) -> None:
        """Delete a grant, unless its request was sent."""
        self._store.run(lambda tx: LedgerRows(tx, self._login).delete_unsent(token))


def _line_up(
    waiters: list[Waiter], past: list[Entry], work: WorkClass, ticket: str | None, now_s: float
) -> tuple[Waiter | None, list[Waiter]]:
    """The waiter of ``ticket``, and those that go before it (or before a newcomer of class ``work``), in order of service."""
    own = next((waiter for waiter in waiters if waiter.token == ticket), None)
    line = order_of_service([waiter for waiter in waiters if waiter.is_fresh or waiter is own], past, now_s)
    if own:
        return own, line[: line.index(own)]
    return None, [
        waiter
        for waiter in line
        if not work.is_above(waiter.work) or is_starved(past, waiter.work, now_s, waiter.waited_s)
    ]


def _may_one_go(
    ahead: list[Waiter], past: list[Entry], promised: list[Entry], now_s: float, pause_until_s: float | None
) -> bool:
    """Whether one of those ``ahead`` may go now, if all before it went: then it has to go first."""
    blocked: set[object] = set()
    for place, other in enumerate(ahead):
        # What stops one stops the next of its kind too; only a twin may still wait for its own twin.
        kind = (other.ask.contract, other.ask.weight, other.work)
        if kind in blocked:
            continue
        answer = decide_share(
            [*past, *promised[:place]], other.ask, now_s, pause_until_s, work=other.work, waited_s=other.waited_s
        )
        if isinstance(answer, Go):
            return True
        if answer.rule is not Rule.IDENTICAL:
            blocked.add(kind)
    return False


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
