"""What answers show of bars that they do not contain: the judgement of single answers, without a load."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration, HistoryLimits
from ktrdr_pipelines.loading.evidence import AnswerEvidence, Doubt, RequestEvidence, judge_missing
from ktrdr_pipelines.loading.knowledge import NOTHING_HELD, HeldBars, Knowledge
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines_tests.fakes import IntArray, raw_bars, window

SERIES = Series(stock("AAPL"), TIMEFRAMES["1m"])
MINUTES = expected_bars(SERIES, window("2024-03-06", "2024-03-07"))


def judge(missing: slice, *ranges: tuple[int, int], **more: int) -> list[Doubt]:
    """Doubts about ``missing`` bars after answers for bars from the first to before the second of each of ``ranges``."""
    truth = np.delete(MINUTES.opens, np.arange(390)[missing])
    evidence = [
        AnswerEvidence(a, b, truth[(truth >= a) & (truth < b)])
        for a, b in ((int(MINUTES.opens[lo]), int(MINUTES.closes[hi - 1])) for lo, hi in ranges)
    ]
    judged = judge_missing(MINUTES.take(missing), MINUTES, evidence, TIMEFRAMES["1m"], **more)
    return sorted({Doubt(each) for each in judged.doubts})


@pytest.mark.parametrize(
    ("missing", "ranges", "doubt"),
    [
        pytest.param(slice(100, 107), [(0, 390)], Doubt.UNSEEN, id="one answer"),
        pytest.param(slice(100, 107), [(0, 390), (99, 110)], Doubt.NONE, id="an answer that encloses it"),
        pytest.param(slice(380, 390), [(0, 390), (370, 390)], Doubt.NEWER, id="nothing newer"),
        pytest.param(slice(0, 10), [(0, 390), (0, 20)], Doubt.OLDER, id="nothing older"),
        pytest.param(slice(192, 198), [(0, 390), (191, 199)], Doubt.MIDDLE, id="in the middle twice"),
        pytest.param(slice(192, 198), [(0, 390), (191, 220)], Doubt.NONE, id="in the middle once"),
    ],
)
def test_doubts_about_missing_bars(missing: slice, ranges: list[tuple[int, int]], doubt: Doubt) -> None:
    """Each uniform cut that could have left them out is a reason for another probe."""
    assert judge(missing, *ranges) == [doubt]


def test_an_answer_without_a_known_bar_is_no_evidence() -> None:
    """The second answer is cut as well, in another place: it confirms nothing."""
    first = np.delete(MINUTES.opens, np.arange(100, 107))
    second = np.delete(MINUTES.opens, np.r_[100:107, 200:207])
    end_s = int(MINUTES.closes[-1])
    evidence = [
        AnswerEvidence(int(MINUTES.opens[0]), end_s, first),
        AnswerEvidence(int(MINUTES.opens[5]), end_s, second),
    ]
    judged = judge_missing(MINUTES.take(slice(100, 107)), MINUTES, evidence, TIMEFRAMES["1m"])
    assert set(judged.doubts.tolist()) == {Doubt.UNSEEN}


def test_no_data_from_ib_is_evidence_inside_missing_bars() -> None:
    """Nothing newer is known, and IB answers "no data": that is no cut."""
    truth = MINUTES.opens[:380]
    start_s, end_s = int(MINUTES.opens[380]), int(MINUTES.closes[-1])
    nothing = np.empty(0, np.int64)
    missing = MINUTES.take(slice(380, 390))
    whole = AnswerEvidence(int(MINUTES.opens[0]), end_s, truth)
    for is_no_data, doubt in ((True, Doubt.NONE), (False, Doubt.UNSEEN)):
        evidence = [whole, AnswerEvidence(start_s, end_s, nothing, is_no_data)]
        assert set(judge_missing(missing, MINUTES, evidence, TIMEFRAMES["1m"]).doubts.tolist()) == {doubt}


def test_an_answer_whole_at_its_newest_end_is_evidence_for_shorter_ones() -> None:
    """A gateway that cuts the newest part would have cut the longer answer too; later bars may only be late."""
    later = int(MINUTES.closes[-1])
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=381, whole_before_s=later) == [Doubt.NONE]
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=10, whole_before_s=later) == [Doubt.NEWER]
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=381) == [Doubt.NEWER]


def evidence_of(held: HeldBars, *answers: IntArray) -> RequestEvidence:
    """The evidence of answers to one request for the day, with what is held beside them; an empty answer is "no data"."""
    day = Window.from_epoch(int(MINUTES.opens[0]), int(MINUTES.closes[-1]))
    known = Knowledge(SERIES.timeframe, held, Sidecar())
    evidence = RequestEvidence(SERIES, day, known, HistoryLimits.CLASSIC, MINUTES, day.end_s)
    request = Request(day, datetime.fromtimestamp(day.end_s, UTC), Duration(1, "D"))
    for opens in answers:
        evidence.add(raw_bars(opens, no_data_text="" if len(opens) else "no data"), request)
    return evidence


def test_bars_are_the_newest_while_nothing_newer_is_known() -> None:
    """A newer bar in an answer or in the file makes them missing in between; "no data" alone leaves them the newest."""
    missing = MINUTES.take(slice(380, 385))
    older, later = MINUTES.opens[:380], MINUTES.opens[385:]
    assert evidence_of(NOTHING_HELD, older).are_newest(missing)
    assert evidence_of(NOTHING_HELD, MINUTES.opens[:0]).are_newest(missing)
    assert not evidence_of(NOTHING_HELD, np.r_[older, later]).are_newest(missing)
    assert not evidence_of(HeldBars(later, int(later[0]), int(later[-1])), older).are_newest(missing)
    assert not evidence_of(NOTHING_HELD, older).are_newest(missing.take(slice(0, 0)))


def test_doubt_is_explained_with_its_reason_and_its_number_of_bars() -> None:
    """The error names how many answers, how many bars, the first of them, and why they do not settle it."""
    missing = MINUTES.take(slice(380, 390))
    evidence = evidence_of(NOTHING_HELD, MINUTES.opens[:380], MINUTES.opens[:380])
    day = Window.from_epoch(int(MINUTES.opens[0]), int(MINUTES.closes[-1]))
    error = evidence.explain_doubt(missing, Request(day, datetime.fromtimestamp(day.end_s, UTC), Duration(1, "D")))
    assert "2 answers do not contain 10 expected bars" in error.observed
    assert "newer" in error.observed
