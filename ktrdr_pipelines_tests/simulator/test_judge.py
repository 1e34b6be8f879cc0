"""The pacing judge: each rule at its limit, with times chosen by the test."""

from __future__ import annotations

import pytest

from ktrdr_pipelines.simulator.judge import PacingJudge, PacingRules


def spread(judge, count, *, weight=1, start=0.0, gap=3.0):
    """The verdicts on ``count`` different requests, ``gap`` seconds apart."""
    return [judge.judge(start + gap * i, f"contract {i}", f"request {i}", weight) for i in range(count)]


def test_sixty_requests_in_ten_minutes_are_allowed_and_one_more_is_not():
    """The sixty-first within 600 seconds is a violation."""
    verdicts = spread(PacingJudge(), 61)
    assert verdicts[:60] == [""] * 60
    assert verdicts[60].startswith("61 ")


def test_bid_ask_counts_twice():
    """Thirty requests of weight two use the whole budget."""
    verdicts = spread(PacingJudge(), 31, weight=2)
    assert verdicts[:30] == [""] * 30
    assert verdicts[30].startswith("62 ")


def test_budget_comes_back_when_requests_are_ten_minutes_old():
    """A request exactly 600 seconds old no longer counts."""
    judge = PacingJudge()
    spread(judge, 60, gap=0.0)
    assert judge.judge(599.9, "a", "a") != ""
    assert judge.judge(1200.0, "b", "b") == ""


@pytest.mark.parametrize(("gap", "allowed"), [(0.0, False), (14.99, False), (15.0, True)])
def test_identical_request_needs_fifteen_seconds(gap, allowed):
    """The same request again is a violation within 15 seconds."""
    judge = PacingJudge()
    assert judge.judge(100.0, "AAPL", "same") == ""
    assert (judge.judge(100.0 + gap, "AAPL", "same") == "") is allowed


def test_sixth_request_of_one_contract_within_two_seconds_is_a_violation():
    """Five different requests for one contract, exchange and tick type may come at once; a sixth may not."""
    judge = PacingJudge()
    verdicts = [judge.judge(10.0 + 0.1 * i, "AAPL@SMART TRADES", i) for i in range(6)]
    assert verdicts[:5] == [""] * 5
    assert verdicts[5].startswith("6 ")
    assert judge.judge(10.5, "MSFT@SMART TRADES", 99) == ""


def test_refused_requests_count_too():
    """They have reached IB, so repeating them extends the wait."""
    judge = PacingJudge()
    for second in range(0, 30, 10):
        judge.judge(float(second), "AAPL", "same")
    assert judge.judge(34.0, "AAPL", "same") != ""
    assert judge.judge(49.0, "AAPL", "same") == ""


def test_a_clock_set_back_does_not_block():
    """Requests in the future are dropped."""
    judge = PacingJudge()
    spread(judge, 60, start=10_000.0, gap=0.0)
    assert judge.judge(5_000.0, "AAPL", "request") == ""


def test_violations_are_kept_with_time_and_rule():
    """Each violation has its time and the broken rule."""
    judge = PacingJudge(PacingRules(limit=1))
    judge.judge(1.0, "a", "a")
    judge.judge(2.0, "b", "b")
    ((at, rule),) = judge.violations
    assert at == 2.0
    assert rule.startswith("2 ")
