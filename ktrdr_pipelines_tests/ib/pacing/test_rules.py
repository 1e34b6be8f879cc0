"""The pacing decision against a judge that was written from the rules alone, by counting."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.ib.pacing.rules import (
    BURST_MARGIN_S,
    IDENTICAL_MARGIN_S,
    IDENTICAL_S,
    OPEN_REQUESTS,
    PENALTIES_S,
    WINDOW_MARGIN_S,
    Ask,
    Entry,
    Go,
    Rule,
    Wait,
    bars_ask,
    contract_text,
    decide,
    head_ask,
    penalty_s,
    schedule_ask,
    used_units,
)

T0 = 1_700_000_000.0
AAPL = contract_text(sec_type="STK", ib_symbol="AAPL", currency="USD")


def bars(end: str = "20240305-21:00:00", *, contract: str = AAPL, show: str = "TRADES", **changes: object) -> Ask:
    request = {"exchange": "SMART", "bar_size": "1 hour", "duration": "1 M", "use_rth": True} | changes
    return bars_ask(contract=contract, what_to_show=show, end=end, **request)  # type: ignore[arg-type]


def find_violation(sent: list[tuple[float, Ask]]) -> str:
    """The first rule of the specification that ``sent`` breaks, or "". Counts every pair and every window; slow and plain."""
    for at, _ in sent:
        window = [ask.weight for t, ask in sent if at - 600 <= t <= at]
        if sum(window) > 60:
            return f"{sum(window)} units in the ten minutes up to {at}"
    for (t1, one), (t2, two) in itertools.combinations(sent, 2):
        if one.identity == two.identity and abs(t1 - t2) < 15:
            return f"identical requests {abs(t1 - t2)} s apart"
    for at, ask in sent:
        burst = [other.weight for t, other in sent if other.contract == ask.contract and at - 2 <= t <= at]
        if sum(burst) >= 6:
            return f"{sum(burst)} units of one contract in two seconds up to {at}"
    return ""


def filled(count: int, at_s: float = T0) -> list[Entry]:
    return [Entry(at_s, bars(contract=f"C{i}")) for i in range(count)]


asks = st.builds(
    lambda contract, end, show: bars(f"e{end}", contract=f"C{contract}", show=show),
    st.integers(0, 3), st.integers(0, 5), st.sampled_from(["TRADES", "MIDPOINT", "BID_ASK"]),
)  # fmt: skip
milliseconds = st.integers(-700_000, 700_000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(asks, st.floats(0, 30)), min_size=1, max_size=60))
def test_obedient_senders_never_break_a_rule(wishes: list[tuple[Ask, float]]) -> None:
    """A sender that sends only on Go, and else waits as long as the answer has it, breaks no rule, and never waits twice."""
    now, past, sent = T0, [], []
    for ask, idle in wishes:
        now += idle
        answer = decide(past, ask, now)
        if isinstance(answer, Wait):
            now += answer.seconds
            assert decide(past, ask, now) == Go(), "the wait was too short"
        sent.append((now, ask))
        past.append(Entry(now, ask))
    assert find_violation(sent) == ""


@pytest.mark.parametrize("seed", range(12))
def test_the_budget_is_used_to_the_full(seed: int) -> None:
    """A hasty sender of many different requests breaks no rule, and needs no more time than the rules demand."""
    rng = random.Random(seed)
    contracts, heavy = rng.choice([1, 3, 40]), rng.choice([0.0, 0.3, 1.0])
    wishes = [
        bars(f"e{i}", contract=f"C{rng.randrange(contracts)}", show="BID_ASK" if rng.random() < heavy else "TRADES")
        for i in range(200)
    ]
    now, past, sent = T0, [], []
    for ask in wishes:
        while isinstance(answer := decide(past, ask, now), Wait):
            now += answer.seconds
        sent.append((now, ask))
        past.append(Entry(now, ask))
    assert find_violation(sent) == ""
    units = sum(ask.weight for ask in wishes)
    # One window of 60 units (59 where a heavy request did not fit) each 600.5 s, and some seconds for bursts.
    assert now - T0 <= (units - 1) // 59 * (600 + WINDOW_MARGIN_S + 0.1) + 60


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(milliseconds, asks, st.booleans()), max_size=90),
    asks,
    st.none() | st.integers(-100, 100),
)
def test_the_wait_is_the_shortest_one(history, wanted: Ask, pause: int | None) -> None:
    """Whatever the past, legal or not, the wait ends with a Go, and half a second earlier there would have been none."""
    past = [Entry(T0 + at / 1000, ask, is_open) for at, ask, is_open in history][: OPEN_REQUESTS - 1]
    pause_until = None if pause is None else T0 + pause
    answer = decide(past, wanted, T0, pause_until)
    if isinstance(answer, Go):
        entries = [(min(e.at_s, T0), e.ask) for e in past]
        assert find_violation([*entries, (T0, wanted)]) == "" or find_violation(entries) != ""
        assert pause is None or pause <= 0
        return
    assert answer.seconds > 0
    frozen = [Entry(min(e.at_s, T0), e.ask) for e in past]
    assert decide(frozen, wanted, T0 + answer.seconds, pause_until) == Go()
    if answer.seconds > 0.5:
        assert isinstance(decide(frozen, wanted, T0 + answer.seconds - 0.5, pause_until), Wait)


@pytest.mark.parametrize(
    ("age_s", "may_go"), [(0, False), (599.9, False), (600.0, False), (600.5, False), (600.51, True), (5000, True)]
)
def test_ten_minutes_are_closed_at_both_ends(age_s: float, may_go: bool) -> None:
    """Sixty requests exactly ten minutes old still fill the budget; half a second later they do not."""
    answer = decide(filled(60), bars(), T0 + age_s)
    assert isinstance(answer, Go) is may_go
    if not may_go:
        assert answer.rule is Rule.WINDOW
    assert decide(filled(59), bars(), T0 + age_s) == Go()


def test_bid_ask_counts_twice() -> None:
    """A BID_ASK request takes two units, as wanted and as past, in the budget and in the burst; others take one."""
    heavy = bars(show="BID_ASK")
    assert (heavy.weight, bars(show="bid_ask").weight, bars(show="BID").weight, bars().weight) == (2, 2, 1, 1)
    assert decide(filled(58), heavy, T0) == Go()
    assert decide(filled(59), heavy, T0).rule is Rule.WINDOW
    thirty = [Entry(T0, bars(contract=f"C{i}", show="BID_ASK")) for i in range(30)]
    assert decide(thirty, bars(), T0).rule is Rule.WINDOW
    assert used_units(thirty, T0) == 60
    two = [Entry(T0, bars(f"e{i}", show="BID_ASK")) for i in range(2)]
    assert decide(two[:1], bars("e9", show="BID_ASK"), T0) == Go()
    assert decide(two, bars("e9", show="BID_ASK"), T0).rule is Rule.BURST


def test_fewer_than_six_of_one_contract_within_two_seconds() -> None:
    """Five requests of one contract, exchange and tick type may go at once, the sixth after two seconds; others are free."""
    five = [Entry(T0, bars(f"e{i}")) for i in range(5)]
    assert decide(five[:4], bars("e9"), T0) == Go()
    assert decide(five, bars("e9"), T0 + 2.0).rule is Rule.BURST
    assert decide(five, bars("e9"), T0 + 2.0 + BURST_MARGIN_S + 0.01) == Go()
    for other in (bars("e9", contract="MSFT"), bars("e9", show="MIDPOINT"), bars("e9", exchange="ISLAND")):
        assert decide(five, other, T0) == Go()


def test_identity_is_the_whole_request() -> None:
    """Only an equal request in all its parts waits fifteen seconds: a different end, size or hours does not."""
    base = bars()
    past = [Entry(T0, base)]
    answer = decide(past, bars(), T0 + IDENTICAL_S)
    assert isinstance(answer, Wait)
    assert answer.rule is Rule.IDENTICAL
    assert decide(past, bars(), T0 + IDENTICAL_S + IDENTICAL_MARGIN_S + 0.01) == Go()
    others = [
        bars("20240306-21:00:00"), bars(contract="MSFT"), bars(show="MIDPOINT"), bars(exchange="ISLAND"),
        bars(bar_size="1 min"), bars(duration="1 D"), bars(use_rth=False),
        head_ask(contract=AAPL, exchange="SMART", what_to_show="TRADES", use_rth=True),
        schedule_ask(contract=AAPL, exchange="SMART", duration="1 M", end="20240305-21:00:00", use_rth=True),
    ]  # fmt: skip
    assert len({ask.identity for ask in [base, *others]}) == len(others) + 1
    for other in others:
        assert decide(past, other, T0) == Go()


def test_head_timestamps_and_schedules_count() -> None:
    """Requests for the start of history and for sessions use the same budget, and the former the same burst, as bars."""
    head = head_ask(contract=AAPL, exchange="SMART", what_to_show="TRADES", use_rth=True)
    schedule = schedule_ask(contract=AAPL, exchange="SMART", duration="1 Y", end="", use_rth=True)
    assert head.contract == bars().contract
    for ask in (head, schedule):
        assert decide(filled(60), ask, T0).rule is Rule.WINDOW
        assert used_units([Entry(T0, ask)], T0) == 1


def test_a_contract_has_one_name_whatever_the_case_of_its_parts() -> None:
    """The pacing name of a contract needs nothing that only IB knows, and does not split on upper and lower case."""
    assert contract_text(sec_type="stk", ib_symbol="aapl", currency="usd") == AAPL
    assert contract_text(sec_type="FUT", ib_symbol="ES", currency="USD", expiry="202412") != contract_text(
        sec_type="FUT", ib_symbol="ES", currency="USD", expiry="202503"
    )


def test_at_most_fifty_open_requests() -> None:
    """With fifty requests unanswered, the next waits until one is."""
    fifty = [Entry(T0 - 599, entry.ask, is_open=True) for entry in filled(OPEN_REQUESTS)]
    answer = decide(fifty, bars(), T0)
    assert isinstance(answer, Wait)
    assert answer.rule is Rule.OPEN
    fifty[7] = Entry(T0 - 599, fifty[7].ask)
    assert decide(fifty, bars(), T0) == Go()


def test_entries_from_the_future_count_as_now() -> None:
    """After a clock was set back, what lies ahead of it fills the budget for ten minutes, and not for longer."""
    ahead = filled(60, T0 + 3600)
    answer = decide(ahead, bars(), T0)
    assert isinstance(answer, Wait)
    assert answer.seconds == pytest.approx(600 + WINDOW_MARGIN_S, abs=0.01)


def test_a_pause_of_all_goes_before_everything() -> None:
    """Nothing is sent before the end of a pause; the wait is that of whichever ends last."""
    assert decide([], bars(), T0, T0 + 42) == Wait(42, Rule.PAUSE)
    assert decide([], bars(), T0, T0) == Go()
    assert decide(filled(60), bars(), T0, T0 + 42).rule is Rule.WINDOW


def test_each_pacing_answer_in_a_row_pauses_longer() -> None:
    """The pauses are the specification's backoff, and stay at its last value."""
    assert [penalty_s(n) for n in range(8)] == [*PENALTIES_S, 600.0, 600.0]


@pytest.mark.parametrize("weight", [0, -1, 6])
def test_a_request_that_could_never_go_is_refused(weight: int) -> None:
    """A weight that no rule would ever let through, or that costs nothing, is a mistake of the caller."""
    with pytest.raises(ValueError, match="weighs"):
        Ask("a", "b", weight)
