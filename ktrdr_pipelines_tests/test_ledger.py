"""The ledger of the pacing budget: one transaction at a time, with real processes, killed ones, odd clocks and broken files."""

from __future__ import annotations

import ast
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrdr_pipelines.errors import InputError, StoreError
from ktrdr_pipelines.ib.clock import Reading, Stamp, SystemClock
from ktrdr_pipelines.ib.ledger import (
    GRANT_VALID_S,
    TICKET_FRESH_S,
    Grant,
    GrantExpired,
    Ledger,
    WaitCancelled,
    ledger_path,
    open_ledger,
)
from ktrdr_pipelines.ib.pacing import PENALTIES_S, Ask, Rule, Wait, bars_ask
from ktrdr_pipelines_tests.ledger_worker import LOGIN, FastClock

ROOT = Path(__file__).parents[1]
FULL_S = 600.5


class HandClock:
    """Wall and boot clock moved by the test."""

    def __init__(self, wall_s: float = 1_700_000_000.0, boot_s: float = 50_000.0, boot_id: str = "boot 1") -> None:
        self.wall_s, self.boot_s, self.boot_id = wall_s, boot_s, boot_id

    def now_s(self) -> float:
        return self.wall_s

    def read(self) -> Reading:
        return Reading(self.wall_s, self.boot_s, self.boot_id)

    def sleep(self, seconds: float) -> None:
        self.wall_s += seconds
        self.boot_s += seconds

    def reboot(self, uptime_s: float, wall_step_s: float) -> None:
        self.boot_id, self.boot_s = self.boot_id + "'", uptime_s
        self.wall_s += wall_step_s


_numbers = itertools.count()


def wish(contract: str = "", end: str = "", *, show: str = "TRADES") -> Ask:
    """A request like no other, unless told."""
    number = next(_numbers)
    return bars_ask(
        contract=contract or f"C{os.getpid()}-{number}", exchange="SMART", what_to_show=show, bar_size="1 hour", duration="1 M",
        end=end or f"e{number}", use_rth=True,
    )  # fmt: skip


def send(ledger: Ledger, ask: Ask | None = None) -> None:
    """Send one request that has to be allowed now."""
    answer = ledger.try_acquire(ask or wish())
    assert isinstance(answer, Grant), answer
    with answer:
        answer.sent()


def fill(ledger: Ledger, count: int = 60) -> None:
    for _ in range(count):
        send(ledger)


def wait_of(ledger: Ledger, ask: Ask | None = None) -> Wait:
    answer = ledger.try_acquire(ask or wish())
    assert isinstance(answer, Wait), "granted too early"
    return answer


def poll(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.005)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: HandClock) -> Iterator[Ledger]:
    opened = open_ledger(tmp_path, LOGIN, clock)
    yield opened
    opened.close()


# -- grants


