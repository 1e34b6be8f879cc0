"""Promises between the classes of work, on a real ledger with the real rules and a clock moved by hand; judged independently.

The same in real time, with processes and sockets: `tools/soak.py`.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.forecast import forecast
from ktrdr_pipelines.ib.pacing.ledger import Grant, Ledger
from ktrdr_pipelines.ib.pacing.rules import Ask, Rule, Wait
from ktrdr_pipelines_tests.ib.pacing.class_trial import ClassTrial, Sent
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import LOGIN, HandClock, OpenHere, wait_of, wish

TAIL, INTERACTIVE, BACKFILL = WorkClass
NewTrial = Callable[..., ClassTrial]


@pytest.fixture
def new_trial(open_here: OpenHere, tmp_path: Path) -> Iterator[NewTrial]:
    """Trials of two openings of one file; in memory where that can be had, since only decisions matter."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:

        def create(answer_s: float = 0.0) -> ClassTrial:
            clock = HandClock()
            ledgers = [open_here(Path(folder), LOGIN, clock) for _ in range(2)]
            return ClassTrial(ledgers, clock, answer_s=answer_s)

        yield create


def longest_wait(sent: list[Sent], from_s: float = 0.0) -> float:
    return max(each.waited_s for each in sent if each.at_s - each.waited_s >= from_s)


# -- tails beside a backfill


@pytest.mark.slow
@pytest.mark.parametrize("first_s", [0.5, 120, 301, 1500])
@pytest.mark.parametrize("requests", [1, 3])
def test_a_tail_gets_its_request_within_a_minute(new_trial: NewTrial, first_s: float, requests: int) -> None:
    """A series that asks every five minutes, whatever the phase, also directly after the backfill's first burst."""
    trial = new_trial(answer_s=1.0)
    trial.load(BACKFILL, 1000, contracts=20)
    trial.tails([first_s + 300 * number for number in range(8)], requests=requests)
    trial.run(first_s + 2400)
    assert len(trial.of(TAIL)) == 8 * requests
    assert longest_wait(trial.of(TAIL)) < 60
    assert trial.judge.violations == []


