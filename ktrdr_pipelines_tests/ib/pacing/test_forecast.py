"""Promises of the forecast: the earliest time that the pacing rules allow, and no rule broken on the way."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.pacing.forecast import Sending
from ktrdr_pipelines.ib.pacing.forecast import forecast as forecast_class
from ktrdr_pipelines.ib.pacing.rules import WINDOW_MARGIN_S, WINDOW_S, Ask, Entry, Go, Rule, decide

NOW_S = 1_700_000_000.0
forecast = partial(forecast_class, work=WorkClass.TAIL)
"""Of the class that only the rules bind. What the others leave: `ib/pacing/test_shares.py`."""


def asks(n: int, contract: str = "AAPL", weight: int = 1) -> list[Ask]:
    return [Ask(f"{contract} {i}", contract, weight) for i in range(n)]


def after(sendings: list[Sending]) -> list[float]:
    return [round(s.at_s - NOW_S, 1) for s in sendings]


def test_nothing_to_ask_needs_no_time() -> None:
    """No requests, no times."""
    assert forecast([], [], NOW_S) == []


def test_five_requests_of_one_contract_go_at_once_and_the_sixth_waits_two_seconds() -> None:
    """The burst rule applies, and is named at the request that waits for it."""
    sendings = forecast(asks(6), [], NOW_S)
    assert after(sendings) == [0, 0, 0, 0, 0, 2.1]
    assert [s.waited_for for s in sendings] == [None] * 5 + [Rule.BURST]


def test_bid_ask_counts_twice() -> None:
    """Weight 2: two go at once, the third waits; sixty units are thirty of them."""
    sendings = forecast(asks(31, weight=2), [], NOW_S)
    assert after(sendings)[:3] == [0, 0, 2.1]
    assert sendings[30].at_s - NOW_S >= WINDOW_S
    assert sendings[29].at_s - NOW_S < WINDOW_S


def test_sixty_in_ten_minutes_then_the_next_sixty() -> None:
    """Of 61 requests the last waits until the first is ten minutes old."""
    sendings = forecast(asks(61), [], NOW_S)
    assert sendings[59].at_s - NOW_S < 60
    assert sendings[60].at_s - NOW_S == pytest.approx(WINDOW_S + WINDOW_MARGIN_S, abs=0.1)
    assert sendings[60].waited_for is Rule.WINDOW


def test_what_others_have_used_of_the_budget_counts() -> None:
    """A budget spent five minutes ago is free again in five."""
    past = [Entry(NOW_S - 300, Ask(f"other {i}", f"other {i}")) for i in range(60)]
    assert after(forecast(asks(1), past, NOW_S)) == [300.5]


def test_the_same_request_again_waits_fifteen_seconds() -> None:
    """The first waits for an identical request sent five seconds ago."""
    (again,) = asks(1)
    assert after(forecast([again], [Entry(NOW_S - 5, again)], NOW_S)) == [10.1]


def test_a_pause_of_all_processes_comes_first() -> None:
    """Nothing goes before its end."""
    (only,) = forecast(asks(1), [], NOW_S, pause_until_s=NOW_S + 120)
    assert (round(only.at_s - NOW_S), only.waited_for) == (120, Rule.PAUSE)


def test_unanswered_requests_do_not_hold_up_a_forecast_for_ever() -> None:
    """Fifty open requests count as answered now: the time of their answers is unknown."""
    past = [Entry(NOW_S - 60, Ask(f"open {i}", f"open {i}"), is_open=True) for i in range(50)]
    assert after(forecast(asks(1), past, NOW_S)) == [0]


@pytest.mark.slow
def test_years_of_minutes_are_forecast_in_a_moment() -> None:
    """5,000 requests at sixty in ten minutes take nearly fourteen hours, and a forecast does not."""
    sendings = forecast(asks(5000), [], NOW_S)
    assert 13.8 < (sendings[-1].at_s - NOW_S) / 3600 < 13.9


@given(
    wanted=st.lists(
        st.builds(Ask, st.sampled_from("abcdefgh"), st.sampled_from(["X", "Y"]), st.sampled_from([1, 2])), max_size=90
    ),
    ages=st.lists(st.floats(-30, 700), max_size=70),
    hold_s=st.none() | st.floats(-10, 900),
)  # fmt: skip
def test_every_time_is_allowed_and_none_before_it(wanted: list[Ask], ages: list[float], hold_s: float | None) -> None:
    """At each forecast time the rules allow the request; a hundredth of a second earlier they did not, or another one had just
    gone."""
    entries = [Entry(NOW_S - age, Ask(f"p{i}", "X")) for i, age in enumerate(ages)]
    pause_until_s = None if hold_s is None else NOW_S + hold_s
    sendings = forecast(wanted, entries, NOW_S, pause_until_s=pause_until_s)
    assert len(sendings) == len(wanted)
    earliest_s = NOW_S
    for ask, sending in zip(wanted, sendings, strict=True):
        assert sending.at_s >= earliest_s
        assert isinstance(decide(entries, ask, sending.at_s, pause_until_s), Go)
        if sending.at_s > earliest_s + 0.02:
            assert not isinstance(decide(entries, ask, sending.at_s - 0.01, pause_until_s), Go)
        entries.append(Entry(sending.at_s, ask))
        earliest_s = sending.at_s
