"""The episodes of a load, state by state: every transition of the tables, and every input that belongs to no state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Instrument, Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration, HistoryLimits
from ktrdr_pipelines.errors import BugError, DataError, RequestTimeout, StoreError, TransientError
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.actions import (
    Action,
    Answered,
    Ask,
    AskHead,
    HeadFound,
    Input,
    Refused,
    Start,
    Stored,
    Write,
)
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.cutting import cut_answer
from ktrdr_pipelines.loading.episode import FINAL, Episode, State
from ktrdr_pipelines.loading.gateway_clock import GatewayClock
from ktrdr_pipelines.loading.knowledge import HeldBars, Knowledge
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.loading.whole_episode import TRANSITIONS as WHOLE_TRANSITIONS
from ktrdr_pipelines.loading.whole_episode import WholeEpisode
from ktrdr_pipelines.loading.window_episode import TRANSITIONS, WindowEpisode
from ktrdr_pipelines.planning.coverage import widen
from ktrdr_pipelines.planning.requests import Request, plan_requests
from ktrdr_pipelines.store.sidecar import Sidecar
from ktrdr_pipelines_tests.fakes import pick, raw_bars, utc, window

AAPL = Series(stock("AAPL"), TIMEFRAMES["1h"])
ADJUSTED = Series(replace(stock("AAPL"), what_to_show="ADJUSTED_LAST"), TIMEFRAMES["1h"])
SPAN = window("2024-01-02", "2024-01-20")
NOW = utc("2024-06-15")
NOTHING = np.empty(0, np.int64)
INPUTS: tuple[Input, ...] = (
    Start(),
    Answered(raw_bars(NOTHING), NOW),
    HeadFound(None, NOW),
    Stored(0),
    Refused(RequestTimeout("no answer within 120 s")),
)


def make_load(series: Series = AAPL, held: np.ndarray | None = None, span: Window = SPAN) -> LoadContext:
    now_s, report = int(NOW.timestamp()), LoadReport(series, span)
    opens = NOTHING if held is None else held
    ends = (int(opens[0]), int(opens[-1])) if len(opens) else (None, None)
    return LoadContext(
        series=series,
        limits=HistoryLimits.CLASSIC,
        own_now_s=now_s,
        expected=expected_bars(series, span, complete_at_s=now_s),
        all_expected=expected_bars(series, widen(span)),
        known=Knowledge(series.timeframe, HeldBars(opens, *ends), Sidecar()),
        clock=GatewayClock(series.timeframe, now_s, report),
        report=report,
    )


def make_episode(load: LoadContext, *, may_put_off: bool = False) -> Episode:
    (request,) = plan_requests(load.series.timeframe, load.expected, load.limits)
    if load.series.instrument.refreshes_whole:
        return WholeEpisode(1, request, load)
    return WindowEpisode(1, request, load, may_put_off=may_put_off)


FULL = raw_bars(expected_bars(AAPL, SPAN).opens)
GAP = pick(FULL, np.r_[0:30, 37 : len(FULL)])
SHIFTED = RawBars(FULL.opens_s - 3600, FULL.open, FULL.high, FULL.low, FULL.close, FULL.volume)
NO_DATA = raw_bars(NOTHING, no_data_text="HMDS query returned no data")


def answered(raw: RawBars) -> Answered:
    return Answered(raw, NOW)


def stored(action: Action) -> Stored:
    assert isinstance(action, Write)
    return Stored(len(action.bars))


def run(episode: Episode, *inputs: Input | Callable[[Action], Input]) -> list[Action]:
    """Feed inputs one after the other; a function makes one of the action before. The last actions."""
    actions: list[Action] = []
    for each in inputs:
        actions = episode.receive(each(actions[-1]) if callable(each) else each)
    return actions


def reach(state: State) -> Episode:
    """An episode of an ordinary window in ``state``."""
    ways: dict[State, tuple[Input | Callable[[Action], Input], ...]] = {
        State.PLANNED: (),
        State.ASKED: (Start(),),
        State.DOUBTED: (Start(), answered(SHIFTED)),
        State.WRITING: (Start(), answered(GAP)),
        State.PROBING: (Start(), answered(GAP), stored),
        State.AWAITING_HEAD: (Start(), answered(NO_DATA)),
        State.SETTLING: (Start(), answered(FULL)),
        State.COMPLETE: (Start(), answered(FULL), stored),
        State.PUT_OFF: (Start(), answered(NO_DATA), HeadFound(utc("2024-03-01"), NOW)),
        State.FAILED: (Start(), Refused(RequestTimeout("no answer within 120 s"))),
    }
    episode = make_episode(make_load(), may_put_off=state is State.PUT_OFF)
    run(episode, *ways[state])
    assert episode.state is state
    return episode


def reach_whole(state: State) -> Episode:
    """An episode of a series that is refreshed whole in ``state``."""
    ways: dict[State, tuple[Input | Callable[[Action], Input], ...]] = {
        State.PLANNED: (),
        State.COLLECTING: (Start(),),
        State.AWAITING_HEAD: (Start(), *[answered(pick(FULL, slice(20, None)))] * 2),
        State.SETTLING: (Start(), answered(FULL)),
        State.COMPLETE: (Start(), answered(FULL), stored),
        State.FAILED: (Start(), Refused(RequestTimeout("no answer within 120 s"))),
    }
    episode = make_episode(make_load(ADJUSTED))
    run(episode, *ways[state])
    assert episode.state is state
    return episode


WINDOW_STATES = [state for state in State if state is not State.COLLECTING]
WHOLE_STATES = [
    State.PLANNED,
    State.COLLECTING,
    State.AWAITING_HEAD,
    State.SETTLING,
    State.COMPLETE,
    State.FAILED,
]


@pytest.mark.parametrize(
    ("state", "event"), [*product(WINDOW_STATES, INPUTS)], ids=lambda x: getattr(x, "name", type(x).__name__)
)
def test_an_input_belongs_to_its_states_only(state: State, event: Input) -> None:
    """Each pair of state and input is in the table and moves the episode, or is a bug that leaves it where it was."""
    episode = reach(state)
    if (state, type(event)) in TRANSITIONS:
        episode.receive(event)
        assert episode.state is not State.PLANNED
    else:
        with pytest.raises(BugError, match=state.name):
            episode.receive(event)
        assert episode.state is state


@pytest.mark.parametrize(
    ("state", "event"), [*product(WHOLE_STATES, INPUTS)], ids=lambda x: getattr(x, "name", type(x).__name__)
)
def test_an_input_belongs_to_its_states_only_of_whole_series(state: State, event: Input) -> None:
    """The same of series that are refreshed whole."""
    episode = reach_whole(state)
    if (state, type(event)) in WHOLE_TRANSITIONS:
        episode.receive(event)
    else:
        with pytest.raises(BugError, match=state.name):
            episode.receive(event)
        assert episode.state is state


def test_final_states_take_nothing() -> None:
    """Both tables end where an episode is settled, put off or failed."""
    for table in (TRANSITIONS, WHOLE_TRANSITIONS):
        assert not [state for state, _ in table if state in FINAL]


# -- what each transition does ----------------------------------------------------------------------------------------


def test_the_planned_request_is_asked_first() -> None:
    episode = reach(State.PLANNED)
    (ask,) = episode.receive(Start())
    assert ask == Ask(1, episode.request)
    assert episode.state is State.ASKED


def test_an_answer_with_every_bar_is_written_once_with_its_claim() -> None:
    """Bars and claims together: nothing is asked in between, and a crash loses one answer at most."""
    episode = reach(State.ASKED)
    (write,) = episode.receive(answered(FULL))
    assert isinstance(write, Write)
    assert opens_of(write.bars).tolist() == FULL.opens_s.tolist()
    assert write.claims is not None
    assert write.claims.answered == episode.request.window
    assert list(write.claims.absent) == []
    assert episode.state is State.SETTLING
    assert episode.receive(Stored(len(write.bars))) == []
    assert (episode.state, episode.rows) == (State.COMPLETE, len(FULL))


def test_a_gap_is_written_without_a_claim_before_it_is_probed() -> None:
    """What arrived is safe before anything else is asked; the probe has another shape."""
    episode = reach(State.ASKED)
    (write,) = episode.receive(answered(GAP))
    assert isinstance(write, Write)
    assert write.claims is None
    assert len(write.bars) == len(GAP)
    (probe,) = episode.receive(Stored(len(write.bars)))
    assert isinstance(probe, Ask)
    assert (probe.request.end, probe.request.duration) != (episode.request.end, episode.request.duration)
    assert episode.state is State.PROBING


def test_a_probe_that_brings_the_missing_bars_settles_the_window() -> None:
    episode = reach(State.PROBING)
    (write,) = episode.receive(answered(FULL))
    assert isinstance(write, Write)
    assert write.claims is not None
    assert list(write.claims.absent) == []
    episode.receive(Stored(7))
    assert (episode.state, len(episode.absent)) == (State.COMPLETE, 0)


def test_a_probe_that_agrees_makes_the_missing_bars_absent() -> None:
    """Two answers of different shape with bars on both sides: seven bars are claimed to be absent, with both as evidence."""
    episode = reach(State.PROBING)
    (write,) = episode.receive(answered(GAP))
    assert isinstance(write, Write)
    assert write.claims is not None
    (absent,) = write.claims.absent
    assert (absent.opens, len(absent.evidence)) == (7, 2)
    assert len(episode.absent) == 7


def test_an_answer_that_contradicts_the_calendar_is_not_written() -> None:
    """A second answer is asked for; when it does not agree, the episode fails and nothing was written."""
    episode = reach(State.ASKED)
    (probe,) = episode.receive(answered(SHIFTED))
    assert isinstance(probe, Ask)
    assert episode.state is State.DOUBTED
    assert episode.receive(answered(FULL)) == []
    assert episode.state is State.FAILED
    assert isinstance(episode.error, DataError)


def test_a_second_answer_that_agrees_with_the_doubted_one_makes_it_stand() -> None:
    episode = reach(State.DOUBTED)
    (write,) = episode.receive(answered(SHIFTED))
    assert isinstance(write, Write)
    assert set(opens_of(write.bars)) <= set(SHIFTED.opens_s)


def test_a_head_timestamp_is_asked_once_a_load() -> None:
    """The second episode of a load knows it already."""
    load = make_load()
    episode = make_episode(load)
    (ask,) = run(episode, Start(), answered(NO_DATA))
    assert ask == AskHead(1)
    load.head_is_asked, load.head = True, None
    other = make_episode(load)
    (probe,) = run(other, Start(), answered(NO_DATA))
    assert isinstance(probe, Ask)


def test_no_data_and_a_later_head_timestamp_make_a_window_absent() -> None:
    """Two sources agree: the whole window is claimed, with the head timestamp as evidence."""
    load = make_load()
    episode = make_episode(load)
    run(episode, Start(), answered(NO_DATA))
    (write,) = episode.receive(HeadFound(utc("2024-03-01"), NOW))
    assert isinstance(write, Write)
    assert write.claims is not None
    (absent,) = write.claims.absent
    assert absent.opens == len(load.expected)
    assert [e.text for e in absent.evidence] == ["HMDS query returned no data", "head timestamp 2024-03-01T00:00:00Z"]


def test_a_failed_request_fails_the_episode_with_its_error() -> None:
    for state in (State.ASKED, State.PROBING, State.DOUBTED, State.AWAITING_HEAD):
        episode = reach(state)
        error = RequestTimeout("no answer within 120 s")
        assert episode.receive(Refused(error)) == []
        assert (episode.state, episode.error) == (State.FAILED, error)


@pytest.mark.parametrize("state", [State.WRITING, State.SETTLING])
def test_bars_that_the_store_refuses_are_not_held(state: State) -> None:
    """The load goes on knowing that they are missing."""
    episode = reach(state)
    assert len(episode.load.known.held.opens)
    episode.receive(Refused(StoreError("the disk is full")))
    assert episode.state is State.FAILED
    assert not len(episode.load.known.held.opens)


def test_bars_that_another_program_removed_fail_the_episode() -> None:
    """The store reports that the file changed, and the bars just written are not in it any more."""
    episode = reach(State.SETTLING)
    episode.receive(Stored(len(FULL), held=HeldBars(NOTHING)))
    assert episode.state is State.FAILED
    assert isinstance(episode.error, DataError)


def test_empty_answers_without_no_data_are_no_evidence() -> None:
    """Whatever the number of requests: the window fails, nothing is claimed."""
    load = make_load()
    load.head_is_asked = True
    episode = make_episode(load)
    actions = run(episode, Start(), answered(raw_bars(NOTHING)))
    while actions:
        assert isinstance(actions[-1], Ask)
        actions = episode.receive(answered(raw_bars(NOTHING)))
    assert episode.state is State.FAILED
    assert isinstance(episode.error, TransientError)


def test_several_episodes_can_be_open_at_once() -> None:
    """Two requests of one load are out together, and the answers come in the other order."""
    load = make_load(span=window("2024-01-01", "2024-03-01"))
    first, second = plan_requests(load.series.timeframe, load.expected, load.limits)
    january, february = WindowEpisode(1, first, load), WindowEpisode(2, second, load)
    bars = raw_bars(load.expected.opens)
    for episode in (january, february):
        episode.receive(Start())
    for episode in (february, january):
        mine = pick(
            bars, (bars.opens_s >= episode.request.window.start_s) & (bars.opens_s < episode.request.window.end_s)
        )
        run(episode, answered(mine), stored)
    assert (january.state, february.state) == (State.COMPLETE, State.COMPLETE)
    assert load.known.held.opens.tolist() == load.expected.opens.tolist()


# -- series that are refreshed whole ----------------------------------------------------------------------------------


def test_a_whole_answer_replaces_everything_in_one_write() -> None:
    episode = reach_whole(State.COLLECTING)
    (write,) = episode.receive(answered(FULL))
    assert isinstance(write, Write)
    assert (write.whole, len(write.bars)) == (True, len(FULL))
    assert write.claims is not None


def test_a_whole_answer_without_a_held_bar_writes_nothing() -> None:
    """The last bar is held and does not come again, whatever the shape: the file stays."""
    episode = make_episode(make_load(ADJUSTED, held=FULL.opens_s))
    actions = run(episode, Start())
    while actions:
        assert isinstance(actions[-1], Ask)
        actions = episode.receive(answered(pick(FULL, slice(0, len(FULL) - 1))))
    assert episode.state is State.FAILED
    assert isinstance(episode.error, DataError)
    assert not episode.load.report.fetched_bars


# -- one answer, cut --------------------------------------------------------------------------------------------------


def test_a_bar_that_the_end_of_its_request_cuts_off_is_left_out() -> None:
    """The market trades on at the end of the request, which lies two minutes into a bar: that bar came with two of its five
    minutes, and by our clock it is long complete."""
    euro: Instrument = forex("EURUSD")
    series = Series(euro, TIMEFRAMES["5m"])
    load = make_load(series, span=window("2024-01-08", "2024-01-12"))
    end = utc("2024-01-10T12:02")
    request = Request(Window(utc("2024-01-10T11:00"), end), end, Duration(1, "D"))
    opens = np.arange(request.window.start_s, request.window.end_s, 300, dtype=np.int64)
    assert opens[-1] < end.timestamp() < opens[-1] + 300 < load.clock.now_s
    cut = cut_answer(load, raw_bars(opens), request)
    assert opens_of(cut.bars).tolist() == opens[:-1].tolist()
