"""The pacing ledger's rows at one instant: requests sent, waiters, pauses of all processes.

Works inside a transaction that `ledger.py` runs, which also decides; the tables are in `backends.py`. Ages come from two
clocks, see `clock.Reading.age_of`. Rows that no longer matter are deleted in passing.
"""

from __future__ import annotations

from typing import NamedTuple

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.backends import INSERT_PAUSE, Transaction, pause_parameters
from ktrdr_pipelines.ib.pacing.clock import Reading, Stamp
from ktrdr_pipelines.ib.pacing.rules import PENALTY_MEMORY_S, WINDOW_S, Ask, Entry
from ktrdr_pipelines.ib.pacing.shares import REMEMBERED_S
from ktrdr_pipelines.ib.processes import Owner, current_owner

GRANT_VALID_S = 10.0
"""A grant that is not used by then is void. Until it is stamped it counts as sent at this very moment, but no later than
that: nothing is sent afterwards, and a caller that was killed or forgot must not break the limit."""
LOOK_S = 0.5
"""A last look at the ledger before a write may be this old: so much later than `GRANT_VALID_S` a grant may still be sent."""
OPEN_MAX_S = WINDOW_S
"""An unanswered request stops counting as open after this long, if it was not marked as finished. Requests are given up after
120 s; those of a process that has died end with its socket, at once."""
TICKET_FRESH_S = 20.0
"""A waiter without a heartbeat for so long is passed over (stopped, or its machine asleep). It keeps its place."""
HEARTBEAT_S = 5.0
"""How often a waiter writes its heartbeat. Less often than it looks, because looking does not write to the disk."""

_STAMP = "wall_s = :wall_s, boot_s = :boot_s, boot_id = :boot_id"
_OWNED = "token, login, wall_s, boot_s, boot_id, host, pid, started"
_ASKED = "identity, contract, weight, work, waited_s"
_ASKED_VALUES = ":identity, :contract, :weight, :work, :waited_s"
_OWNED_VALUES = ":token, :login, :wall_s, :boot_s, :boot_id, :host, :pid, :started"


class Pause(NamedTuple):
    """A pause of all processes: when it began, how long it is or was, whether it follows a pacing answer of IB, and why."""

    age_s: float
    length_s: float
    is_penalty: bool
    reason: str

    @property
    def left_s(self) -> float:
        return self.length_s - self.age_s


class Waiter(NamedTuple):
    """A request that waits for its grant, for ``waited_s`` so far. ``is_fresh``: its process has shown itself lately."""

    token: str
    ask: Ask
    work: WorkClass
    waited_s: float
    owner: Owner
    is_fresh: bool


def _read_class(text: str) -> WorkClass:
    """The class of a row. One that a later version knows and this one does not goes with questions."""
    try:
        return WorkClass(text)
    except ValueError:
        return WorkClass.INTERACTIVE


