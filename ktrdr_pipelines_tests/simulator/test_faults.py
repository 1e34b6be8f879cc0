"""Scripted faults: what each does to an answer, which requests a rule hits, and files of rules."""

from __future__ import annotations

import math

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.faults import KINDS, FaultRule, read_faults

from .talk import AAPL, EURUSD, IBM, Talk, errors, head, history


def ask(*rules, **fields):
    talk = Talk(faults=rules)
    return talk, talk.say(*history(1, **fields))


def rows(message):
    """(stamp, open, high, low, close) of each bar of a history answer."""
    fields = message[5:]
    assert int(message[4]) * 8 == len(fields)
    return [(int(fields[i]), *map(float, fields[i + 1 : i + 5])) for i in range(0, len(fields), 8)]


TRUTH = rows(ask()[1][0])


def test_the_answer_without_faults_is_seven_bars():
    """The other tests compare with these."""
    assert len(TRUTH) == 7


def spoilt(kind, **changes):
    return rows(ask(FaultRule(kind, **changes))[1][0])


def test_hole_removes_bars_from_the_middle():
    """The first and last bars stay."""
    assert spoilt("hole", rows=3) == TRUTH[:2] + TRUTH[5:]


def test_partial_is_one_half():
    """The first half, or on demand the last."""
    assert spoilt("partial") == TRUTH[:4]
    assert spoilt("partial", part="last") == TRUTH[4:]


def test_duplicate_repeats_bars():
    """The same bars twice, one after the other."""
    assert spoilt("duplicate", rows=2) == [*TRUTH[:4], *TRUTH[2:]]


def test_out_of_order_swaps_bars():
    """All bars are there, two of them the wrong way round."""
    got = spoilt("out_of_order")
    assert got != TRUTH
    assert sorted(got) == TRUTH


def test_conflict_sends_two_bars_of_one_stamp():
    """The second has other prices."""
    got = spoilt("conflict")
    assert len(got) == 8
    assert [row[0] for row in got] == [row[0] for row in TRUTH[:4] + TRUTH[3:]]
    assert got[4][4] == pytest.approx(got[3][4] * 1.01)
    assert got[:4] + got[5:] == TRUTH


def test_poisoned_prices_reach_the_wire():
    """NaN and infinity are sent as such."""
    assert math.isnan(spoilt("nan")[3][4])
    assert math.isinf(spoilt("infinite")[3][4])


def test_high_below_low_turns_a_bar_upside_down():
    """Only that bar, and only its ends."""
    got = spoilt("high_below_low")
    assert got[3][2] < got[3][3]
    assert got[:3] + got[4:] == TRUTH[:3] + TRUTH[4:]


def test_shift_moves_all_stamps():
    """As a gateway in another zone would."""
    assert [row[0] for row in spoilt("shift", seconds=3600)] == [row[0] + 3600 for row in TRUTH]


@pytest.mark.parametrize(
    ("rule", "code", "text"),
    [
        (FaultRule("pacing"), 162, "pacing violation"),
        (FaultRule("no_data_lie"), 162, "HMDS query returned no data: AAPL@SMART Trades"),
        (FaultRule("error", code=2105, text="HMDS data farm connection is broken"), 2105, "broken"),
    ],
)
def test_refusals_replace_the_answer(rule, code, text):
    """The bars do not come, an error does."""
    (answer,) = ask(rule)[1]
    assert answer[3] == str(code)
    assert text in answer[4]


def test_silent_request_is_never_answered():
    """Nothing comes, and the log says so."""
    talk, answers = ask(FaultRule("silent"))
    assert answers == []
    assert talk.seen == []
    assert talk.gateway.requests[0].outcome == "silent"


def test_late_answer_comes_after_the_cancel():
    """First the confirmation of the cancel, then the bars nobody waits for."""
    talk, answers = ask(FaultRule("late"))
    assert answers == []
    assert [message[0] for message in talk.say(25, 1, 1)] == ["4", "17"]


def test_slow_answer_waits():
    """The delay is the rule's."""
    talk, answers = ask(FaultRule("slow", seconds=3.5))
    assert answers == []
    assert [action.delay_s for action in talk.seen] == [3.5]


