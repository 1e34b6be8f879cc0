"""One planned request, from the question until its window is settled: what every kind of episode does.

No I/O, no clock, no store: inputs and actions are values (`actions.py`), and each kind has its transitions in one table
(`window_episode.py`, `whole_episode.py`). An episode is settled when every expected bar of its window is held, confirmed as
absent, or known to be late; or it has failed. Every decision can thus be tested with an input and a look at the actions, and
several episodes can be open at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ktrdr_pipelines.bars.answer import Answer, NormalisedAnswer
from ktrdr_pipelines.bars.merging import merge_bars
from ktrdr_pipelines.bars.restatement import RESTATED_KINDS, ScaleChanged
from ktrdr_pipelines.bars.schema import empty_bars, opens_of
from ktrdr_pipelines.calendars import ExpectedBars, find_unexpected, match_held
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import BugError, DataError, KtrdrError
from ktrdr_pipelines.loading.actions import (
    Action,
    Answered,
    Ask,
    AskHead,
    Claims,
    HeadFound,
    Input,
    Refused,
    Stored,
    Write,
)
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.cutting import cut_answer
from ktrdr_pipelines.loading.evidence import RequestEvidence
from ktrdr_pipelines.planning.coverage import bars_inside
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import Evidence

if TYPE_CHECKING:
    import pandas as pd


class State(Enum):
    """Where an episode stands. The last three are final."""

    PLANNED = "planned"
    ASKED = "the planned request is out"
    DOUBTED = "the answer contradicts the calendar: nothing is written, requests of another shape are out"
    PROBING = "expected bars are missing: requests of another shape are out"
    COLLECTING = "a request for the whole series is out"
    AWAITING_HEAD = "the head timestamp is asked for"
    WRITING = "bars are being written, and the next action waits for that"
    SETTLING = "the last bars and the claims are being written"
    PUT_OFF = "only the head timestamp speaks for it: it is asked again when bars are held"
    COMPLETE = "settled"
    FAILED = "failed"


FINAL = (State.PUT_OFF, State.COMPLETE, State.FAILED)


@dataclass(frozen=True, eq=False)
class End:
    """The episode ends without claims: put off, or failed with ``error``."""

    error: KtrdrError | None = None


Transitions = Mapping[tuple[State, type], Callable[[Any, Any], list[Action]]]
"""The method that takes an input in a state, and returns the actions that follow. What is not in the table is a bug."""


class Episode(ABC):
    """One planned request. `receive` an input, carry out the actions; `state` is final at the end."""

    transitions: ClassVar[Transitions]
    compares_scale: ClassVar[bool] = True
    """Whether answers must have the price scale of the held bars."""

    def __init__(self, number: int, request: Request, load: LoadContext) -> None:
        """``number`` names the episode in its actions."""
        self.number, self.request, self.load = number, request, load
        self.state = State.PLANNED
        self.error: KtrdrError | None = None
        """Why the episode failed."""
        self.answer_times: tuple[int, float | None] = (0, None)
        """Bars of the answer to the planned request, and the seconds it took."""
        self.rows = 0
        """New rows in the file."""
        self.wanted = bars_inside(load.expected, request.window)
        self.pending = self.absent = self.wanted.take(slice(0, 0))
        """Bars that stay missing because they may only be late; bars that are confirmed as absent."""
        self.history_start_s: int | None = None
        """The first open of all history, epoch seconds, when this episode showed it."""
        self.seen = RequestEvidence(
            load.series, request.window, load.known, load.limits, load.all_expected, load.clock.now_s
        )
        self.evidence: list[Evidence] = []
        """What goes into the sidecar with the claims."""
        self.asked: list[Request] = []
        self.has_no_word = True
        """Until a bar or IB's own "no data" arrives."""
        self._arrived = self._fresh = np.empty(0, np.int64)
        self._missing_before = load.known.find_missing(self.wanted)
        self._unwritten: pd.DataFrame = empty_bars()
        self._uncompared: list[Answer] = []
        """Answers whose price scale the store has not compared with the file yet."""
        self._comparing: list[Answer] = []
        """Those that the write under way compares."""
        self._deferred: Ask | AskHead | End | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def doing(self) -> str:
        """What is being done, for errors."""
        return f"loading {self.load.series} {self.request.window}"

    def receive(self, event: Input) -> list[Action]:
        """Take an input; the actions that follow from it, at most one of which waits for a result.

        Raises:
            BugError: the input does not belong to the state.
        """
        handler = self.transitions.get((self.state, type(event)))
        if handler is None:
            raise BugError(
                f"{type(event).__name__} in state {self.state.name} of the request {self.request}",
                advice="Report this: a fault of the load machine or its driver.",
            )
        try:
            return handler(self, event)
        except BugError:
            raise
        except KtrdrError as error:
            return self.then(End(error))

    @abstractmethod
    def decide(self) -> list[Action]:
        """What follows from all that is known: another request, the head timestamp, the last write, or the end. May be called
        again when the head timestamp has become known."""

    # -- answers ------------------------------------------------------------------------------------------------------

    def take(self, event: Answered, asked: Request, cut_to: Request, from_s: int | None = None) -> NormalisedAnswer:
        """Keep what the answer to ``asked`` shows, and cut it to the window of ``cut_to``."""
        raw = event.answer
        self.load.clock.lag_s = event.clock_lag_s
        self.load.clock.check(raw.opens_s)
        self.seen.look_around(self.load.clock.now_s)
        self.seen.add(raw, asked, from_s)
        if self.compares_scale and self.load.series.instrument.sec_type in RESTATED_KINDS and len(raw.opens_s):
            self._uncompared.append(raw)
        answer = cut_answer(self.load, raw, cut_to)
        self.has_no_word &= not len(raw.opens_s) and not raw.no_data_text
        text = raw.no_data_text or f"{len(raw.opens_s)} bars, {len(answer.bars)} of them in the window"
        self.evidence.append(Evidence(asked_at=event.at, duration=str(asked.duration), end=asked.end, text=text))
        return answer

    def hold(self, bars: pd.DataFrame) -> None:
        """Count ``bars`` as held from now on; they are written before anything else is asked."""
        opens = opens_of(bars)
        known = self.load.known
        self._arrived = np.union1d(self._arrived, opens)
        self._fresh = np.union1d(self._fresh, opens[~known.held.contains(opens)])
        known.held = known.held.add(opens)
        self._unwritten = merge_bars(self._unwritten, bars).bars if len(self._unwritten) else bars

    # -- actions ------------------------------------------------------------------------------------------------------

    def then(self, action: Ask | AskHead | End) -> list[Action]:
        """``action``, after what arrived is in the file: an interruption loses one answer at most."""
        if not len(self._unwritten):
            return self._go(action)
        self._deferred, self.state = action, State.WRITING
        return [self._write(None)]

    def settle(self, claims: Claims, *, whole: bool = False) -> list[Action]:
        """Write what arrived and ``claims`` in one step."""
        self.state = State.SETTLING
        return [self._write(claims, whole=whole)]

    def _write(self, claims: Claims | None, *, whole: bool = False) -> Write:
        self._comparing, self._uncompared = self._uncompared, []
        return Write(self.number, self._unwritten, self.request.window, claims, self._comparing, whole)

    def _go(self, action: Ask | AskHead | End) -> list[Action]:
        if isinstance(action, End):
            if self._uncompared and not self.load.known.held.is_empty:
                # The episode may end, but another price scale is the end of the load: the next window must not mix the two.
                self._deferred, self.state = action, State.WRITING
                return [self._write(None)]
            self.error = action.error
            self.state = State.PUT_OFF if action.error is None else State.FAILED
            return []
        self.state = State.AWAITING_HEAD if isinstance(action, AskHead) else self.asking_state
        return [action]

    @property
    def asking_state(self) -> State:
        """The state while a request other than the planned one is out."""
        return State.PROBING

    # -- transitions that all kinds share -------------------------------------------------------------------------------

    def resume(self, event: HeadFound) -> list[Action]:
        """The head timestamp is known, to all episodes of the load."""
        load = self.load
        load.head, load.head_asked_at, load.head_is_asked = event.head, event.at, True
        return self.decide()

    def go_on(self, event: Stored) -> list[Action]:
        """The bars are in the file: carry out what waited for that."""
        self._count(event)
        assert self._deferred is not None
        if not isinstance(self._deferred, End):
            self.refuse_vanished()
        return self._go(self._deferred)

    def finish(self, event: Stored) -> list[Action]:
        """Bars and claims are in the files."""
        self._count(event)
        self.refuse_vanished()
        self.state = State.COMPLETE
        return []

    def fail(self, event: Refused) -> list[Action]:
        """The action failed. What the store refused is not held. Bars with bad values are refused before their price scale is
        compared: that comes next, without the bars."""
        is_comparison = self.state is State.WRITING and not len(self._unwritten)
        if self.state is State.AWAITING_HEAD:
            self.load.head_is_asked = True  # once a load, whatever came back
        if event.held is not None:
            self.load.known.held = event.held
        elif len(self._unwritten):
            self.load.known.held = self.load.known.held.remove(self._fresh)
        self._unwritten, self._fresh = empty_bars(), self._fresh[:0]
        if isinstance(event.error, ScaleChanged):
            return self._go(End(event.error))
        if is_comparison and isinstance(self._deferred, End) and self._deferred.error is not None:
            return self._go(self._deferred)
        if not is_comparison and isinstance(event.error, DataError):
            self._uncompared = [*self._comparing, *self._uncompared]
        return self._go(End(event.error))

    def _count(self, event: Stored) -> None:
        written, self._unwritten = self._unwritten, empty_bars()
        self._fresh = self._fresh[:0]
        self._comparing = []
        load = self.load
        if event.sidecar is not None:
            load.known.sidecar = event.sidecar
        if event.held is not None:
            load.known.held = event.held
        self.rows += event.added
        load.report.fetched_bars += event.added
        load.report.revised_bars += event.revised
        self.report_written(event, written)

    def report_written(self, event: Stored, written: pd.DataFrame) -> None:
        """Count the ``written`` bars that the calendar does not expect, and say that held ones have other values now."""
        report = self.load.report
        expected = bars_inside(
            self.load.all_expected, self.request.window
        )  # a bar to compare with may lie outside the run
        unexpected = find_unexpected(expected, opens_of(written), self.load.series.timeframe)
        report.unexpected_bars += int(unexpected.sum())
        if event.first_revised is not None:
            first = format_instant(event.first_revised)
            report.notices.append(
                f"IB now has other values than the file for {event.revised} bar{'s' * (event.revised != 1)}, first {first}; "
                "the file has the new values"
            )

    def refuse_vanished(self) -> None:
        """Bars that were held or that an answer brought, and that the file does not hold, were taken away by another program: no
        evidence of anything.

        Raises:
            DataError: there are such bars.
        """
        missing: ExpectedBars = self.load.known.find_missing(self.wanted)
        if not len(missing):
            return
        was_there = ~np.isin(missing.opens, self._missing_before.opens)
        vanished = int((was_there | match_held(missing, self._arrived, self.load.series.timeframe)).sum())
        if vanished:
            raise DataError(
                f"{vanished} bars that were held or that IB sent are not in the file: another program changed it meanwhile",
                doing=self.doing,
                advice="Close the file there (an editor, a copy under way) and run the load again.",
            )
