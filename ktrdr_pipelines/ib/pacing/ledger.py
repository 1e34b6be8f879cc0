"""The pacing ledger: who may send the next history request, decided once for every process of one gateway login.

`rules.decide` holds the rules, `ledger_rows.py` the past, `backends.py` the file; here are the transactions in which the
three meet. A request is granted, written to the socket, stamped, and finished when answered; from the grant to the stamp it
counts as sent at this very moment, so that whatever delays its process in between breaks no rule.

Waiters are served first come, first served. One may overtake only while those before it are held up by rules that do not
concern it, and then leaves them their room in the budget: without this, whoever asks most often gets nearly everything.
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

from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.pacing.backends import LedgerStore, PostgresStore, SqliteStore, Transaction, ledger_path
from ktrdr_pipelines.ib.pacing.clock import Clock, SystemClock
from ktrdr_pipelines.ib.pacing.ledger_rows import GRANT_VALID_S, LedgerRows
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

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Longest sleep of a waiter: what it waits for may change, and it may be told to stop."""
TURN_POLL_S = 0.2
"""When it is another's turn, look again after this long: that one is waking up just now."""


class GrantExpired(TransientError):
    """A grant was not used in time (the process was stopped, or the machine slept). Nothing was sent: acquire again."""


class WaitCancelled(TransientError):
    """Whoever waited for its turn was told to stop. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class PauseOfAll:
    """A pause of all processes: until when (wall clock, seconds since 1970) and why."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Budget:
    """The ledger for people. ``used`` of ``limit`` units are taken; ``next_free_at_s`` (seconds since 1970) is when the next
    plain request could go, not counting the ``waiting`` ones; ``open`` requests are unanswered; ``past`` and ``hold_until_s``
    serve `rules.decide`."""

    now_s: float
    used: int
    limit: int
    next_free_at_s: float
    waiting: int
    open: int
    holds: tuple[PauseOfAll, ...]
    past: tuple[Entry, ...]

    @property
    def hold_until_s(self) -> float | None:
        """When the last pause ends; None without one."""
        return max((hold.until_s for hold in self.holds), default=None)


OnWait = Callable[[float, Rule, float], None]
"""Told when a wait begins, changes its rule, or moves by more than a second: seconds, rule, until (seconds since 1970)."""


