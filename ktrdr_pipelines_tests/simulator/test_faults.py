"""Scripted faults: what each does to an answer, which requests a rule matches, and files of rules."""

from __future__ import annotations

import math

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.faults import KINDS, FaultRule, read_faults

from .talk import AAPL, EURUSD, IBM, Talk, errors, head, history


def ask(*rules, **fields):
    talk = Talk(faults=rules)
    return talk, talk.send(*history(1, **fields))


def rows(message):
    """(stamp, open, high, low, close) of each bar of a history answer."""
    fields = message[5:]
    assert int(message[4]) * 8 == len(fields)
    return [(int(fields[i]), *map(float, fields[i + 1 : i + 5])) for i in range(0, len(fields), 8)]


TRUTH = rows(ask()[1][0])


def test_the_answer_without_faults_is_seven_bars():
    """The other tests compare with these."""
    assert len(TRUTH) == 7


def changed(kind, **changes):
    return rows(ask(FaultRule(kind, **changes))[1][0])


def test_gap_removes_bars_from_the_middle():
    """The first and last bars stay."""
    assert changed("gap", rows=3) == TRUTH[:2] + TRUTH[5:]


def test_partial_is_one_half():
    """The first half, or with ``part`` the last."""
    assert changed("partial") == TRUTH[:4]
    assert changed("partial", part="last") == TRUTH[4:]


def test_duplicate_repeats_bars():
    """The same bars twice, one after the other."""
    assert changed("duplicate", rows=2) == [*TRUTH[:4], *TRUTH[2:]]


def test_out_of_order_swaps_bars():
    """All bars are there, two of them in the wrong order."""
    got = changed("out_of_order")
    assert got != TRUTH
    assert sorted(got) == TRUTH


def test_conflict_sends_two_bars_of_one_stamp():
    """The second has other prices."""
    got = changed("conflict")
    assert len(got) == 8
    assert [row[0] for row in got] == [row[0] for row in TRUTH[:4] + TRUTH[3:]]
    assert got[4][4] == pytest.approx(got[3][4] * 1.01)
    assert got[:4] + got[5:] == TRUTH


def test_poisoned_prices_reach_the_wire():
    """NaN and infinity are sent as they are."""
    assert math.isnan(changed("nan")[3][4])
    assert math.isinf(changed("infinite")[3][4])


def test_high_below_low_turns_a_bar_upside_down():
    """Only that bar changes, and only its high and low."""
    got = changed("high_below_low")
    assert got[3][2] < got[3][3]
    assert got[:3] + got[4:] == TRUTH[:3] + TRUTH[4:]


def test_shift_moves_all_stamps():
    """As a gateway with a wrong time zone does."""
    assert [row[0] for row in changed("shift", seconds=3600)] == [row[0] + 3600 for row in TRUTH]


@pytest.mark.parametrize(
    ("rule", "code", "text"),
    [
        (FaultRule("pacing"), 162, "pacing violation"),
        (FaultRule("no_data_lie"), 162, "HMDS query returned no data: AAPL@SMART Trades"),
        (FaultRule("error", code=2105, text="HMDS data farm connection is broken"), 2105, "broken"),
    ],
)
def test_refusals_replace_the_answer(rule, code, text):
    """An error is sent in place of the bars."""
    (answer,) = ask(rule)[1]
    assert answer[3] == str(code)
    assert text in answer[4]


def test_silent_request_is_never_answered():
    """No answer is sent, and the log records it."""
    talk, answers = ask(FaultRule("silent"))
    assert answers == []
    assert talk.seen == []
    assert talk.gateway.requests[0].outcome == "silent"


def test_late_answer_comes_after_the_cancel():
    """First the confirmation of the cancel, then the bars."""
    talk, answers = ask(FaultRule("late"))
    assert answers == []
    assert [message[0] for message in talk.send(25, 1, 1)] == ["4", "17"]


def test_slow_answer_waits():
    """As long as the rule's ``seconds``."""
    talk, answers = ask(FaultRule("slow", seconds=3.5))
    assert answers == []
    assert [action.delay_s for action in talk.seen] == [3.5]


def test_drop_cuts_the_answer_and_the_connection():
    """``after_bytes`` bytes are sent, then the connection is closed."""
    talk, answers = ask(FaultRule("drop_after", after_bytes=100))
    assert answers == []
    assert len(talk.closed) == 1