class LedgerRows:
    """The rows of one login, at the time of the transaction."""

    def __init__(self, tx: Transaction, login: str) -> None:
        self._tx = tx
        self._login = login
        self.now: Reading = tx.read_clock()
        self._alive: dict[Owner, bool] = {}

    # -- requests

    def past(self) -> list[Entry]:
        """Every request that still matters, at its time on the wall clock of `now`."""
        entries: list[Entry] = []
        for (
            token,
            wall_s,
            boot_s,
            boot_id,
            host,
            pid,
            started,
            *asked,
            work,
            waited_s,
            is_sent,
            is_over,
        ) in self._tx.rows(
            f"SELECT token, wall_s, boot_s, boot_id, host, pid, started, {_ASKED}, is_sent, is_finished"
            " FROM ib_pacing_requests WHERE login = :login",
            login=self._login,
        ):
            age_s = self.now.age_of(Stamp(wall_s, boot_s, boot_id))
            if age_s < 0:
                # In the future: the clock was set back. Counted as sent now, and restamped, or it would stay for as long as
                # the clock was set back.
                self._restamp("requests", token)
                age_s = 0.0
            if not is_sent:
                age_s = max(age_s - GRANT_VALID_S - LOOK_S, 0.0)
            if age_s > REMEMBERED_S:
                self._tx.run("DELETE FROM ib_pacing_requests WHERE token = :token", token=token)
                continue
            is_open = not is_over and age_s <= OPEN_MAX_S and self._may_live(Owner(host, pid, started))
            entries.append(Entry(self.now.wall_s - age_s, Ask(*asked), is_open, _read_class(work), waited_s))
        return entries

    def add_request(
        self, token: str, ask: Ask, work: WorkClass, *, waited_s: float = 0.0, is_sent: bool = False
    ) -> None:
        """Add a grant, not used yet unless ``is_sent``."""
        self._tx.run(
            f"INSERT INTO ib_pacing_requests ({_OWNED}, {_ASKED}, is_sent, is_finished)"
            f" VALUES ({_OWNED_VALUES}, {_ASKED_VALUES}, :is_sent, 0)",
            **self._row(token, ask, work, waited_s), is_sent=int(is_sent),
        )  # fmt: skip

    def may_send(self, token: str) -> bool:
        """Whether the grant may be used now: still there, and either sent before (a delayed write) or not too old."""
        found = self._tx.rows(
            "SELECT wall_s, boot_s, boot_id, is_sent FROM ib_pacing_requests WHERE token = :token", token=token
        )
        if not found:
            return False
        *stamp, is_sent = found[0]
        if is_sent or self.now.age_of(Stamp(*stamp)) <= GRANT_VALID_S:
            return True
        self._tx.run("DELETE FROM ib_pacing_requests WHERE token = :token", token=token)
        return False

    def mark_sent(self, token: str, ask: Ask, work: WorkClass) -> None:
        """Stamp the request as sent just now; added if the ledger has no row of it any more."""
        self._restamp("requests", token)
        found = self._tx.rows("SELECT 1 FROM ib_pacing_requests WHERE token = :token", token=token)
        if found:
            self._tx.run("UPDATE ib_pacing_requests SET is_sent = 1 WHERE token = :token", token=token)
        else:  # the ledger was replaced, or the process stopped for very long, in the middle of the write
            self.add_request(token, ask, work, is_sent=True)

    def mark_finished(self, token: str, delay_s: float = 0.0) -> None:
        """The request is not open any more, and counts as sent ``delay_s`` later than its stamp."""
        self._tx.run(
            "UPDATE ib_pacing_requests SET is_finished = 1, wall_s = wall_s + :delay, boot_s = boot_s + :delay"
            " WHERE token = :token",
            token=token,
            delay=delay_s,
        )

    def delete_unsent(self, token: str) -> None:
        self._tx.run("DELETE FROM ib_pacing_requests WHERE token = :token AND is_sent = 0", token=token)

    # -- waiters

    def waiters(self, own: str | None = None) -> list[Waiter]:
        """All waiters in the order of their arrival. Tickets of dead processes are deleted, but never ``own``, the caller's."""
        found: list[Waiter] = []
        for token, wall_s, boot_s, boot_id, host, pid, started, *asked, work, waited_s in self._tx.rows(
            f"SELECT token, wall_s, boot_s, boot_id, host, pid, started, {_ASKED}"
            " FROM ib_pacing_tickets WHERE login = :login ORDER BY seq",
            login=self._login,
        ):
            age_s = self.now.age_of(Stamp(wall_s, boot_s, boot_id))
            owner = Owner(host, pid, started)
            if token != own and (age_s > WINDOW_S or not self._may_live(owner)):
                self.remove_ticket(token)
            else:
                is_fresh = age_s <= TICKET_FRESH_S
                found.append(Waiter(token, Ask(*asked), _read_class(work), waited_s + max(age_s, 0.0), owner, is_fresh))
        return found

    def show(self, ask: Ask, work: WorkClass, ticket: str) -> None:
        """Take a place at the end of the queue, or write the heartbeat of the one taken."""
        found = self._tx.rows(
            "SELECT wall_s, boot_s, boot_id FROM ib_pacing_tickets WHERE token = :token", token=ticket
        )
        if not found:
            self._tx.run(
                f"INSERT INTO ib_pacing_tickets ({_OWNED}, {_ASKED}, seq)"
                f" SELECT {_OWNED_VALUES}, {_ASKED_VALUES}, COALESCE(MAX(seq), 0) + 1 FROM ib_pacing_tickets",
                **self._row(ticket, ask, work, 0.0),
            )
            return
        age_s = self.now.age_of(Stamp(*found[0]))
        if not 0 <= age_s < HEARTBEAT_S:
            # The stamp is that of the heartbeat: what was waited before it is kept beside it.
            self._tx.run(
                "UPDATE ib_pacing_tickets SET waited_s = waited_s + :age_s WHERE token = :token",
                token=ticket, age_s=max(age_s, 0.0),
            )  # fmt: skip
            self._restamp("tickets", ticket)

    def remove_ticket(self, ticket: str) -> None:
        self._tx.run("DELETE FROM ib_pacing_tickets WHERE token = :token", token=ticket)

    # -- pauses

    def pauses(self) -> list[Pause]:
        """Every pause that has not ended, or that still lengthens the next one."""
        pauses: list[Pause] = []
        for token, wall_s, boot_s, boot_id, seconds, is_penalty, reason in self._tx.rows(
            "SELECT token, wall_s, boot_s, boot_id, seconds, is_penalty, reason FROM ib_pacing_holds WHERE login = :login",
            login=self._login,
        ):
            age_s = self.now.age_of(Stamp(wall_s, boot_s, boot_id))
            if age_s < 0:
                self._restamp("holds", token)
                age_s = 0.0
            if age_s > max(seconds, PENALTY_MEMORY_S):
                self._tx.run("DELETE FROM ib_pacing_holds WHERE token = :token", token=token)
            else:
                pauses.append(Pause(age_s, seconds, bool(is_penalty), reason))
        return pauses

    def add_pause(self, seconds: float, reason: str, *, is_penalty: bool) -> None:
        self._tx.run(INSERT_PAUSE, **pause_parameters(self._login, self.now, seconds, reason, is_penalty=is_penalty))

    # -- columns

    def _may_live(self, owner: Owner) -> bool:
        """Whether the process runs, or may run on another machine. Looked up once in a transaction."""
        if owner not in self._alive:
            self._alive[owner] = owner.is_alive() is not False
        return self._alive[owner]

    def _row(self, token: str, ask: Ask, work: WorkClass, waited_s: float) -> dict[str, object]:
        owner = current_owner()
        return {
            "token": token, "login": self._login,
            "wall_s": self.now.wall_s, "boot_s": self.now.boot_s, "boot_id": self.now.boot_id,
            "host": owner.host, "pid": owner.pid, "started": owner.started,
            "identity": ask.identity, "contract": ask.contract, "weight": ask.weight,
            "work": work.value, "waited_s": waited_s,
        }  # fmt: skip

    def _restamp(self, table: str, token: str) -> None:
        self._tx.run(
            f"UPDATE ib_pacing_{table} SET {_STAMP} WHERE token = :token",
            token=token, wall_s=self.now.wall_s, boot_s=self.now.boot_s, boot_id=self.now.boot_id,
        )  # fmt: skip
