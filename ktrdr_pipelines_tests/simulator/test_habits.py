"""Harmless differences between gateways: dates of bars, length of answers, the start of history, empty windows."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.habits import USUAL, Habits, read_habits

from .talk import EURUSD, Talk, errors, head, history


def stamps(habits, **fields):
    (message,) = Talk(habits=habits).send(*history(1, **fields))
    return message[5 :: len(message[5:]) // int(message[4])]


@pytest.mark.parametrize(
    ("size", "last", "first"),
    [
        ("1W", ["20240216", "20240223", "20240301"], ["20240212", "20240220", "20240226"]),
        ("1M", ["20240131", "20240229", "20240301"], ["20240101", "20240201", "20240301"]),
    ],
)
def test_weeks_and_months_are_dated_with_their_last_session_or_first_day(size, last, first):
    """Monday even where it is a holiday (19 February 2024), the first of the month even where nothing trades."""
    first = [date if date != "20240220" else "20240219" for date in first]
    fields = {"size": size, "duration": "3 M" if size == "1M" else "3 W"}
    assert stamps(USUAL, **fields)[-3:] == last
    assert stamps(Habits(periods="first"), **fields)[-3:] == first


@pytest.mark.parametrize(("size", "before"), [("1W", ["20240218", "20240225"]), ("1M", ["20240131", "20240229"])])
def test_weeks_and_months_can_be_dated_with_the_day_before_them(size, before):
    """The Sunday, or the last day of the month before: a label that other gateways give to the previous period."""
    fields = {"size": size, "duration": "3 M" if size == "1M" else "3 W"}
    assert stamps(Habits(periods="before"), **fields)[-2:] == before


def test_days_are_dated_with_their_end_or_beginning():
    """A forex week from Monday to Friday, or from Sunday to Thursday; stocks are the same either way."""
    week = {"contract": EURUSD, "what": "MIDPOINT", "size": "1 day", "duration": "5 D", "end": "20240301-22:00:00"}
    days = [[datetime.strptime(d, "%Y%m%d").replace(tzinfo=UTC).strftime("%a") for d in stamps(h, **week)]
            for h in (USUAL, Habits(days="open"))]  # fmt: skip
    assert days == [["Mon", "Tue", "Wed", "Thu", "Fri"], ["Sun", "Mon", "Tue", "Wed", "Thu"]]
    stock = {"size": "1 day", "duration": "5 D"}
    assert stamps(Habits(days="open"), **stock) == stamps(USUAL, **stock)


def test_answers_can_be_cut_to_the_newest_bars():
    """The oldest bars are left out."""
    assert stamps(Habits(newest=3)) == stamps(USUAL)[-3:]


def test_start_of_history_can_be_wrong_or_unknown():
    """Ten years too early, a year too late, or 162."""
    answers = {name: Talk(habits=Habits(head=name)).send(*head(1)) for name in ("exact", "early", "late", "none")}
    exact, early, late = (int(answers[name][0][2]) for name in ("exact", "early", "late"))
    assert (exact - early, late - exact) == (3653 * 86400, 365 * 86400)
    assert errors(answers["none"]) == [(1, 162)]


def test_empty_window_can_be_answered_without_an_error():
    """No bars and no error, as some gateways answer."""
    (answer,) = Talk(habits=Habits(empty="no_bars")).send(*history(1, end="19900101-00:00:00"))
    assert (answer[0], answer[4]) == ("17", "0")


def test_habits_are_read_from_text():
    """In the form of `ktrdr simulator --habit`."""
    assert read_habits([]) == USUAL
    assert read_habits(["periods=first", "newest=7", "head=none"]) == Habits(periods="first", newest=7, head="none")


@pytest.mark.parametrize("text", ["weeks=first", "head=never", "newest=few", "periods"])
def test_unknown_habits_are_input_errors(text):
    """The error names the habit."""
    with pytest.raises(InputError, match=text.partition("=")[0]):
        read_habits([text])