def test_faults_of_bars_leave_refusals_alone():
    """A gap in "no data" is still "no data"."""
    _, answers = ask(FaultRule("gap"), end="19900101-00:00:00")
    assert errors(answers) == [(1, 162)]


def test_nth_counts_matching_requests_only():
    """The second request for AAPL fails, whatever requests lie between."""
    talk = Talk(faults=[FaultRule("pacing", symbol="AAPL", nth=(2,))])
    answers = [talk.send(*history(i, contract))[0][0] for i, contract in enumerate([AAPL, IBM, AAPL, AAPL])]
    assert answers == ["17", "17", "4", "17"]


def test_times_bounds_how_often():
    """After ``times`` faults the answers are unchanged."""
    talk = Talk(faults=[FaultRule("pacing", times=2)])
    assert [talk.send(*history(i))[0][0] for i in range(4)] == ["4", "4", "17", "17"]


def test_rules_match_on_every_condition():
    """Symbol (IB's or the pair's local one), bar size, what to show, kind and ``when``."""
    talk = Talk(
        faults=[
            FaultRule("pacing", symbol="EUR.USD", bar_size="1 hour", what="BID"),
            FaultRule("error", on="head", code=1),
            FaultRule("error", code=2, when=lambda asked: asked.duration == "2 D"),
        ]
    )
    assert talk.send(*history(1, EURUSD, what="MIDPOINT"))[0][0] == "17"
    assert errors(talk.send(*history(2, EURUSD, what="BID"))) == [(2, 162)]
    assert errors(talk.send(*head(3))) == [(3, 1)]
    assert errors(talk.send(*history(4, duration="2 D"))) == [(4, 2)]
    assert [record.faults for record in talk.gateway.requests] == [(), ("pacing",), ("error",), ("error",)]


def test_rules_can_be_added_and_cleared_while_running():
    """Rules apply from the moment they are added until they are cleared."""
    talk = Talk()
    talk.gateway.faults.add(FaultRule("pacing"))
    assert errors(talk.send(*history(1))) == [(1, 162)]
    talk.gateway.faults.clear()
    assert errors(talk.send(*history(2))) == []


def test_several_rules_apply_in_order():
    """A gap and a delay are two rules."""
    talk = Talk(faults=[FaultRule("gap"), FaultRule("slow", seconds=1)])
    assert talk.send(*history(1)) == []
    assert int(talk.wake()[0][4]) == 6


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "fields", [{}, {"size": "1 day"}, {"what": "SCHEDULE", "size": "1 day"}, {"end": "19900101-00:00:00"}]
)
def test_every_fault_survives_every_answer(kind, fields):
    """Answers of one bar, of none, or without bars at all do not break a fault."""
    talk = Talk(faults=[FaultRule(kind, rows=5, on="")])
    talk.send(*history(1, **fields))
    talk.send(*head(2))
    assert talk.gateway.requests[0].faults == (kind,)


def test_file_of_rules_is_read(tmp_path):
    """YAML, of which JSON is a subset."""
    path = tmp_path / "faults.yaml"
    path.write_text("- {kind: pacing, nth: [1, 3]}\n- kind: gap\n  symbol: AAPL\n  rows: 7\n  nth: 2\n")
    assert read_faults(path) == [FaultRule("pacing", nth=(1, 3)), FaultRule("gap", symbol="AAPL", rows=7, nth=(2,))]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kind: pacing", "faults.yaml"),
        ("- {kind: nonsense}", "nonsense"),
        ("- {kind: gap, row: 7}", r"faults.yaml.*\brow\b"),
        ("- {rows: 7}", r"faults.yaml.*kind"),
        ("- {kind: gap, nth: first}", r"faults.yaml.*nth"),
        ("[", "faults.yaml"),
    ],
)
def test_invalid_file_of_rules_is_an_input_error(tmp_path, text, named):
    """The error names the file or the unknown kind, and the field."""
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        read_faults(path)


def test_missing_file_of_rules_is_an_input_error(tmp_path):
    """The error names the file."""
    with pytest.raises(InputError, match="none"):
        read_faults(tmp_path / "none.yaml")
