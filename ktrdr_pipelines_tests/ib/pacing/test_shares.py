"""What a class of work may use: single decisions, by numbers worked out by hand. Whole loads: `ib/pacing/test_classes.py`."""

from __future__ import annotations

import pytest

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.rules import Ask, Entry, Go, Rule, Wait
from ktrdr_pipelines.ib.pacing.shares import decide_share, expect_tails, kept_from

NOW_S = 1_700_000_000.0
TAIL, INTERACTIVE, BACKFILL = WorkClass
PLAIN = Ask("wanted", "wanted")


def sent(count: int, age_s: float = 0.0, work: WorkClass = BACKFILL, *, every_s: float = 0.0) -> list[Entry]:
    return [Entry(NOW_S - age_s - every_s * n, Ask(f"{age_s} {n}", f"{age_s} {n}"), work=work) for n in range(count)]


@pytest.mark.parametrize(
    ("work", "used", "rule", "seconds"),
    [
        (BACKFILL, 49, None, 0.0),
        (BACKFILL, 50, Rule.RESERVE, 600.5 - 20 - 9 * 60),
        (BACKFILL, 51, Rule.RESERVE, 600.5 - 20 - 8 * 60),
        (INTERACTIVE, 56, None, 0.0),
        (INTERACTIVE, 57, Rule.RESERVE, 600.5 - 50),
        (INTERACTIVE, 59, Rule.RESERVE, 600.5 - 20),
        (TAIL, 59, None, 0.0),
        (TAIL, 60, Rule.WINDOW, 600.5),
    ],
)
def test_after_a_burst_a_class_leaves_what_higher_ones_may_need(
    work: WorkClass, used: int, rule: Rule | None, seconds: float
) -> None:
    """A backfill leaves ten units and takes one a minute of them, questions leave three, tails none."""
    answer = decide_share(sent(used, work=INTERACTIVE), PLAIN, NOW_S, work=work)
    if rule is None:
        assert answer == Go()
        return
    assert isinstance(answer, Wait)
    assert (answer.rule, answer.seconds) == (rule, pytest.approx(seconds, abs=0.01))


def test_a_long_backfill_is_spread_and_a_new_one_is_not() -> None:
    """Nine seconds after each unit, once a run has had fifty; a pause of two minutes ends the run."""
    run = sent(55, every_s=9.0)
    answer = decide_share(run, PLAIN, NOW_S, work=BACKFILL)
    assert isinstance(answer, Wait)
    assert (answer.rule, answer.seconds) == (Rule.SPREAD, pytest.approx(9.0, abs=0.01))
    quiet = sent(55, 300.0, every_s=5.0)
    assert isinstance(decide_share(quiet, PLAIN, NOW_S, work=BACKFILL), Go)
    assert isinstance(decide_share(quiet, PLAIN, NOW_S, work=BACKFILL, waited_s=290.0), Go), "the last was 300 s ago"
    recent = sent(55, 5.0, every_s=10.0)
    assert decide_share(recent, PLAIN, NOW_S, work=BACKFILL).rule is Rule.SPREAD  # type: ignore[union-attr]


def test_tails_are_expected_again_every_five_minutes() -> None:
    """By when, and how many in all; the largest of the last four periods counts; those that came are not expected again."""
    once = [(NOW_S - 100.0, 20)]
    assert expect_tails(once, NOW_S) == [(NOW_S + 200, 20), (NOW_S + 500, 40)]
    fewer_since = [(NOW_S - 700.0, 20), (NOW_S - 400.0, 5), (NOW_S - 100.0, 10)]
    assert expect_tails(fewer_since, NOW_S) == [(NOW_S + 200, 20), (NOW_S + 500, 40)]
    overdue = [(NOW_S - 330.0, 20)]
    assert expect_tails(overdue, NOW_S)[0] == (NOW_S - 30, 20)
    came = [(NOW_S - 310.0, 20), (NOW_S - 5.0, 20)]
    assert expect_tails(came, NOW_S) == [(NOW_S + 290, 20), (NOW_S + 590, 40)]
    assert expect_tails([(NOW_S - 1261.0, 20)], NOW_S) == []


def test_room_is_kept_for_the_tails_that_are_expected() -> None:
    """Two times twenty in ten minutes leave a backfill twenty; a question leaves room only for tails that came twice."""
    tails = sent(20, 100.0, TAIL)
    assert kept_from(tails, TAIL, NOW_S) == 0
    assert kept_from(tails, INTERACTIVE, NOW_S) == 3
    assert kept_from(tails, BACKFILL, NOW_S) == 20, "of forty: the others come back before the second time"
    again = sent(20, 700.0, TAIL) + sent(20, 1000.0, TAIL)
    assert expect_tails([(NOW_S - 100, 20), (NOW_S - 400, 10)], NOW_S, 2)[0] == (NOW_S + 200, 10)
    assert kept_from(again, INTERACTIVE, NOW_S) == 40
    full = tails + sent(20, 50.0, INTERACTIVE)
    answer = decide_share(full, PLAIN, NOW_S, work=BACKFILL)
    assert isinstance(answer, Wait)
    assert answer.rule is Rule.RESERVE


def test_a_class_that_got_nothing_for_twenty_minutes_gets_one() -> None:
    """Whatever is kept for others; the rules stay."""
    full = sent(59, 10.0, TAIL)
    assert isinstance(decide_share(full, PLAIN, NOW_S, work=BACKFILL, waited_s=1199.0), Wait)
    assert decide_share(full, PLAIN, NOW_S, work=BACKFILL, waited_s=1200.0) == Go()
    over = decide_share(sent(60, 10.0, TAIL), PLAIN, NOW_S, work=BACKFILL, waited_s=1200.0)
    assert over.rule is Rule.WINDOW  # type: ignore[union-attr]