def test_drop_cuts_the_answer_and_the_connection():
    """So many bytes, then the end."""
    talk, answers = ask(FaultRule("drop_after", after_bytes=100))
    assert answers == []
    assert talk.closed == ["dropped after 100 bytes"]


def test_faults_of_bars_leave_refusals_alone():
    """A hole in no data is no data."""
    _, answers = ask(FaultRule("hole"), end="19900101-00:00:00")
    assert errors(answers) == [(1, 162)]


def test_nth_counts_matching_requests_only():
    """The second request for AAPL fails, wherever others lie between."""
    talk = Talk(faults=[FaultRule("pacing", symbol="AAPL", nth=(2,))])
    answers = [talk.say(*history(i, contract))[0][0] for i, contract in enumerate([AAPL, IBM, AAPL, AAPL])]
    assert answers == ["17", "17", "4", "17"]


def test_times_bounds_how_often():
    """After so many faults the gateway behaves."""
    talk = Talk(faults=[FaultRule("pacing", times=2)])
    assert [talk.say(*history(i))[0][0] for i in range(4)] == ["4", "4", "17", "17"]


def test_rules_match_on_every_condition():
    """Symbol (IB's or the pair's local one), bar size, what to show, kind and a test of one's own."""
    talk = Talk(
        faults=[
            FaultRule("pacing", symbol="EUR.USD", bar_size="1 hour", what="BID"),
            FaultRule("error", on="head", code=1),
            FaultRule("error", code=2, when=lambda asked: asked.duration == "2 D"),
        ]
    )
    assert talk.say(*history(1, EURUSD, what="MIDPOINT"))[0][0] == "17"
    assert errors(talk.say(*history(2, EURUSD, what="BID"))) == [(2, 162)]
    assert errors(talk.say(*head(3))) == [(3, 1)]
    assert errors(talk.say(*history(4, duration="2 D"))) == [(4, 2)]
    assert [record.faults for record in talk.gateway.requests] == [(), ("pacing",), ("error",), ("error",)]


def test_rules_can_be_added_and_cleared_while_running():
    """A test may change the weather."""
    talk = Talk()
    talk.gateway.faults.add(FaultRule("pacing"))
    assert errors(talk.say(*history(1))) == [(1, 162)]
    talk.gateway.faults.clear()
    assert errors(talk.say(*history(2))) == []


def test_several_rules_apply_in_order():
    """A hole and a delay are two rules."""
    talk = Talk(faults=[FaultRule("hole"), FaultRule("slow", seconds=1)])
    assert talk.say(*history(1)) == []
    assert int(talk.wake()[0][4]) == 6


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "fields", [{}, {"size": "1 day"}, {"what": "SCHEDULE", "size": "1 day"}, {"end": "19900101-00:00:00"}]
)
def test_every_fault_survives_every_answer(kind, fields):
    """Answers of one bar, of none, or without bars at all do not break a fault."""
    talk = Talk(faults=[FaultRule(kind, rows=5, on="")])
    talk.say(*history(1, **fields))
    talk.say(*head(2))
    assert talk.gateway.requests[0].faults == (kind,)


def test_file_of_rules_is_read(tmp_path):
    """YAML, of which JSON is a part."""
    path = tmp_path / "faults.yaml"
    path.write_text("- {kind: pacing, nth: [1, 3]}\n- kind: hole\n  symbol: AAPL\n  rows: 7\n  nth: 2\n")
    assert read_faults(path) == [FaultRule("pacing", nth=(1, 3)), FaultRule("hole", symbol="AAPL", rows=7, nth=(2,))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: pacing", "not a list of faults"),
        ("- {kind: nonsense}", "unknown fault 'nonsense'"),
        ("- {kind: hole, row: 7}", "unknown fields row"),
        ("- {rows: 7}", "no kind"),
        ("- {kind: hole, nth: first}", "nth"),
        ("[", "cannot read faults"),
    ],
)
def test_bad_file_of_rules_is_one_clear_error(tmp_path, text, message):
    """The file and the rule are named."""
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_faults(path)


def test_missing_file_of_rules_is_one_clear_error(tmp_path):
    """No traceback for a path that is not there."""
    with pytest.raises(InputError, match="cannot read faults"):
        read_faults(tmp_path / "none.yaml")