class Grant:
    """Leave to send one request. Write to the socket inside `sending`, call `finished` when it is answered or given up.

    As a context manager it is finished at the end of the block, or handed back if nothing was sent.
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
        """Put nothing but the write into this block: it begins with a last look at the ledger, and ends with the stamp.

        Raises:
            GrantExpired: more than `GRANT_VALID_S` passed since the grant, or the ledger was replaced meanwhile. Do not send.
            StoreError: the ledger cannot be read. Do not send.
        """
        self._ledger._look_again(self)
        self._is_used = True
        try:
            yield
        finally:  # a write that failed may have reached the gateway
            try:
                self.sent_at_s = self._ledger._stamp_sent(self)
            except StoreError as failure:
                # Unstamped, it counts as sent as late as the grant was valid: the cautious side.
                log.warning("the pacing ledger did not take note of a request: %s", failure)

    def sent(self) -> float | None:
        """Stamp the request as sent now, without a write to guard; returns that time (seconds since 1970)."""
        with self.sending():
            pass
        return self.sent_at_s

    def finished(self) -> None:
        """The request is not open any more: answered, failed, or cancelled. Harmless when repeated."""
        if not self._is_over:
            self._is_over = True
            self._ledger._finish(self)

    def give_back(self) -> None:
        """Nothing was and will be sent: return the unit. Does nothing once `sending` was entered."""
        if not self._is_used and not self._is_over:
            self._is_over = True
            self._ledger._give_back(self)

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()
        try:
            self.finished()
        except StoreError as failure:
            # The answer is there (or its error is on its way): it must not be lost for the ledger's sake. Left open, the
            # request counts longer than needed, which is the cautious side.
            log.warning("the pacing ledger did not take note of an answer: %s", failure)


class Ledger:
    """The budget of one gateway login. Open it with `open_ledger`. Safe for threads and after a fork.

    Every method is one transaction, and raises StoreError when the ledger cannot be read or written: then nothing is granted.
    """

    def __init__(self, store: LedgerStore, login: str, clock: Clock) -> None:
        """``clock`` tells how long this process was delayed; what counts is told by the store's."""
        self._store = store
        self._login = login
        self._clock = clock

    def try_acquire(self, ask: Ask) -> Grant | Wait:
        """A grant if ``ask`` may be sent now, else how long to wait and why. Leaves no place in the queue."""
        return self._store.run(lambda tx: self._decide(tx, ask, ticket=None))

    def acquire(
        self,
        ask: Ask,
        *,
        sleep: Callable[[float], object] = time.sleep,
        on_wait: OnWait | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Grant:
        """Wait for the turn of ``ask`` and return its grant. Blocks: call it from a thread of its own.

        ``sleep`` gets at most `POLL_S` at a time; ``cancel`` is asked before each.

        Raises:
            WaitCancelled: ``cancel`` returned True.
        """
        ticket = uuid.uuid4().hex
        waited_s = 0.0
        told: Wait | None = None
        told_until_s = 0.0
        is_granted = False
        try:
            while True:
                if cancel is not None and cancel():
                    raise WaitCancelled("waiting for the request's turn was cancelled", advice="Nothing was sent.")
                answer, now_s = self._store.run(lambda tx: (self._decide(tx, ask, ticket), tx.read_clock().wall_s))
                if isinstance(answer, Grant):
                    is_granted = True
                    answer.waited_s = waited_s
                    return answer
                until_s = now_s + answer.seconds
                is_worth_telling = answer.rule is not Rule.TURN or told is None
                if (
                    on_wait
                    and is_worth_telling
                    and (told is None or told.rule is not answer.rule or abs(until_s - told_until_s) > 1.0)
                ):
                    told, told_until_s = answer, until_s
                    on_wait(answer.seconds, answer.rule, until_s)
                pause_s = min(answer.seconds, POLL_S)
                sleep(pause_s)
                waited_s += pause_s
        finally:
            if not is_granted:
                with suppress(
                    StoreError
                ):  # a ticket left behind goes with its process; the first error is the one to tell
                    self._store.run(lambda tx: LedgerRows(tx, self._login).remove_ticket(ticket))

    def penalise(self, reason: str, seconds: float | None = None) -> float:
        """IB said that requests come too fast (or that all must pause): nobody sends for ``seconds``; returns how long.

        Without ``seconds`` it is 15 s, and longer for each that follows within twenty minutes, up to ten minutes
        (`rules.PENALTIES_S`). Further complaints during such a pause are about requests sent before it and change nothing.
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
        """The state of the budget now, for people and for forecasts."""

        def body(tx: Transaction) -> Budget:
            rows = LedgerRows(tx, self._login)
            past, now_s = rows.past(), rows.now.wall_s
            active = sorted((pause.left_s, pause.reason) for pause in rows.pauses() if pause.left_s > 0)
            holds = tuple(PauseOfAll(now_s + left_s, why) for left_s, why in active)
            answer = decide(past, Ask("", ""), now_s, holds[-1].until_s if holds else None)
            return Budget(
                now_s=now_s,
                used=used_units(past, now_s),
                limit=WINDOW_UNITS,
                next_free_at_s=now_s + (answer.seconds if isinstance(answer, Wait) else 0.0),
                waiting=len(rows.waiting(None)),
                open=sum(entry.is_open for entry in past),
                holds=holds,
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
        hold_until_s = now_s + left_s if left_s > 0 else None
        # As if everyone before were sent first: whoever comes later must not take the room that they will need.
        promised = [Entry(now_s, other, is_open=True) for other in ahead]
        answer = decide(past + promised, ask, now_s, hold_until_s)
        if isinstance(answer, Go):
            for place, other in enumerate(ahead):
                if isinstance(decide(past + promised[:place], other, now_s, hold_until_s), Go):
                    answer = Wait(TURN_POLL_S, Rule.TURN)
                    break
        if isinstance(answer, Go):
            token = uuid.uuid4().hex
            rows.add_request(token, ask)
            if ticket is not None:
                rows.remove_ticket(ticket)
            return Grant(self, ask, token, now_s)
        if ticket is not None:
            rows.show(ask, ticket)
        reason = why if answer.rule is Rule.HOLD else f"{len(ahead)} waiting before this one" if ahead else ""
        return replace(answer, reason=reason)

    # -- what becomes of a grant

    def _look_again(self, grant: Grant) -> None:
        while True:
            began = self._clock.read()
            if not self._store.run(lambda tx: LedgerRows(tx, self._login).may_send(grant.token)):
                grant._is_over = True
                raise GrantExpired(
                    f"leave to send was not used within {GRANT_VALID_S:.0f} s, or the pacing ledger was replaced",
                    advice="Nothing was sent; ask again.",
                )
            # A look that took long (a stopped process, a slow disk) says nothing about now.
            if self._clock.read().age_of(began) <= MARGIN_S:
                return

    def _stamp_sent(self, grant: Grant) -> float:
        def body(tx: Transaction) -> float:
            rows = LedgerRows(tx, self._login)
            rows.mark_sent(grant.token, grant.ask)
            return rows.now.wall_s

        return self._store.run(body)

    def _finish(self, grant: Grant) -> None:
        sql = "UPDATE ib_pacing_requests SET is_finished = 1 WHERE token = :token"
        self._store.run(lambda tx: tx.run(sql, token=grant.token))

    def _give_back(self, grant: Grant) -> None:
        sql = "DELETE FROM ib_pacing_requests WHERE token = :token AND is_sent = 0"
        self._store.run(lambda tx: tx.run(sql, token=grant.token))


def open_ledger(where: Path | str, login: str, clock: Clock | None = None) -> Ledger:
    """The ledger of ``login`` (the account, or ``host:port``; whatever all programs of one login agree on).

    ``where`` is a directory for one SQLite file per login, or a PostgreSQL URL of SQLAlchemy (``postgresql+psycopg://...``).
    Nothing is opened before the first use. ``clock``: the machine's; for PostgreSQL the server's.

    Raises:
        InputError: an URL that is not PostgreSQL's, or whose driver is missing.
    """
    local = clock or SystemClock()
    if isinstance(where, str) and "://" in where:
        return Ledger(PostgresStore(where, login, clock), login, local)
    return Ledger(SqliteStore(ledger_path(Path(where), login), login, local), login, local)