def test_the_budget_is_shared_by_everyone_who_opens_it(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """Sixty requests through one opening of the file leave nothing for another; another login has its own sixty."""
    fill(ledger, 59)
    other = open_ledger(tmp_path, LOGIN, clock)
    send(other)
    assert wait_of(other).rule is Rule.WINDOW
    assert wait_of(ledger).seconds == pytest.approx(FULL_S, abs=0.1)
    send(open_ledger(tmp_path, "127.0.0.1:7496", clock))
    clock.sleep(FULL_S + 0.1)
    send(other)


def test_the_budget_survives_restarts(tmp_path: Path, clock: HandClock) -> None:
    """A program that ends and starts again does not forget what was sent."""
    first = open_ledger(tmp_path, LOGIN, clock)
    fill(first)
    first.close()
    assert wait_of(open_ledger(tmp_path, LOGIN, clock)).rule is Rule.WINDOW


def test_the_time_of_sending_counts_not_that_of_the_grant(ledger: Ledger, clock: HandClock) -> None:
    """A request written nine seconds after its grant fills the budget from then on."""
    grant = ledger.try_acquire(wish())
    assert isinstance(grant, Grant)
    clock.sleep(9)
    assert grant.sent() == clock.now_s()
    grant.finished()
    fill(ledger, 59)
    clock.sleep(FULL_S - 5)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(5.1)
    send(ledger)


def test_a_write_that_took_long_is_stamped_again(ledger: Ledger, clock: HandClock) -> None:
    """After a slow write the later time stands, even when the grant alone would have expired by then."""
    grant = ledger.try_acquire(wish("A", "x"))
    assert isinstance(grant, Grant)
    grant.sent()
    clock.sleep(GRANT_VALID_S + 5)
    grant.sent()
    clock.sleep(1)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(14.5, abs=0.01)


def test_a_grant_not_used_in_time_is_void_and_costs_nothing(ledger: Ledger, clock: HandClock) -> None:
    """A process that slept between grant and write must not send, and its unit is free again."""
    grant = ledger.try_acquire(wish())
    assert isinstance(grant, Grant)
    clock.sleep(GRANT_VALID_S + 0.1)
    with pytest.raises(GrantExpired, match="not used within"), grant:
        grant.sent()
    assert ledger.snapshot().used == 0


def test_an_unused_grant_may_still_be_sent_at_any_moment(ledger: Ledger, clock: HandClock) -> None:
    """Until it is void, a grant counts as sent just now; afterwards, should its owner be gone, as sent at the last moment."""
    ledger.try_acquire(wish("A", "x"))
    clock.sleep(8)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(15.5, abs=0.01)
    clock.sleep(3)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(14.5, abs=0.01)


def test_a_grant_given_back_costs_nothing(ledger: Ledger) -> None:
    """Leaving the block without having sent returns the unit; having sent keeps it and closes the request."""
    with ledger.try_acquire(wish()):  # type: ignore[union-attr]
        assert ledger.snapshot().used == 1
    assert ledger.snapshot().used == 0
    with pytest.raises(ZeroDivisionError), ledger.acquire(wish()) as grant:
        grant.sent()
        assert ledger.snapshot().open == 1
        raise ZeroDivisionError
    budget = ledger.snapshot()
    assert (budget.used, budget.open) == (1, 0)


def test_at_most_fifty_are_open(ledger: Ledger, clock: HandClock) -> None:
    """Fifty unanswered requests keep the next one waiting until one of them is finished, or ten minutes have passed."""
    grants = [ledger.acquire(wish()) for _ in range(50)]
    for grant in grants:
        grant.sent()
    assert wait_of(ledger).rule is Rule.OPEN
    grants[3].finished()
    send(ledger)
    ledger.acquire(wish()).sent()
    clock.sleep(599)
    assert wait_of(ledger).rule is Rule.OPEN
    clock.sleep(2)
    send(ledger)


@pytest.mark.slow
def test_open_requests_of_a_killed_process_are_closed(tmp_path: Path) -> None:
    """IB drops what a dead process had asked: fifty open requests of one do not block the living."""
    code = (
        "import sys, pathlib; from ktrdr_pipelines.ib.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.test_ledger import wish, LOGIN;"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN);"
        "[ledger.acquire(wish()).sent() for _ in range(50)]; print('open', flush=True); sys.stdin.read()"
    )
    ledger = open_ledger(tmp_path, LOGIN)
    with start_python("-c", code, tmp_path) as child:
        assert child.stdout.readline() == b"open\n"
        assert wait_of(ledger).rule is Rule.OPEN
        child.kill()
        child.wait()
    send(ledger)


# -- waiting


def test_waiting_sleeps_exactly_as_long_as_needed(ledger: Ledger, clock: HandClock) -> None:
    """A waiter wakes when the budget is free, tells its wait once per change, and knows how long it was."""
    fill(ledger)
    began = clock.now_s()
    told: list[tuple[float, Rule, float]] = []
    grant = ledger.acquire(wish(), sleep=clock.sleep, on_wait=lambda *wait: told.append(wait))
    assert clock.now_s() - began == pytest.approx(FULL_S, abs=0.05)
    assert grant.waited_s == pytest.approx(FULL_S, abs=0.05)
    assert [rule for _, rule, _ in told] == [Rule.WINDOW]
    assert told[0][2] == pytest.approx(began + FULL_S, abs=0.05)


