"""What a user sees while nothing seems to happen."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.services.progress import Progress

UNTIL = datetime(2024, 3, 5, 17, 30, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "enabled", "is_shown"),
    [(2.0, True, True), (15.0, True, True), (15.0, False, False), (60.0, False, True)],
)
def test_waits_are_shown_with_their_reason_and_end(
    seconds: float, enabled: bool, is_shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever they are for; minutes even where progress is switched off."""
    with Progress(enabled=enabled) as progress:
        progress.show_wait(Waiting("retry 1 of 3 after: the gateway said 10197", seconds, UNTIL))
    shown = capsys.readouterr().err
    assert ("waiting until 17:30:05 UTC (retry 1 of 3 after: the gateway said 10197)" in shown) is is_shown


def test_waits_that_add_up_to_half_a_minute_are_shown_where_progress_is_switched_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries of fifteen seconds, one after the other, with nothing loaded in between."""
    now_s = 1000.0
    monkeypatch.setattr("ktrdr_pipelines.services.progress.time.monotonic", lambda: now_s)
    with Progress(enabled=False) as progress:
        progress.show_wait(Waiting("retry 1 of 3", 15.0, UNTIL))
        now_s += 16.0
        progress.show_wait(Waiting("retry 2 of 3", 15.0, UNTIL))
    assert "retry 2 of 3" in capsys.readouterr().err


def test_a_wait_without_a_known_end_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=False) as progress:
        progress.show_wait(Waiting("another load goes on", math.inf, None))
    assert capsys.readouterr().err == "waiting (another load goes on)\n"
