"""The pacing ledger: who may send the next history request, decided once for every process of one gateway login.

`pacing.decide` holds the rules, `ledger_store.py` the rows; here are the transactions around them: requests, the queue of
those who wait, pauses. A request is granted, stamped right before it is written to the socket, and finished when answered.

Waiters are served first come, first served. One may overtake only while those before it are held up by rules that do not
concern it, and then leaves them their room in the budget: without this, whoever asks most often gets nearly everything.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.clock import Clock, Reading, Stamp, SystemClock
from ktrdr_pipelines.ib.ledger_store import (
    INSERT_HOLD,
    LedgerStore,
    PostgresStore,
    SqliteStore,
    Transaction,
    hold_parameters,
    ledger_path,
)
from ktrdr_pipelines.ib.owners import Owner, current_owner
from ktrdr_pipelines.ib.pacing import (
    MARGIN_S,
    PENALTY_MEMORY_S,
    WINDOW_S,
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

GRANT_VALID_S = 10.0
"""A grant that is not stamped by then is void. Until then it counts as about to be sent, afterwards as sent at that last
moment: nothing is sent unstamped, but a caller that forgot must not break the limit."""
OPEN_MAX_S = WINDOW_S
"""An unanswered request stops counting as open after this long, should nobody have said that it is finished. Requests are
given up after 120 s; those of a process that has died end with its socket, at once."""
TICKET_FRESH_S = 20.0
"""A waiter that did not show itself for so long is passed over (stopped, or its machine asleep). It keeps its place."""
POLL_S = 1.0
"""Longest sleep of a waiter: what it waits for may change, and it may be told to stop."""
TURN_POLL_S = 0.2
"""When it is another's turn, look again after this long: that one is waking up just now."""
HEARTBEAT_S = 5.0
"""How often a waiter shows itself. Rarer than `POLL_S`, because showing writes to the disk and looking does not."""


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
    serve `pacing.decide`."""

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
    """Leave to send one request. Call `sent` right before writing to the socket, `finished` when it is answered or given up.

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
        self._is_over = False

    def sent(self) -> float:
        """Stamp the request as sent now; returns that time (seconds since 1970).

        Call it immediately **before** the write, and again after it if the write may have been delayed: the later time stands.

        Raises:
            GrantExpired: more than `GRANT_VALID_S` passed since the grant, or the ledger was replaced meanwhile. Do not send.
            StoreError: the stamp could not be written. Do not send.
        """
        self.sent_at_s = self._ledger._stamp_sent(self)
        return self.sent_at_s

    def finished(self) -> None:
        """The request is not open any more: answered, failed, or cancelled. Harmless when repeated."""
        if not self._is_over:
            self._is_over = True
            self._ledger._finish(self)

    def give_back(self) -> None:
        """Nothing was and will be sent: return the unit. Does nothing once `sent` was called."""
        if self.sent_at_s is None and not self._is_over:
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

    def __init__(self, store: LedgerStore, login: str) -> None:
        self._store = store
        self._login = login

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
                    self._store.run(
                        lambda tx: tx.run("DELETE FROM ib_pacing_tickets WHERE token = :token", token=ticket)
                    )

    def penalise(self, reason: str, seconds: float | None = None) -> float:
        """IB said that requests come too fast (or that all must pause): nobody sends for ``seconds``; returns how long.

        Without ``seconds`` it is 15 s, and longer for each that follows within twenty minutes, up to ten minutes
        (`pacing.PENALTIES_S`). Further complaints during such a pause are about requests sent before it and change nothing.
        """

        def body(tx: Transaction) -> float:
            now = tx.read_clock()
            holds = self._holds(tx, now)
            if seconds is not None:
                length_s = seconds
            else:
                penalties = [(age_s, length_s) for age_s, length_s, is_penalty, _ in holds if is_penalty]
                left_s = max((length_s - age_s for age_s, length_s in penalties), default=0.0)
                if left_s > 0:
                    return left_s
                length_s = penalty_s(sum(age_s <= PENALTY_MEMORY_S for age_s, _ in penalties))
            tx.run(INSERT_HOLD, **hold_parameters(self._login, now, length_s, reason, is_penalty=seconds is None))
            return length_s

        return self._store.run(body)

    def snapshot(self) -> Budget:
        """The state of the budget now, for people and for forecasts."""

        def body(tx: Transaction) -> Budget:
            now = tx.read_clock()
            past = self._past(tx, now)
            holds = sorted(
                (PauseOfAll(now.wall_s + length_s - age_s, why) for age_s, length_s, _, why in self._holds(tx, now)
                 if age_s < length_s),
                key=lambda hold: hold.until_s,
            )  # fmt: skip
            answer = decide(past, Ask("", ""), now.wall_s, holds[-1].until_s if holds else None)
            return Budget(
                now_s=now.wall_s,
                used=used_units(past, now.wall_s),
                limit=WINDOW_UNITS,
                next_free_at_s=now.wall_s + (answer.seconds if isinstance(answer, Wait) else 0.0),
                waiting=len(self._waiting(tx, now, None)),
                open=sum(entry.is_open for entry in past),
                holds=tuple(holds),
                past=tuple(past),
            )

        return self._store.run(body)

    def close(self) -> None:
        """Close the file or the database connections. The ledger may be used again afterwards."""
        self._store.close()

    # -- the one transaction that decides

    def _decide(self, tx: Transaction, ask: Ask, ticket: str | None) -> Grant | Wait:
        now = tx.read_clock()
        past = self._past(tx, now)
        ahead = self._waiting(tx, now, ticket)
        active = [(length_s - age_s, why) for age_s, length_s, _, why in self._holds(tx, now) if age_s < length_s]
        left_s, why = max(active, default=(0.0, ""))
        hold_until_s = now.wall_s + left_s if left_s > 0 else None
        # As if everyone before were sent first: whoever comes later must not take the room that they will need.
        promised = [Entry(now.wall_s, other, is_open=True) for other in ahead]
        answer = decide(past + promised, ask, now.wall_s, hold_until_s)
        if isinstance(answer, Go):
            for place, other in enumerate(ahead):
                if isinstance(decide(past + promised[:place], other, now.wall_s, hold_until_s), Go):
                    answer = Wait(TURN_POLL_S, Rule.TURN)
                    break
        if isinstance(answer, Go):
            token = uuid.uuid4().hex
            tx.run(
                "INSERT INTO ib_pacing_requests (token, login, wall_s, boot_s, boot_id, host, pid, started, identity,"
                " contract, weight, is_sent, is_finished) VALUES (:token, :login, :wall_s, :boot_s, :boot_id, :host, :pid,"
                " :started, :identity, :contract, :weight, 0, 0)",
                **self._row(token, ask, now),
            )
            if ticket is not None:
                tx.run("DELETE FROM ib_pacing_tickets WHERE token = :token", token=ticket)
            return Grant(self, ask, token, now.wall_s)
        if ticket is not None:
            self._show(tx, ask, ticket, now)
        reason = why if answer.rule is Rule.HOLD else f"{len(ahead)} waiting before this one" if ahead else ""
        return replace(answer, reason=reason)

    def _row(self, token: str, ask: Ask, now: Reading) -> dict[str, object]:
        owner = current_owner()
        return {
            "token": token, "login": self._login, "wall_s": now.wall_s, "boot_s": now.boot_s, "boot_id": now.boot_id,
            "host": owner.host, "pid": owner.pid, "started": owner.started,
            "identity": ask.identity, "contract": ask.contract, "weight": ask.weight,
        }  # fmt: skip

    def _past(self, tx: Transaction, now: Reading) -> list[Entry]:
        """Every request that still matters, at its time on the wall clock of ``now``; the rest is deleted."""
        entries: list[Entry] = []
        alive: dict[Owner, bool | None] = {}
        for token, wall_s, boot_s, boot_id, host, pid, started, identity, contract, weight, is_sent, is_over in tx.rows(
            "SELECT token, wall_s, boot_s, boot_id, host, pid, started, identity, contract, weight, is_sent, is_finished"
            " FROM ib_pacing_requests WHERE login = :login",
            login=self._login,
        ):
            age_s = now.age_of(Stamp(wall_s, boot_s, boot_id))
            if age_s < 0:
                # From a future: the clock was set back. Counted as sent now, and written down as such, or it would stay for
                # as long as the clock was set back.
                self._restamp(tx, token, now)
                age_s = 0.0
            if not is_sent:
                age_s = 0.0 if age_s <= GRANT_VALID_S + MARGIN_S else age_s - GRANT_VALID_S
            if age_s > WINDOW_S + 2 * MARGIN_S:
                tx.run("DELETE FROM ib_pacing_requests WHERE token = :token", token=token)
                continue
            is_open = not is_over and age_s <= OPEN_MAX_S
            if is_open:
                owner = Owner(host, pid, started)
                if owner not in alive:
                    alive[owner] = owner.is_alive()
                is_open = alive[owner] is not False
            entries.append(Entry(now.wall_s - age_s, Ask(identity, contract, weight), is_open))
        return entries

    def _restamp(self, tx: Transaction, token: str, now: Reading) -> None:
        tx.run(
            "UPDATE ib_pacing_requests SET wall_s = :wall_s, boot_s = :boot_s, boot_id = :boot_id WHERE token = :token",
            token=token, wall_s=now.wall_s, boot_s=now.boot_s, boot_id=now.boot_id,
        )  # fmt: skip

    def _waiting(self, tx: Transaction, now: Reading, ticket: str | None) -> list[Ask]:
        """Those who wait before ``ticket`` (None: all), in order. Tickets of dead processes are deleted."""
        ahead: list[Ask] = []
        for token, wall_s, boot_s, boot_id, host, pid, started, identity, contract, weight in tx.rows(
            "SELECT token, wall_s, boot_s, boot_id, host, pid, started, identity, contract, weight"
            " FROM ib_pacing_tickets WHERE login = :login ORDER BY seq",
            login=self._login,
        ):
            if token == ticket:
                break
            age_s = now.age_of(Stamp(wall_s, boot_s, boot_id))
            if Owner(host, pid, started).is_alive() is False or age_s > WINDOW_S:
                tx.run("DELETE FROM ib_pacing_tickets WHERE token = :token", token=token)
            elif age_s <= TICKET_FRESH_S:
                ahead.append(Ask(identity, contract, weight))
        return ahead

    def _show(self, tx: Transaction, ask: Ask, ticket: str, now: Reading) -> None:
        """Take a place at the end of the queue, or show that its owner is still there."""
        found = tx.rows("SELECT wall_s, boot_s, boot_id FROM ib_pacing_tickets WHERE token = :token", token=ticket)
        if found:
            if 0 <= now.age_of(Stamp(*found[0])) < HEARTBEAT_S:
                return
            tx.run(
                "UPDATE ib_pacing_tickets SET wall_s = :wall_s, boot_s = :boot_s, boot_id = :boot_id WHERE token = :token",
                token=ticket, wall_s=now.wall_s, boot_s=now.boot_s, boot_id=now.boot_id,
            )  # fmt: skip
            return
        tx.run(
            "INSERT INTO ib_pacing_tickets (token, login, wall_s, boot_s, boot_id, host, pid, started, identity, contract,"
            " weight, seq) SELECT :token, :login, :wall_s, :boot_s, :boot_id, :host, :pid, :started, :identity, :contract,"
            " :weight, COALESCE(MAX(seq), 0) + 1 FROM ib_pacing_tickets",
            **self._row(ticket, ask, now),
        )

    def _holds(self, tx: Transaction, now: Reading) -> list[tuple[float, float, bool, str]]:
        """Age, length, whether it is IB's pacing answer, and reason of every pause that still matters."""
        holds: list[tuple[float, float, bool, str]] = []
        for token, wall_s, boot_s, boot_id, seconds, is_penalty, reason in tx.rows(
            "SELECT token, wall_s, boot_s, boot_id, seconds, is_penalty, reason FROM ib_pacing_holds WHERE login = :login",
            login=self._login,
        ):
            age_s = now.age_of(Stamp(wall_s, boot_s, boot_id))
            if age_s < 0:
                tx.run(
                    "UPDATE ib_pacing_holds SET wall_s = :wall_s, boot_s = :boot_s, boot_id = :boot_id WHERE token = :token",
                    token=token, wall_s=now.wall_s, boot_s=now.boot_s, boot_id=now.boot_id,
                )  # fmt: skip
                age_s = 0.0
            if age_s > max(seconds, PENALTY_MEMORY_S):
                tx.run("DELETE FROM ib_pacing_holds WHERE token = :token", token=token)
            else:
                holds.append((age_s, seconds, bool(is_penalty), reason))
        return holds

    # -- what becomes of a grant

    def _stamp_sent(self, grant: Grant) -> float:
        def body(tx: Transaction) -> float | None:
            now = tx.read_clock()
            found = tx.rows(
                "SELECT wall_s, boot_s, boot_id, is_sent FROM ib_pacing_requests WHERE token = :token",
                token=grant.token,
            )
            if not found:
                return None
            *stamp, is_sent = found[0]
            if not is_sent and now.age_of(Stamp(*stamp)) > GRANT_VALID_S:
                tx.run("DELETE FROM ib_pacing_requests WHERE token = :token", token=grant.token)
                return None
            self._restamp(tx, grant.token, now)
            tx.run("UPDATE ib_pacing_requests SET is_sent = 1 WHERE token = :token", token=grant.token)
            return now.wall_s

        sent_at_s = self._store.run(body)
        if sent_at_s is None:
            grant._is_over = True
            raise GrantExpired(
                f"leave to send was not used within {GRANT_VALID_S:.0f} s, or the pacing ledger was replaced",
                advice="Nothing was sent; ask again.",
            )
        return sent_at_s

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
    if isinstance(where, str) and "://" in where:
        return Ledger(PostgresStore(where, login, clock), login)
    return Ledger(SqliteStore(ledger_path(Path(where), login), login, clock or SystemClock()), login)
