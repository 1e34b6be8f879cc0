"""The episode of an ordinary window: ask, write what came, probe for what is missing, settle.

What an answer shows of missing bars is judged in `evidence.py`, which request would settle them is chosen in `probes.py`, what is
claimed at the end in `claims.py`. Here is only the order of things; `TRANSITIONS` is its specification.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

import numpy as np

from ktrdr_pipelines.bars.alignment import list_missing_beside_unexpected, refuse_disagreement
from ktrdr_pipelines.bars.answer import NormalisedAnswer
from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.errors import DataError, TransientError
from ktrdr_pipelines.loading.actions import Action, Answered, Ask, AskHead, HeadFound, Refused, Start, Stored
from ktrdr_pipelines.loading.claims import describe_head, make_claims
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.episode import End, Episode, State, Transitions
from ktrdr_pipelines.loading.probes import Probe, choose_probes
from ktrdr_pipelines.planning.open_ended import reshape_to_now
from ktrdr_pipelines.planning.requests import Request

MAX_POOR_ROUNDS = 5
"""How often one window is asked for again while each round of probes brings only a few of its missing bars."""

MAX_WITHOUT_PROGRESS, EXACT_AFTER = 4, (1, 3)
"""How many rounds of probes may bring nothing and still leave doubt; and after how many of them nothing but the missing bars
is asked for, so that IB may report "no data"."""


class HeadVerdict(Enum):
    """What IB's head timestamp shows of missing bars."""

    UNKNOWN = "it has to be asked for first"
    SILENT = "nothing"
    ABSENT = "they are absent: history starts after them"
    PUT_OFF = "they seem absent, and held bars may yet disprove it"