def test_waiting_can_be_cancelled_and_leaves_no_place_behind(ledger: Ledger, clock: HandClock) -> None:
    """A cancelled or interrupted waiter leaves the queue at once."""
    fill(ledger)
    calls = itertools.count()
    with pytest.raises(WaitCancelled):
        ledger.acquire(wish(), sleep=clock.sleep, cancel=lambda: next(calls) > 3)

    def interrupt(_: float) -> None:
        assert ledger.snapshot().waiting == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.acquire(wish(), sleep=interrupt)
    assert ledger.snapshot().waiting == 0


def while_waiting(ledger: Ledger, clock: HandClock, ask: Ask, visit: Callable[[], None]) -> Grant:
    """Acquire ``ask``; ``visit`` is called after every sleep, when the waiter has not looked again yet."""

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        visit()

    return ledger.acquire(ask, sleep=sleep)


def test_nobody_overtakes_one_who_waits_for_the_budget(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """A newcomer gets nothing that an earlier waiter could use, at any moment of its wait, even the one at which it is free."""
    fill(ledger)
    newcomer = open_ledger(tmp_path, LOGIN, clock)
    visits: list[Rule] = []
    grant = while_waiting(ledger, clock, wish(), lambda: visits.append(wait_of(newcomer).rule))
    assert set(visits) == {Rule.WINDOW, Rule.TURN}
    grant.sent()
    send(newcomer)


def test_a_heavy_request_is_not_starved_by_light_ones(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """Two units for a BID_ASK request come together although single ones are wanted all the time."""
    for _ in range(60):
        send(ledger)
        clock.sleep(5)
    began = clock.now_s()
    newcomer = open_ledger(tmp_path, LOGIN, clock)
    while_waiting(ledger, clock, wish(show="BID_ASK"), lambda: wait_of(newcomer) and None)
    # The first sixty went out five seconds apart from 300 s ago on: the second of them leaves the window after 305.5 s.
    assert clock.now_s() - began == pytest.approx(305.5, abs=0.1)


def test_one_may_overtake_who_delays_nobody(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """Whoever waits for its own twin does not hold up others, and they do not take the unit that it will need."""
    fill(ledger, 55)
    send(ledger, wish("A", "x"))
    newcomer = open_ledger(tmp_path, LOGIN, clock)
    granted: list[float] = []

    def visit() -> None:
        answer = newcomer.try_acquire(wish())
        if isinstance(answer, Grant):
            answer.sent()
            answer.finished()
            granted.append(clock.now_s())

    began = clock.now_s()
    grant = while_waiting(ledger, clock, wish("A", "x"), visit)
    assert clock.now_s() - began == pytest.approx(15.5, abs=0.05)
    assert len(granted) == 3, "60 - 56 sent - 1 reserved"
    grant.sent()
    assert ledger.snapshot().used == 60


def test_a_stopped_waiter_is_passed_over_but_keeps_its_place(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """Others go on while a waiter does not show itself; when it does, it is first again."""
    fill(ledger)
    newcomer = open_ledger(tmp_path, LOGIN, clock)
    stopped = iter([True])

    def sleep(seconds: float) -> None:
        if next(stopped, False):
            clock.sleep(FULL_S - 1)
            assert "1 waiting" not in wait_of(newcomer).reason
            assert newcomer.snapshot().waiting == 0
        else:
            assert newcomer.snapshot().waiting == 1
            clock.sleep(seconds)

    assert TICKET_FRESH_S < FULL_S - 1
    ledger.acquire(wish(), sleep=sleep)


def test_waiters_are_served_in_the_order_of_their_arrival(tmp_path: Path, clock: HandClock) -> None:
    """Of three who wait for a full budget, the one who came first gets the first unit that is free, and so on."""
    ledger = open_ledger(tmp_path, LOGIN, clock)
    for _ in range(3):
        send(ledger)
        clock.sleep(15)
    fill(ledger, 57)
    order: list[str] = []
    over = threading.Event()

    def wait_for_turn(name: str) -> None:
        own = open_ledger(tmp_path, LOGIN, clock)
        with own.acquire(wish(), sleep=lambda _: over.wait(0.002)) as grant:
            grant.sent()
            order.append(name)
        own.close()

    threads = [threading.Thread(target=wait_for_turn, args=(name,)) for name in "abc"]
    for number, thread in enumerate(threads):
        thread.start()
        poll(lambda seen=number: ledger.snapshot().waiting == seen + 1)
    clock.sleep(FULL_S - 45)
    poll(lambda: ledger.snapshot().waiting == 3)  # all have shown themselves since the clock jumped
    for number in range(3):
        clock.sleep(15.1 if number else 0.1)
        poll(lambda seen=number: len(order) == seen + 1)
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c"]
    ledger.close()


# -- pauses


def test_a_pacing_answer_makes_everybody_wait(ledger: Ledger, tmp_path: Path, clock: HandClock) -> None:
    """After IB complained nobody sends for 15 s, for longer when it complains again, and for 15 s again after a quiet time."""
    other = open_ledger(tmp_path, LOGIN, clock)
    for expected in (*PENALTIES_S, PENALTIES_S[-1]):
        assert ledger.penalise("code 162, pacing") == expected
        answer = wait_of(other)
        assert (answer.rule, answer.reason) == (Rule.HOLD, "code 162, pacing")
        assert answer.seconds == pytest.approx(expected)
        clock.sleep(expected)
        send(other)
    clock.sleep(1201)
    assert ledger.penalise("again") == PENALTIES_S[0]


def test_complaints_about_one_event_pause_once(ledger: Ledger, clock: HandClock) -> None:
    """Ten requests refused together are one event: the pause neither grows nor moves."""
    assert ledger.penalise("pacing") == 15.0
    clock.sleep(5)
    for _ in range(9):
        assert ledger.penalise("pacing") == pytest.approx(10.0)
    clock.sleep(10)
    send(ledger)


def test_a_pause_of_given_length_neither_counts_nor_is_shortened(ledger: Ledger, clock: HandClock) -> None:
    """A competing session pauses for as long as the caller says; a pacing answer in it does not end it earlier."""
    assert ledger.penalise("competing session", 60) == 60
    assert ledger.penalise("pacing") == 15.0
    clock.sleep(30)
    assert wait_of(ledger).seconds == pytest.approx(30)
    assert [(hold.until_s - clock.now_s(), hold.reason) for hold in ledger.snapshot().holds] == [
        (30, "competing session")
    ]


def test_the_snapshot_tells_people_the_state(ledger: Ledger, clock: HandClock) -> None:
    """Used, limit, open, next free moment and pauses are what the rules make of them; an empty ledger is free at once."""
    empty = ledger.snapshot()
    assert (empty.used, empty.limit, empty.next_free_at_s, empty.holds) == (0, 60, clock.now_s(), ())
    send(ledger, wish(show="BID_ASK"))
    clock.sleep(100)
    fill(ledger, 58)
    full = ledger.snapshot()
    assert (full.used, full.open, full.waiting) == (60, 0, 0)
    assert full.next_free_at_s == pytest.approx(clock.now_s() + FULL_S - 100, abs=0.01)


# -- clocks


def test_a_clock_set_back_neither_hurries_nor_stops(ledger: Ledger, clock: HandClock) -> None:
    """With the wall clock an hour back the budget is free again after ten minutes: not before, and not after an hour."""
    fill(ledger)
    clock.wall_s -= 3600
    clock.sleep(FULL_S - 1)
    assert wait_of(ledger).seconds == pytest.approx(1, abs=0.01)
    clock.sleep(1.01)
    send(ledger)


def test_a_clock_set_forward_frees_nothing(ledger: Ledger, clock: HandClock) -> None:
    """With the wall clock two hours ahead the budget stays used for the rest of the ten minutes, and a pause lasts."""
    fill(ledger)
    ledger.penalise("pacing", 700)
    clock.wall_s += 7200
    clock.sleep(FULL_S - 1)
    assert ledger.snapshot().used == 60
    clock.sleep(2)
    assert wait_of(ledger).rule is Rule.HOLD
    clock.sleep(100)
    send(ledger)


@pytest.mark.parametrize("wall_step_s", [60, 7200, -3600])
def test_a_reboot_frees_nothing_early(ledger: Ledger, clock: HandClock, wall_step_s: float) -> None:
    """After a restart of the machine, whatever its wall clock says, what was sent counts ten minutes and not much longer."""
    fill(ledger)
    clock.reboot(uptime_s=30, wall_step_s=wall_step_s)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(500)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(FULL_S - 499)
    send(ledger)


def test_without_a_boot_clock_a_time_in_the_future_counts_as_now(tmp_path: Path) -> None:
    """Where only the wall clock exists and it was set back, the budget is free ten minutes later, not an hour."""
    clock = HandClock(boot_id="")
    ledger = open_ledger(tmp_path, LOGIN, clock)
    fill(ledger)
    clock.wall_s -= 3600
    assert wait_of(ledger).seconds == pytest.approx(FULL_S, abs=0.01)
    clock.sleep(FULL_S + 0.01)
    send(ledger)


def test_the_real_clock_moves_and_knows_its_boot() -> None:
    """Two readings of the machine's clock are in order, in one boot, and near the wall clock."""
    clock = SystemClock()
    first, second = clock.read(), clock.read()
    assert 0 <= second.age_of(first) < 5
    assert abs(clock.now_s() - time.time()) < 5
    assert first.boot_id == second.boot_id
    assert second.age_of(Stamp(first.wall_s - 100, 0.0, "another boot")) <= 100 + 5


# -- the file


DAMAGE = {
    "deleted": lambda path: [p.unlink() for p in path.parent.glob(path.name + "*") if not p.name.endswith(".lock")],
    "database deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is not a database\n" * 500),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "holes": lambda path: path.write_bytes(b"".join(
        bytes(64) if i % 3 else path.read_bytes()[i * 64 : i * 64 + 64] for i in range(path.stat().st_size // 64))),
}  # fmt: skip


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "in use"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_lost_or_damaged_file_never_makes_requests_faster(
    tmp_path: Path, clock: HandClock, damage: str, is_open: bool
) -> None:
    """Whatever happens to the file, nobody sends before the ten minutes are over; then everybody does, with one budget."""
    path = ledger_path(tmp_path, LOGIN)
    first, second = (open_ledger(tmp_path, LOGIN, clock) for _ in range(2))
    fill(first)
    wait_of(second)
    if not is_open:
        first.close()
        second.close()
    clock.sleep(10)
    DAMAGE[damage](path)
    for ledger in (first, second, open_ledger(tmp_path, LOGIN, clock)):
        wait = wait_of(ledger)
        assert wait.seconds >= FULL_S - 10 - 0.01
    clock.sleep(FULL_S)
    fill(first, 30)
    fill(second, 30)
    assert wait_of(first).rule is Rule.WINDOW


def test_a_damaged_file_is_kept_and_the_pause_explained(tmp_path: Path, clock: HandClock) -> None:
    """What is no database is moved aside, byte for byte, and people are told why everything waits."""
    path = ledger_path(tmp_path, LOGIN)
    ledger = open_ledger(tmp_path, LOGIN, clock)
    fill(ledger)
    ledger.close()
    path.write_text("precious?")
    assert "damaged" in wait_of(ledger).reason
    (kept,) = tmp_path.glob("*.corrupt-*")
    assert kept.read_text() == "precious?"


def test_the_first_start_does_not_wait(tmp_path: Path, clock: HandClock) -> None:
    """Where no ledger ever was, and its directory neither, the whole budget is there."""
    fill(open_ledger(tmp_path / "a" / "b", LOGIN, clock))


def test_an_unusable_directory_is_one_clear_error(tmp_path: Path, clock: HandClock) -> None:
    """Where no file can be made, nothing is granted, and the error says where and what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"pacing ledger .*no request was sent") as caught:
        open_ledger(tmp_path / "file" / "deeper", LOGIN, clock).try_acquire(wish())
    assert caught.value.advice
    ledger_path(tmp_path, LOGIN).mkdir()
    with pytest.raises(StoreError, match="pacing ledger"):
        open_ledger(tmp_path, LOGIN, clock).try_acquire(wish())


@pytest.mark.slow
def test_a_full_disk_grants_nothing(tmp_path: Path) -> None:
    """When the ledger cannot be written the answer is an error, never a grant; once there is room again all goes on."""
    code = (
        "import resource, sys, pathlib; from ktrdr_pipelines.ib.ledger import open_ledger;"
        "from ktrdr_pipelines.errors import StoreError; from ktrdr_pipelines_tests.test_ledger import wish, fill, LOGIN\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN); fill(ledger, 10)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "for _ in range(3):\n"
        "    try: print('granted', ledger.acquire(wish()))\n"
        "    except StoreError as error: print('refused:', error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(ledger.snapshot().used); fill(ledger, 50); print(ledger.snapshot().used)\n"
    )
    with start_python("-c", code, tmp_path) as child:
        *refusals, before, after = child.stdout.read().decode().splitlines()
    assert len(refusals) == 3
    assert all(line.startswith("refused: pacing ledger") for line in refusals), refusals
    assert (before, after) == ("10", "60")


@pytest.mark.slow
def test_a_process_killed_inside_a_transaction_frees_it_at_once(tmp_path: Path) -> None:
    """After kill -9 in the middle of a decision the next one is made within a second, and the half one is undone."""
    code = (
        "import sys, pathlib; from ktrdr_pipelines.ib.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.test_ledger import wish, LOGIN\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN)\n"
        "def body(tx):\n"
        "    ledger._decide(tx, wish(), None); print('inside', flush=True); sys.stdin.read()\n"
        "ledger._store.run(body)\n"
    )
    ledger = open_ledger(tmp_path, LOGIN)
    send(ledger)
    with start_python("-c", code, tmp_path) as child:
        assert child.stdout.readline() == b"inside\n"
        child.kill()
        began = time.monotonic()
        send(ledger)
        assert time.monotonic() - began < 1.0
        child.wait()
    assert ledger.snapshot().used == 2


@pytest.mark.slow
def test_a_forked_child_uses_a_connection_of_its_own(tmp_path: Path) -> None:
    """A fork in the middle of another thread's transaction leaves a child that can send, and both count together."""
    code = (
        "import os, sys, pathlib; from ktrdr_pipelines.ib.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.test_ledger import fill, send, wait_of, LOGIN\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN); fill(ledger, 30)\n"
        "mutex = ledger._store._mutex; mutex.acquire(); child = os.fork()\n"  # as another thread would hold it
        "if child: mutex.release()\n"
        "fill(ledger, 15)\n"
        "if child: os.waitpid(child, 0); print(ledger.snapshot().used, wait_of(ledger).rule.name)\n"
    )
    with start_python("-c", code, tmp_path) as child:
        try:
            assert child.communicate(timeout=20)[0] == b"60 WINDOW\n"
        finally:
            child.kill()


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    """Eight threads on one object get sixty grants together and not one more."""
    grants: list[Grant] = []

    def work() -> None:
        for _ in range(10):
            answer = ledger.try_acquire(wish())
            if isinstance(answer, Grant):
                answer.sent()
                answer.finished()
                grants.append(answer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grants) == 60


def test_old_rows_do_not_pile_up(tmp_path: Path, clock: HandClock) -> None:
    """A ledger in use for months stays as small as ten minutes of it."""
    ledger = open_ledger(tmp_path, LOGIN, clock)
    for _ in range(150):
        ledger.acquire(wish(), sleep=clock.sleep).sent()
        ledger.penalise("a competing session", 5)
        clock.sleep(40)
    ledger.close()
    with sqlite3.connect(ledger_path(tmp_path, LOGIN)) as raw:
        assert raw.execute("SELECT count(*) FROM ib_pacing_requests").fetchone()[0] <= 60
        assert raw.execute("SELECT count(*) FROM ib_pacing_holds").fetchone()[0] <= 60
        assert raw.execute("SELECT count(*) FROM ib_pacing_tickets").fetchone()[0] == 0
    raw.close()


@pytest.mark.parametrize(
    ("login", "name"),
    [
        ("127.0.0.1:4002", "ib_pacing_127.0.0.1_4002.db"),
        ("DU1234567", "ib_pacing_DU1234567.db"),
    ],
)
def test_each_login_has_a_file_that_people_recognise(login: str, name: str) -> None:
    """The usual logins are readable in the file name."""
    assert ledger_path(Path("x"), login) == Path("x") / name


def test_odd_logins_neither_share_a_file_nor_leave_the_directory() -> None:
    """Whatever a login is called, its file lies in the directory, bears a usable name, and is its own."""
    logins = ["a/b", "a_b", "../a", "a" * 300, "a" * 301, "ä:1", "ö:1", ""]
    paths = [ledger_path(Path("x"), login) for login in logins]
    assert len(set(paths)) == len(logins)
    assert all(path.parent == Path("x") and len(path.name) < 100 for path in paths)


# -- many processes


def start_python(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def count_violations(sent: list[tuple[float, str, str, int]]) -> list[str]:
    """Every breach of the specification's rules in a log of (time, identity, contract, weight), by sliding each window along."""
    found: list[str] = []
    sent = sorted(sent)
    for number, (at, identity, contract, _) in enumerate(sent):
        before = [row for row in sent[: number + 1] if at - row[0] <= 600]
        if sum(row[3] for row in before) > 60:
            found.append(f"{sum(row[3] for row in before)} units in ten minutes")
        if sum(row[3] for row in before if row[2] == contract and at - row[0] <= 2) >= 6:
            found.append("six of one contract in two seconds")
        if sum(row[1] == identity and at - row[0] < 15 for row in before) > 1:
            found.append("identical within 15 seconds")
    return found


def run_trial(
    directory: Path, *, processes: int, windows: float, speed: float, killed: int, stopped: int
) -> list[list]:
    """Let processes send for ``windows`` times ten minutes of the fast clock; kill and stop some on the way. Logs per process."""
    clock = FastClock(speed)
    logs = [directory / f"{number}.log" for number in range(processes)]
    worker = ("-m", "ktrdr_pipelines_tests.ledger_worker", directory)
    children = [start_python(*worker, log, speed, number + 1) for number, log in enumerate(logs)]
    try:
        for child in children:
            assert child.stdout.readline() == b"ready\n"
        began_s = clock.now_s()
        for child in children:
            child.stdin.write(f"{began_s + windows * FULL_S}\n".encode())
            child.stdin.flush()
        poll(lambda: clock.now_s() >= began_s + 0.5 * FULL_S)
        for child in children[:killed]:
            child.kill()
        for child in children[killed : killed + stopped]:
            child.send_signal(signal.SIGSTOP)
        poll(lambda: clock.now_s() >= began_s + 0.8 * FULL_S)
        for child in children[killed : killed + stopped]:
            child.send_signal(signal.SIGCONT)
        codes = [child.wait(30) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert codes == [-signal.SIGKILL] * killed + [0] * (processes - killed)
    return [
        [(float(a), float(b), float(c), ast.literal_eval(i), ast.literal_eval(k), int(w)) for a, b, c, i, k, w in
         (line.split("\t") for line in log.read_text().splitlines())]
        for log in logs
    ]  # fmt: skip


@pytest.mark.slow
def test_many_processes_break_no_rule_and_use_the_budget(tmp_path: Path) -> None:
    """Six processes, two killed and one stopped for a while: not one breach, the budget used to the full, and fairly shared."""
    logs = run_trial(tmp_path, processes=6, windows=3.4, speed=200.0, killed=2, stopped=1)
    assert all(before <= stamp <= after for log in logs for stamp, before, after, *_ in log), (
        "stamps are not the time sent"
    )
    sent = [(stamp, identity, contract, weight) for log in logs for stamp, _, _, identity, contract, weight in log]
    assert count_violations(sent) == []
    units = sum(weight for *_, weight in sent)
    # Four times sixty. Lost may be what the killed and stopped ones were about to send, and one unit a window beside a heavy one.
    assert 240 - 15 <= units <= 240
    # In the first window whoever has started first finds nobody waiting, in the second one process is stopped.
    settled_s = min(sent)[0] + 1.9 * FULL_S
    shares = [sum(stamp >= settled_s for stamp, *_ in log) for log in logs[2:]]
    # A hiccup of the disk of a tenth of a second looks like twenty on this clock: a rough measure; order has a test of its own.
    assert min(shares) >= 0.3 * max(shares), shares


# -- PostgreSQL


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A throw-away cluster that listens on a socket file only."""
    import pwd
    import shutil
    import tempfile

    initdb = shutil.which("initdb")
    assert initdb, "this test needs PostgreSQL's programs (initdb, postgres) on PATH: install postgresql 15 or newer"
    programs = Path(initdb).resolve().parent
    # Not below tmp_path: a socket's path has to be short, and readable for the user the server runs as.
    base = Path(tempfile.mkdtemp(prefix="pg"))
    user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("nobody")
        os.chown(base, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    subprocess.run(
        [programs / "initdb", "-D", base / "data", "-U", "ktrdr", "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True, stdout=subprocess.DEVNULL, cwd=base, **user,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", base / "data", "-k", base, "-c", "listen_addresses=", "-F"],
        cwd=base, stderr=subprocess.DEVNULL, **user,
    )  # fmt: skip
    try:
        ready = [programs / "pg_isready", "-q", "-h", base, "-U", "ktrdr", "-d", "postgres"]
        poll(lambda: subprocess.run(ready, check=False).returncode == 0)
        yield f"postgresql+psycopg://ktrdr@/postgres?host={base}"
    finally:
        server.send_signal(signal.SIGINT)  # end now, not when the last client has gone
        server.wait(20)
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.slow
def test_postgresql_holds_the_same_budget(postgres_url: str) -> None:
    """In a database every opening and every thread shares one budget per login, with the server's clock."""
    ledgers = [open_ledger(postgres_url, LOGIN) for _ in range(4)]
    threads = [threading.Thread(target=fill, args=(ledger, 15)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wait_of(ledgers[0]).rule is Rule.WINDOW
    budget = ledgers[1].snapshot()
    assert (budget.used, budget.open) == (60, 0)
    assert abs(budget.now_s - time.time()) < 60
    another = open_ledger(postgres_url, "another login")
    send(another)
    assert ledgers[2].penalise("pacing") == 15.0
    assert wait_of(ledgers[3]).rule is Rule.WINDOW
    for ledger in (*ledgers, another):
        ledger.close()


@pytest.mark.slow
def test_postgresql_waits_and_clocks_are_those_of_the_file(postgres_url: str, clock: HandClock) -> None:
    """Waiting, giving back and a clock set back behave in the database as in the file."""
    ledger = open_ledger(postgres_url, "clocks", clock)
    fill(ledger)
    clock.wall_s -= 3600
    began = clock.boot_s
    with ledger.acquire(wish(show="BID_ASK"), sleep=clock.sleep) as grant:
        assert clock.boot_s - began == pytest.approx(FULL_S, abs=0.05)
        assert grant.waited_s == pytest.approx(FULL_S, abs=0.05)
    assert ledger.snapshot().used == 0
    ledger.close()


@pytest.mark.slow
def test_a_database_that_is_gone_grants_nothing(postgres_url: str) -> None:
    """No server: a clear StoreError, and no grant."""
    ledger = open_ledger(postgres_url.replace("host=", "host=/nowhere"), LOGIN)
    with pytest.raises(StoreError, match="pacing ledger in PostgreSQL"):
        ledger.try_acquire(wish())
    ledger.close()


@pytest.mark.parametrize("url", ["mysql://x@y/z", "postgresql+nodriver://x@y/z", "sqlite:///x.db", "nonsense://"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    """Anything but PostgreSQL, and a missing driver, is told at once, with what to write instead."""
    with pytest.raises(InputError) as caught:
        open_ledger(url, LOGIN)
    assert "PostgreSQL" in caught.value.advice or "postgresql+psycopg" in caught.value.advice
