"""The ledger of the pacing budget: grants, the queue of those who wait, pauses, and odd clocks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.clock import Reading, Stamp, SystemClock
from ktrdr_pipelines.ib.pacing.ledger import (
    Grant,
    GrantExpired,
    Ledger,
    WaitCancelled,
)
from ktrdr_pipelines.ib.pacing.ledger_rows import GRANT_VALID_S, TICKET_FRESH_S
from ktrdr_pipelines.ib.pacing.rules import BURST_MARGIN_S, BURST_S, MOST_DELAY_S, PENALTIES_S, Ask, Rule, Wait
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import (
    FULL_S,
    RULES_ONLY,
    HandClock,
    OpenHere,
    fill,
    poll,
    send,
    start_python,
    wait_of,
    wish,
)
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import LOGIN

# -- grants


def test_the_budget_is_shared_by_everyone_who_opens_it(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """Sixty requests through one opening of the file leave nothing for another; another login has its own sixty."""
    fill(ledger, 59)
    other = open_here(tmp_path, LOGIN, clock)
    send(other)
    assert wait_of(other).rule is Rule.WINDOW
    assert wait_of(ledger).seconds == pytest.approx(FULL_S, abs=0.1)
    send(open_here(tmp_path, "127.0.0.1:7496", clock))
    clock.sleep(FULL_S + 0.1)
    send(other)


def test_the_budget_survives_restarts(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """A program that ends and starts again does not forget what was sent."""
    first = open_here(tmp_path, LOGIN, clock)
    fill(first)
    first.close()
    assert wait_of(open_here(tmp_path, LOGIN, clock)).rule is Rule.WINDOW


def test_the_time_of_sending_counts_not_that_of_the_grant(ledger: Ledger, clock: HandClock) -> None:
    """A request written nine seconds after its grant fills the budget from then on."""
    grant = ledger.try_acquire(wish(), work=RULES_ONLY)
    assert isinstance(grant, Grant)
    clock.sleep(9)
    assert grant.sent() == clock.now_s()
    grant.finished()
    fill(ledger, 59)
    clock.sleep(FULL_S - 5)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(5.1)
    send(ledger)


def test_a_write_that_took_long_counts_from_its_end(ledger: Ledger, clock: HandClock) -> None:
    """A process stopped in the middle of the write may have sent at any moment of it: the last one counts, expired or not."""
    grant = ledger.acquire(wish("A", "x"), work=RULES_ONLY)
    with grant.sending():
        clock.sleep(8)
        assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(15.1, abs=0.01)
        clock.sleep(FULL_S)
        assert isinstance(ledger.try_acquire(wish("A", "other"), work=RULES_ONLY), Grant), (
            "a stopped process blocks no other for long"
        )
    clock.sleep(1)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(14.1, abs=0.01)


def test_a_write_that_failed_may_have_arrived(ledger: Ledger) -> None:
    """An error of the socket does not show what the gateway has read: the request counts."""
    with pytest.raises(ConnectionError), ledger.acquire(wish(), work=RULES_ONLY) as grant, grant.sending():
        raise ConnectionError
    assert (ledger.snapshot().used, ledger.snapshot().open) == (1, 0)


def test_a_process_stopped_between_its_last_look_and_the_write_does_not_send(
    open_here: OpenHere, tmp_path: Path
) -> None:
    """A look at the ledger that took long is out of date: it is repeated, and then the grant is too old."""

    class StoppingClock(HandClock):
        reads = -100

        def read(self) -> Reading:
            self.reads += 1
            if self.reads == 3:  # before the look, in it, and now after it
                self.sleep(GRANT_VALID_S + 1)
            return super().read()

    clock = StoppingClock()
    ledger = open_here(tmp_path, LOGIN, clock)
    grant = ledger.acquire(wish(), work=RULES_ONLY)
    clock.reads = 0
    with pytest.raises(GrantExpired), grant.sending():
        pytest.fail("sent")
    assert ledger.snapshot().used == 0


def test_a_grant_not_used_in_time_is_void_and_costs_nothing(ledger: Ledger, clock: HandClock) -> None:
    """A process that slept between grant and write must not send, and its unit is free again."""
    grant = ledger.try_acquire(wish(), work=RULES_ONLY)
    assert isinstance(grant, Grant)
    clock.sleep(GRANT_VALID_S + 0.1)
    with pytest.raises(GrantExpired, match="not used within"), grant:
        grant.sent()
    assert ledger.snapshot().used == 0


def test_an_unused_grant_may_still_be_sent_at_any_moment(ledger: Ledger, clock: HandClock) -> None:
    """Until it is void, a grant counts as sent just now; afterwards, should its owner be gone, as sent at the last moment."""
    ledger.try_acquire(wish("A", "x"), work=RULES_ONLY)
    clock.sleep(8)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(15.1, abs=0.01)
    clock.sleep(3)
    assert wait_of(ledger, wish("A", "x")).seconds == pytest.approx(14.6, abs=0.01)


def test_a_grant_given_back_costs_nothing(ledger: Ledger) -> None:
    """Leaving the block without having sent returns the unit; having sent keeps it and closes the request."""
    with ledger.try_acquire(wish(), work=RULES_ONLY):  # type: ignore[union-attr]
        assert ledger.snapshot().used == 1
    assert ledger.snapshot().used == 0
    with pytest.raises(ZeroDivisionError), ledger.acquire(wish(), work=RULES_ONLY) as grant:
        grant.sent()
        assert ledger.snapshot().open == 1
        raise ZeroDivisionError
    budget = ledger.snapshot()
    assert (budget.used, budget.open) == (1, 0)


def test_at_most_fifty_are_open(ledger: Ledger, clock: HandClock) -> None:
    """Fifty unanswered requests keep the next one waiting until one of them is finished, or ten minutes have passed."""
    grants = [ledger.acquire(wish(), work=RULES_ONLY) for _ in range(50)]
    for grant in grants:
        grant.sent()
    assert wait_of(ledger).rule is Rule.OPEN
    grants[3].finished()
    send(ledger)
    ledger.acquire(wish(), work=RULES_ONLY).sent()
    clock.sleep(599)
    assert wait_of(ledger).rule is Rule.OPEN
    clock.sleep(2)
    send(ledger)


@pytest.mark.slow
def test_open_requests_of_a_killed_process_are_closed(open_here: OpenHere, tmp_path: Path) -> None:
    """IB drops what a dead process had asked: fifty open requests of one do not block the living."""
    code = (
        "import sys, pathlib; from ktrdr_pipelines.ib.pacing.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.ib.pacing.ledger_tools import wish, LOGIN, RULES_ONLY;"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN);"
        "[ledger.acquire(wish(), work=RULES_ONLY).sent() for _ in range(50)]; print('open', flush=True); sys.stdin.read()"
    )
    ledger = open_here(tmp_path, LOGIN)
    with start_python("-c", code, tmp_path) as child:
        assert child.stdout.readline() == b"open\n"
        assert wait_of(ledger).rule is Rule.OPEN
        child.kill()
        child.wait()
    send(ledger)


# -- waiting


@pytest.mark.slow
def test_waiting_sleeps_exactly_as_long_as_needed(ledger: Ledger, clock: HandClock) -> None:
    """A waiter wakes when the budget is free, reports its wait once per change, and knows how long it was."""
    fill(ledger)
    began = clock.now_s()
    reported: list[tuple[float, Rule, float]] = []
    grant = ledger.acquire(wish(), sleep=clock.sleep, on_wait=lambda *wait: reported.append(wait), work=RULES_ONLY)
    assert clock.now_s() - began == pytest.approx(FULL_S, abs=0.05)
    assert grant.waited_s == pytest.approx(FULL_S, abs=0.05)
    assert [rule for _, rule, _ in reported] == [Rule.WINDOW]
    assert reported[0][2] == pytest.approx(began + FULL_S, abs=0.05)


def test_waiting_can_be_cancelled_and_leaves_no_place_behind(ledger: Ledger, clock: HandClock) -> None:
    """A cancelled or interrupted waiter leaves the queue at once."""
    fill(ledger)
    calls = itertools.count()
    with pytest.raises(WaitCancelled):
        ledger.acquire(wish(), sleep=clock.sleep, cancel=lambda: next(calls) > 3, work=RULES_ONLY)

    def interrupt(_: float) -> None:
        assert ledger.snapshot().waiting == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.acquire(wish(), sleep=interrupt, work=RULES_ONLY)
    assert ledger.snapshot().waiting == 0


def while_waiting(ledger: Ledger, clock: HandClock, ask: Ask, visit: Callable[[], None]) -> Grant:
    """Acquire ``ask``; ``visit`` is called after every sleep, when the waiter has not looked again yet."""

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        visit()

    return ledger.acquire(ask, sleep=sleep, work=RULES_ONLY)


@pytest.mark.slow
def test_no_request_overtakes_one_that_waits_for_the_budget(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """A newcomer gets nothing that an earlier waiter could use, at any moment of its wait, even the one at which it is free."""
    fill(ledger)
    newcomer = open_here(tmp_path, LOGIN, clock)
    visits: list[Rule] = []
    grant = while_waiting(ledger, clock, wish(), lambda: visits.append(wait_of(newcomer).rule))
    assert set(visits) == {Rule.WINDOW, Rule.QUEUE}
    grant.sent()
    send(newcomer)


@pytest.mark.slow
def test_a_heavy_request_is_not_starved_by_light_ones(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """Two units for a BID_ASK request come together although single ones are wanted all the time."""
    for _ in range(60):
        send(ledger)
        clock.sleep(5)
    began = clock.now_s()
    newcomer = open_here(tmp_path, LOGIN, clock)
    while_waiting(ledger, clock, wish(show="BID_ASK"), lambda: wait_of(newcomer) and None)
    # The first sixty went out five seconds apart from 300 s ago on: the second of them leaves the window after 305.5 s.
    assert clock.now_s() - began == pytest.approx(305.5, abs=0.1)


def test_a_request_may_overtake_if_it_delays_no_other(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """A waiter for its own twin does not delay others, and they do not take the unit that it will need."""
    fill(ledger, 55)
    send(ledger, wish("A", "x"))
    newcomer = open_here(tmp_path, LOGIN, clock)
    granted: list[float] = []

    def visit() -> None:
        answer = newcomer.try_acquire(wish(), work=RULES_ONLY)
        if isinstance(answer, Grant):
            answer.sent()
            answer.finished()
            granted.append(clock.now_s())

    began = clock.now_s()
    grant = while_waiting(ledger, clock, wish("A", "x"), visit)
    assert clock.now_s() - began == pytest.approx(15.1, abs=0.05)
    assert len(granted) == 3, "60 - 56 sent - 1 reserved"
    grant.sent()
    assert ledger.snapshot().used == 60


def test_a_stopped_waiter_is_passed_over_but_keeps_its_place(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """Others go on while a waiter does not show itself; when it does, it is first again."""
    fill(ledger)
    newcomer = open_here(tmp_path, LOGIN, clock)
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
    ledger.acquire(wish(), sleep=sleep, work=RULES_ONLY)


def test_waiters_are_served_in_the_order_of_their_arrival(
    open_here: OpenHere, tmp_path: Path, clock: HandClock
) -> None:
    """Of three who wait for a full budget, the one who came first gets the first unit that is free, and so on."""
    ledger = open_here(tmp_path, LOGIN, clock)
    for _ in range(3):
        send(ledger)
        clock.sleep(15)
    fill(ledger, 57)
    order: list[str] = []
    over = threading.Event()

    def wait_for_turn(name: str) -> None:
        own = open_here(tmp_path, LOGIN, clock)
        with own.acquire(wish(), sleep=lambda _: over.wait(0.002), work=RULES_ONLY) as grant:
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


def test_a_pacing_violation_pauses_every_process(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """After a pacing violation no process sends for 15 s, for longer after another one, and for 15 s again after a quiet time."""
    other = open_here(tmp_path, LOGIN, clock)
    for expected in (*PENALTIES_S, PENALTIES_S[-1]):
        assert ledger.penalise("code 162, pacing") == expected
        answer = wait_of(other)
        assert (answer.rule, answer.reason) == (Rule.PAUSE, "code 162, pacing")
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
    """A competing session pauses for as long as the caller wants; a pacing violation in it does not end it earlier."""
    assert ledger.penalise("competing session", 60) == 60
    assert ledger.penalise("pacing") == 15.0
    clock.sleep(30)
    assert wait_of(ledger).seconds == pytest.approx(30)
    assert [(pause.until_s - clock.now_s(), pause.reason) for pause in ledger.snapshot().pauses] == [
        (30, "competing session")
    ]


def test_the_snapshot_shows_the_state(ledger: Ledger, clock: HandClock) -> None:
    """Used, limit, open, next free moment and pauses are what the rules make of them; an empty ledger is free at once."""
    empty = ledger.snapshot()
    assert (empty.used, empty.limit, empty.next_free_at_s, empty.pauses) == (0, 60, clock.now_s(), ())
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
    assert wait_of(ledger).rule is Rule.PAUSE
    clock.sleep(100)
    send(ledger)


@pytest.mark.parametrize("wall_step_s", [60, 7200, -3600])
def test_a_reboot_frees_nothing_early(ledger: Ledger, clock: HandClock, wall_step_s: float) -> None:
    """After a restart of the machine, whatever its wall clock shows, what was sent counts ten minutes and not much longer."""
    fill(ledger)
    clock.reboot(uptime_s=30, wall_step_s=wall_step_s)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(500)
    assert wait_of(ledger).rule is Rule.WINDOW
    clock.sleep(FULL_S - 499)
    send(ledger)


def test_without_a_boot_clock_a_time_in_the_future_counts_as_now(open_here: OpenHere, tmp_path: Path) -> None:
    """Where only the wall clock exists and it was set back, the budget is free ten minutes later, not an hour."""
    clock = HandClock(boot_id="")
    ledger = open_here(tmp_path, LOGIN, clock)
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


def test_what_a_busy_gateway_may_have_read_late_counts_as_late(ledger: Ledger, clock: HandClock) -> None:
    """Five at once for one contract. The first is answered soon, so that shows no delay; the others a second later: each of them
    may have been read a third of a second after its stamp, and the next but one waits for that."""
    grants = [ledger.acquire(wish("A"), work=WorkClass.TAIL) for _ in range(5)]
    for grant in grants:
        grant.sent()
    clock.sleep(0.5)
    grants[0].finished()
    clock.sleep(1.0)
    for grant in grants[1:]:
        grant.finished()
    free_at_s = BURST_S + BURST_MARGIN_S - 1.5
    answer = ledger.try_acquire(wish("A"), work=WorkClass.TAIL)
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(free_at_s, abs=0.01)
    clock.sleep(answer.seconds)
    ledger.acquire(wish("A"), work=WorkClass.TAIL).sent()
    answer = ledger.try_acquire(wish("A"), work=WorkClass.TAIL)
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(MOST_DELAY_S, abs=0.01)