class WindowEpisode(Episode):
    """Settles the window of one planned request."""

    def __init__(
        self,
        number: int,
        request: Request,
        load: LoadContext,
        *,
        may_put_off: bool = False,
        may_shrink: bool = False,
    ) -> None:
        """``may_put_off``: an empty window that only IB's head timestamp speaks for may be left for later, when bars are
        held that could disprove the head timestamp. ``may_shrink``: as in `actions.Ask`."""
        super().__init__(number, request, load)
        self.may_shrink = may_shrink
        self._may_put_off = may_put_off
        self._expected = self._missing = self._doubtful = self._unproven = self.wanted.take(slice(0, 0))
        self._doubted: NormalisedAnswer | None = None
        self._others: list[NormalisedAnswer] = []
        self._queue: deque[Probe] = deque()
        self._poor_rounds = self._without_progress = self._found = 0
        self._is_stalled = False

    # -- transitions --------------------------------------------------------------------------------------------------

    def start(self, _: Start) -> list[Action]:
        self.asked.append(self.request)
        self.state = State.ASKED
        return [Ask(self.number, self.request, may_shrink=self.may_shrink)]

    def take_first(self, event: Answered) -> list[Action]:
        """The answer to the planned request."""
        self.answer_times = (len(event.answer.opens_s), event.seconds)
        answer = self.take(event, self.request, self.request)
        if self._contradicts_calendar(answer):
            self._doubted = answer
        else:
            self._hold(answer)
        # By the gateway's clock some may not be complete: they are not there yet, whatever it answers.
        self._expected = self.wanted.complete_at(self.load.clock.now_s)
        self._missing = self._doubtful = self.load.known.find_missing(self._expected)
        self._found = len(self._missing)
        return self.decide()

    def take_probe(self, event: Answered) -> list[Action]:
        """The answer to a probe."""
        probe = self._queue.popleft()
        self._hold(self.take(event, probe.request, probe.request, probe.from_s))
        return self._ask_next() if self._queue else self._end_round()

    def take_second_opinion(self, event: Answered) -> list[Action]:
        """An answer beside the one that contradicts the calendar, which stands if the others repeat it where they overlap."""
        probe = self._queue.popleft()
        self._others.append(self.take(event, probe.request, probe.request, probe.from_s))
        if self._queue:
            return self._ask_next()
        assert self._doubted is not None
        others = [other.bars for other in self._others]
        refuse_disagreement(self.load.series.timeframe, self.doing, self.load.expected, self._doubted.bars, others)
        self._hold(self._doubted)
        self._doubted = None
        self._missing = self.load.known.find_missing(self._missing)
        self._found = len(self._missing)
        for other in self._others:
            self._hold(other)
        return self._end_round()

    # -- decisions ----------------------------------------------------------------------------------------------------

    def decide(self) -> list[Action]:
        """See `Episode.decide`."""
        if self._is_stalled and (stalled := self._decide_without_progress()) is not None:
            return stalled
        if not len(self._doubtful):
            if self._doubted is not None:
                self._hold(self._doubted)
            return self._settle()
        if self._doubted is None and (early := self._decide_by_head(is_repeated=False)) is not None:
            return early
        if self._poor_rounds > MAX_POOR_ROUNDS:
            raise DataError(
                f"{len(self.asked)} answers each brought a few other bars and {len(self._missing)} are still missing",
                doing=self.doing,
                advice="What arrived is in the file; run the load again.",
            )
        self._queue.extend(self._choose_probes())
        return self._ask_next()

    def _decide_without_progress(self) -> list[Action] | None:
        """After a round of probes that brought no missing bar; None: the doubtful ones are to be asked for again."""
        if self.has_no_word:
            if (early := self._decide_by_head(is_repeated=True)) is not None:
                return early
            raise TransientError(
                f'{len(self.asked)} answers without a bar, and without IB\'s "no data"',
                doing=self.doing,
                advice="This is no evidence of an empty window; run the load again.",
            )
        self._doubtful = self.seen.find_doubtful(self._missing)
        # Once newer bars are held these are looked at again.
        is_given_up = self._without_progress > EXACT_AFTER[0]
        is_given_up |= len(self._doubtful) > 0 and self.seen.reach_the_end(self._doubtful)
        if (is_given_up and self.seen.are_newest(self._doubtful)) or self.seen.are_beyond_reach(self._doubtful):
            self._unproven = self.seen.leave_out_expired(self._doubtful, self.load.clock.now_s)
            return self._settle()
        if len(self._doubtful) and self._without_progress > MAX_WITHOUT_PROGRESS:
            raise self.seen.explain_doubt(self._doubtful, self.request)
        return None

    def _decide_by_head(self, *, is_repeated: bool) -> list[Action] | None:
        verdict = self._judge_by_head(is_repeated=is_repeated)
        if verdict is HeadVerdict.UNKNOWN:
            return self.then(AskHead(self.number))
        if verdict is HeadVerdict.PUT_OFF:
            return self.then(End())
        if verdict is HeadVerdict.ABSENT:
            self.evidence.append(describe_head(self.load, self.request))
            return self._settle()
        return None

    def _judge_by_head(self, *, is_repeated: bool) -> HeadVerdict:
        """Whether the missing bars are all older than anything held, and IB's head timestamp shows too that they are absent.

        The head timestamp alone is no evidence (it can be too late), an answer alone neither; together they are two sources.
        It is asked for once a load, and only when an answer is empty at its old end. An empty answer without IB's "no data"
        counts only once it ``is_repeated``.
        """
        load, first_s, last = self.load, self.load.known.held.first_s, int(self._missing.opens[-1])
        if first_s is not None and first_s <= last:
            return HeadVerdict.SILENT
        if not load.head_is_asked:
            return HeadVerdict.UNKNOWN
        head_s = load.head_s
        if (self.has_no_word and not is_repeated) or head_s is None or head_s <= last:
            return HeadVerdict.SILENT
        if first_s is None:
            return HeadVerdict.PUT_OFF if self._may_put_off else HeadVerdict.ABSENT
        if ((load.expected.opens >= head_s) & (load.expected.opens < first_s)).any():
            # It promises bars that are not held: then it may be wrong about older ones too. Later they may be held.
            return HeadVerdict.PUT_OFF if self.has_no_word and self._may_put_off else HeadVerdict.SILENT
        return HeadVerdict.ABSENT

    def _settle(self) -> list[Action]:
        self.refuse_vanished()
        if len(self.asked) > 1 and len(self._missing) < len(self._expected):
            self.load.agreed = self.load.agreed + 1 if len(self._missing) == self._found else 0
        # Forming bars, and those that were forming by a clock that the gateway's bars disproved since: nothing is known of them.
        late = np.isin(self.wanted.opens, self.load.known.find_missing(self.wanted).opens)
        late &= ~np.isin(self.wanted.opens, self._expected.opens)
        late |= ~self.wanted.is_complete_at(self.load.clock.now_s)
        missing = self.wanted.take(np.flatnonzero(np.isin(self.wanted.opens, self._missing.opens) | late))
        unproven = self.wanted.take(np.flatnonzero(np.isin(self.wanted.opens, self._unproven.opens) | late))
        return self.settle(make_claims(self, self._expected, missing, unproven))

    # -- probes -------------------------------------------------------------------------------------------------------

    @property
    def asking_state(self) -> State:
        """See `Episode.asking_state`."""
        return State.PROBING if self._doubted is None else State.DOUBTED

    def _ask_next(self) -> list[Action]:
        request = self._queue[0].request
        self.asked.append(request)
        return self.then(Ask(self.number, request))

    def _end_round(self) -> list[Action]:
        before, self._missing = self._missing, self.load.known.find_missing(self._missing)
        brought = len(before) - len(self._missing)
        self._poor_rounds += brought < len(before) / 10  # a gateway may send few bars at a time, and get there
        self._is_stalled = not brought
        if brought:
            self._without_progress, self._doubtful = 0, self._missing
        else:
            self.refuse_vanished()
            self._without_progress += not self.has_no_word
        return self.decide()

    def _choose_probes(self) -> list[Probe]:
        load, asked = self.load, self.asked
        if load.series.instrument.ends_now:
            again = reshape_to_now(load.series, self._doubtful, load.limits, load.own_now_s, previous=asked)
            return [Probe(again, again.window.start_s)]
        return choose_probes(
            load.series.timeframe,
            self._doubtful,
            load.limits,
            expected=self.seen.complete,
            answers=self.seen.answers,
            previous=asked,
            attempt=len(asked),
            until_s=load.clock.now_s,
            held=load.known.held.near(self.seen.complete),
            empty=load.known.sidecar.empty_windows,
            without_progress=self._without_progress,
            # Bars with nothing newer after them can only be confirmed by IB's "no data"; others, if both sides do not help.
            exactly=self._without_progress in EXACT_AFTER or self.seen.reach_the_end(self._doubtful),
        )

    # -- answers ------------------------------------------------------------------------------------------------------

    def _hold(self, answer: NormalisedAnswer) -> None:
        if not len(answer.bars):
            return
        self.hold(answer.bars)
        if answer.volume_missing and self.load.series.instrument.has_volume:
            notice = "IB sent no volume (-1) for some of the bars; 0 is stored for it"
            self.load.report.notices += [notice] * (notice not in self.load.report.notices)

    def _contradicts_calendar(self, answer: NormalisedAnswer) -> bool:
        """True if ``answer`` may be shifted. It is asked for again anyway, for what it does not contain; until then it is not
        written."""
        beside = list_missing_beside_unexpected(opens_of(answer.bars), self.wanted, self.load.series.timeframe)
        return len(self.load.known.find_missing(beside)) > 0


TRANSITIONS: Transitions = {
    (State.PLANNED, Start): WindowEpisode.start,
    (State.ASKED, Answered): WindowEpisode.take_first,
    (State.DOUBTED, Answered): WindowEpisode.take_second_opinion,
    (State.PROBING, Answered): WindowEpisode.take_probe,
    (State.AWAITING_HEAD, HeadFound): WindowEpisode.resume,
    (State.WRITING, Stored): WindowEpisode.go_on,
    (State.SETTLING, Stored): WindowEpisode.finish,
    **{
        (state, Refused): WindowEpisode.fail
        for state in (
            State.ASKED,
            State.DOUBTED,
            State.PROBING,
            State.AWAITING_HEAD,
            State.WRITING,
            State.SETTLING,
        )
    },
}
WindowEpisode.transitions = TRANSITIONS