@pytest.mark.slow
@pytest.mark.parametrize("phase_s", range(0, 600, 75))
def test_one_tail_at_any_moment_of_a_long_backfill_is_served_within_a_minute(
    new_trial: NewTrial, phase_s: float
) -> None:
    """Nothing announces it; a request that weighs two, and a repetition of it, are served in time as well."""
    trial = new_trial()
    trial.load(BACKFILL, 400, contracts=20)
    trial.tails([2400 + phase_s], requests=2, weight=2)
    trial.run(3200)
    assert len(trial.of(TAIL)) == 2
    assert longest_wait(trial.of(TAIL)) < 60


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("first_s", [0, 10, 30, 120, 299, 599, 900])
@pytest.mark.parametrize(("contracts", "weight"), [(20, 1), (1, 2)])
def test_twenty_tails_every_five_minutes_are_served_within_a_minute_from_the_third_time_on(
    new_trial: NewTrial, first_s: float, contracts: int, weight: int
) -> None:
    """The backfill learns to leave them their room, whatever the phase, and goes on in what is left."""
    trial = new_trial(answer_s=0.5)
    trial.load(BACKFILL, 1000 // weight, contracts=contracts, weight=weight)
    trial.tails([first_s + 300 * number for number in range(10)], series=20)
    trial.run(first_s + 3000)
    assert longest_wait(trial.of(TAIL), from_s=first_s + 599) < 60
    assert trial.judge.violations == []
    late = [each.units for each in trial.of(BACKFILL) if each.at_s > first_s + 1800]
    assert sum(late) >= 0.8 * 20 * 2, "of the twenty units that the tails leave in each of two windows"


@pytest.mark.slow
@pytest.mark.parametrize("interval_s", [303, 310, 320])
def test_tails_that_come_later_than_expected_are_served_in_time_too(new_trial: NewTrial, interval_s: float) -> None:
    """A sensor's tick takes a few seconds more than its interval, or comes late."""
    trial = new_trial()
    trial.load(BACKFILL, 1000, contracts=20)
    trial.tails([100 + interval_s * number + 7 * (number % 3) for number in range(12)], series=20)
    trial.run(4000)
    assert longest_wait(trial.of(TAIL), from_s=700) < 60
    assert trial.of(BACKFILL)[-1].at_s > 3400
    assert trial.judge.violations == []


# -- loads alone


@pytest.mark.slow
@pytest.mark.parametrize("work", [INTERACTIVE, BACKFILL])
@pytest.mark.parametrize(("contracts", "weight", "bound_s"), [(1, 1, 18.0), (20, 1, 0.0), (1, 2, 24.0)])
def test_fifty_units_alone_take_what_the_rules_need(
    new_trial: NewTrial, work: WorkClass, contracts: int, weight: int, bound_s: float
) -> None:
    """At most five percent longer than five requests of one contract in two seconds; of many contracts at once."""
    trial = new_trial()
    trial.load(work, 50 // weight, contracts=contracts, weight=weight)
    trial.run()
    assert trial.sent[-1].at_s <= 1.05 * bound_s + 0.05
    assert trial.judge.violations == []


@pytest.mark.slow
def test_a_second_load_of_fifty_after_a_quiet_time_is_not_spread(new_trial: NewTrial) -> None:
    """What spreads is one long run of requests, not each load after the first."""
    trial = new_trial()
    trial.load(BACKFILL, 50, contracts=20)
    trial.load(BACKFILL, 50, contracts=20, begins_s=700)
    trial.run()
    assert trial.sent[-1].at_s < 701


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("contracts", "weight"), [(1, 1), (20, 2)])
def test_a_long_backfill_alone_uses_the_budget(new_trial: NewTrial, contracts: int, weight: int) -> None:
    """Of a thousand units: 95 % of sixty in ten minutes, and of the time that the rules alone would need."""
    trial = new_trial(answer_s=2.0)
    trial.load(BACKFILL, 1000 // weight, contracts=contracts, weight=weight)
    trial.run()
    took_s = trial.sent[-1].at_s
    assert 1000 / (60 / 600 * took_s) >= 0.95
    assert 16 * 600 / took_s >= 0.95
    assert trial.judge.violations == []


# -- several loads


@pytest.mark.slow
def test_two_backfills_at_once_share_the_budget(new_trial: NewTrial) -> None:
    """Neither starves, together they use what one would, and a tail is in time."""
    trial = new_trial(answer_s=1.0)
    trial.load(BACKFILL, 200, contracts=20, name="one")
    trial.load(BACKFILL, 200, contracts=1, name="two")
    trial.tails([1000.0, 1300.0, 1600.0], requests=2)
    trial.run(2400)
    shares = [sum(each.load == name for each in trial.of(BACKFILL)) for name in ("one", "two")]
    assert sum(shares) >= 0.95 * 4 * 60
    assert min(shares) > 0.4 * sum(shares)
    assert longest_wait(trial.of(TAIL)) < 60
    assert trial.judge.violations == []


@pytest.mark.slow
@pytest.mark.parametrize("begins_s", [25, 300, 2000])
def test_an_interactive_load_goes_before_the_backfill_and_leaves_room_for_tails(
    new_trial: NewTrial, begins_s: float
) -> None:
    """Thirty requests take what comes back until they are done; a tail in the middle of them is in time."""
    trial = new_trial(answer_s=1.0)
    trial.load(BACKFILL, 400, contracts=20)
    trial.load(INTERACTIVE, 30, contracts=10, begins_s=begins_s)
    trial.tails([begins_s + 30, begins_s + 330])
    trial.run(begins_s + 900)
    assert len(trial.of(INTERACTIVE)) == 30
    last_s = trial.of(INTERACTIVE)[-1].at_s
    between = [each for each in trial.of(BACKFILL) if begins_s + 1 < each.at_s < last_s - 1]
    assert len(between) <= 1
    assert longest_wait(trial.of(TAIL)) < 60
    assert trial.judge.violations == []


@pytest.mark.slow
def test_a_backfill_beside_permanent_demand_of_higher_classes_is_not_starved(new_trial: NewTrial) -> None:
    """Tails that want more than the whole budget leave a backfill one request in twenty minutes, and no fewer."""
    trial = new_trial()
    trial.load(TAIL, 400, contracts=40, in_flight=3)
    trial.load(BACKFILL, 10, contracts=10, in_flight=2, begins_s=1)
    trial.run(6000)
    times = [each.at_s for each in trial.of(BACKFILL)]
    assert len(times) >= 4
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1300
    assert trial.judge.violations == []


@pytest.mark.slow
def test_a_class_is_served_in_the_order_of_arrival(new_trial: NewTrial) -> None:
    """Of sixteen requests that wait, each class gets its own in order, and tails come first."""
    trial = new_trial()
    trial.load(TAIL, 60, contracts=60)
    for number in range(8):
        for work in (BACKFILL, TAIL):
            trial.load(work, 1, begins_s=1 + number, name=f"{work} {number}", contracts=1)
    trial.run(1000)
    for work in (BACKFILL, TAIL):
        begun = [each.at_s - each.waited_s for each in trial.of(work)]
        assert begun == sorted(begun)
    later = [each.work for each in trial.sent[60:]]
    assert later[:8] == [TAIL] * 8


# -- one decision


def test_what_a_class_must_leave_is_named(ledger: Ledger, clock: HandClock) -> None:
    """After its burst a backfill waits for the reserve, which a question and a tail may use."""
    for number in range(50):
        with ledger.acquire(wish(), work=BACKFILL) as grant:
            grant.sent()
        assert number < 50
    answer = ledger.try_acquire(wish(), work=BACKFILL)
    assert isinstance(answer, Wait)
    assert answer.rule is Rule.RESERVE
    assert 15 < answer.seconds < 60
    for work in (INTERACTIVE, TAIL):
        granted = ledger.try_acquire(wish(), work=work)
        assert isinstance(granted, Grant)
        granted.give_back()


def test_an_unsent_grant_counts_for_the_shares(ledger: Ledger, clock: HandClock) -> None:
    """Fifty grants that were not sent yet leave a backfill nothing; they come back when they become void."""
    grants = [ledger.acquire(wish(), work=BACKFILL) for _ in range(50)]
    assert wait_of(ledger, work=BACKFILL).rule is Rule.RESERVE
    for grant in grants[:10]:
        grant.give_back()
    assert isinstance(ledger.try_acquire(wish(), work=BACKFILL), Grant)


def test_a_tail_goes_before_a_backfill_that_waited_longer(
    open_here: OpenHere, ledger: Ledger, tmp_path: Path, clock: HandClock
) -> None:
    """When the budget comes back, the tail that came last is first."""
    for _ in range(60):
        with ledger.acquire(wish(), work=TAIL) as grant:
            grant.sent()
    other = open_here(tmp_path, LOGIN, clock)
    with ledger.line_up(wish(), work=BACKFILL) as backfill, other.line_up(wish(), work=TAIL) as tail:
        assert isinstance(backfill.look(), Wait)
        clock.sleep(10)
        assert isinstance(tail.look(), Wait)
        queue = ledger.snapshot().queue
        assert [each.work for each in queue] == [TAIL, BACKFILL]
        assert [round(clock.now_s() - each.since_s) for each in queue] == [0, 10]
        assert queue[0].until_s - clock.now_s() == pytest.approx(590.5, abs=0.1)
        for _ in range(59):
            clock.sleep(10)
            backfill.look()
            tail.look()
        clock.sleep(1)
        assert isinstance(backfill.look(), Wait)
        assert isinstance(tail.look(), Grant)


@pytest.mark.slow
@pytest.mark.parametrize("work", list(WorkClass))
@pytest.mark.parametrize("weight", [1, 2])
def test_the_forecast_is_what_the_ledger_grants(new_trial: NewTrial, work: WorkClass, weight: int) -> None:
    """A load alone, from a ledger that has been used by all classes: every time is the forecast's."""
    trial = new_trial()
    trial.tails([0.0, 300.0], series=5)
    trial.load(INTERACTIVE, 10, begins_s=100)
    trial.load(BACKFILL, 20, begins_s=200, contracts=4)
    trial.run(400)
    trial.clock.pass_by(400 - trial.now_s)
    before = len(trial.sent)
    contract = f"{work.value} 0"
    asks = [Ask(f"{contract} forecast {number}", contract, weight) for number in range(150)]
    past = trial.snapshot().past
    sendings = forecast(asks, past, trial.clock.now_s(), work=work)
    trial.load(work, 150, begins_s=400, weight=weight, in_flight=1)
    trial.run()
    granted = [each.at_s for each in trial.sent[before:]]
    expected = [sending.at_s - trial.clock.now_s() + trial.now_s for sending in sendings]
    assert granted == pytest.approx(expected, abs=0.1)
