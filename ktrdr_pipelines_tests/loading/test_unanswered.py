"""What open questions wait for, and which load has been silent about it for too long. The test moves the clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import pytest

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.loading.unanswered import Unanswered


@dataclass
class Desk:
    """Questions are numbers, loads are letters."""

    now_s: float = 100.0
    outage: str = ""
    unanswered: Unanswered[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unanswered = Unanswered(lambda: self.now_s)

    def after(self, seconds: float) -> list[tuple[str, str, float]]:
        """Load, reason and seconds of what is shown after so long."""
        self.now_s += seconds
        found = self.unanswered.silent(lambda _load: self.outage)
        return [(load, waiting.reason, round(waiting.seconds, 3)) for load, waiting in found]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_answer_that_does_not_come_is_shown_once_within_two_seconds(desk: Desk) -> None:
    for question in range(6):
        desk.unanswered.begin(question, "A", "IB's answer", 120.0, is_sent=True)
    assert desk.after(1.0) == []
    assert desk.after(0.8) == [("A", "IB's answer; 6 requests open", 118.2)]
    assert desk.after(60.0) == []


def test_each_silent_load_is_shown_with_its_oldest_question(desk: Desk) -> None:
    desk.unanswered.begin(1, "A", "the gateway", 40.0)
    desk.unanswered.begin(2, "B", "the pacing ledger", 30.0)
    desk.now_s += 0.5
    desk.unanswered.begin(3, "A", "IB's answer", 120.0, is_sent=True)
    assert [shown[:2] for shown in desk.after(1.5)] == [("A", "the gateway"), ("B", "the pacing ledger")]


def test_answers_that_come_all_the_time_show_nothing(desk: Desk) -> None:
    """One question is slow while others are answered every second: the load goes on."""
    desk.unanswered.begin(0, "A", "IB's answer", 120.0, is_sent=True)
    for question in range(1, 20):
        desk.unanswered.begin(question, "A", "IB's answer", 120.0, is_sent=True)
        assert desk.after(1.0) == []
        desk.unanswered.end(question, "A")
    assert desk.after(1.6) == [("A", "IB's answer; 1 request open", 99.4)]


def test_a_long_wait_is_shown_when_it_begins_and_not_for_each_question(desk: Desk) -> None:
    pause = Waiting("pacing: pause of all processes", 15.0, None)
    assert desk.unanswered.wait(1, "A", pause)
    assert not desk.unanswered.wait(2, "A", pause)
    assert desk.unanswered.wait(3, "B", pause)
    assert desk.unanswered.wait(4, "A", Waiting("retry 1 of 3", 30.0, None))
    assert not desk.unanswered.wait(5, "A", Waiting("pacing: fewer than six in 2 seconds", 2.0, None))
    assert desk.after(10.0) == []


def test_what_goes_on_after_its_expected_end_is_shown_again_without_an_end(desk: Desk) -> None:
    desk.unanswered.begin(1, "A", "the pacing ledger", 30.0)
    assert len(desk.after(2.0)) == 1
    assert desk.after(29.0) == [("A", "the pacing ledger", inf)]
    assert desk.after(30.0) == []
    assert desk.after(31.0) == [("A", "the pacing ledger", inf)]


def test_an_outage_that_begins_while_an_answer_is_expected_is_shown(desk: Desk) -> None:
    desk.unanswered.begin(1, "A", "IB's answer", 120.0, is_sent=True)
    assert len(desk.after(2.0)) == 1
    desk.outage = "history farm ushmds"
    ((_, reason, _),) = desk.after(1.0)
    assert "history farm ushmds" in reason
    assert desk.after(1.0) == []
