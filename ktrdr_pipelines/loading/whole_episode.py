"""The episode of a series that is refreshed whole: after a dividend or a split every adjusted bar is another one.

One request reaches from the first held bar to now, and its bars replace the file's in one atomic write. Two answers are
joined only where they agree bar by bar; when a held bar does not come again, the old file stays as it is.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.merging import merge_bars
from ktrdr_pipelines.bars.schema import empty_bars, opens_of
from ktrdr_pipelines.calendars import match_held
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import DataError, TransientError
from ktrdr_pipelines.loading.actions import Action, Answered, Ask, AskHead, HeadFound, Refused, Start, Stored
from ktrdr_pipelines.loading.claims import make_claims
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.episode import Episode, State, Transitions
from ktrdr_pipelines.planning.open_ended import reshape_to_now
from ktrdr_pipelines.planning.requests import Request

MAX_ANSWERS = 5


class WholeEpisode(Episode):
    """Settles the one request of a load that refreshes the whole series."""

    compares_scale = False  # that bars are restated is what this is for

    def __init__(self, number: int, request: Request, load: LoadContext) -> None:
        super().__init__(number, request, load)
        self._held_s = load.known.held.opens
        self._bars = empty_bars()
        """What all answers together brought."""
        self._expected = self._missing = self._doubtful = self.wanted.take(slice(0, 0))
        self._lost = np.empty(0, np.int64)
        self._not_brought: set[int] | None = None
        """Expected and held opens that no answer brought; None before the first."""

    def start(self, _: Start) -> list[Action]:
        return self._ask(self.request)

    def _ask(self, request: Request) -> list[Action]:
        self.asked.append(request)
        self.state = State.COLLECTING
        return [Ask(self.number, request)]

    def collect(self, event: Answered) -> list[Action]:
        """An answer for the whole series: asked again, in another shape, while answers differ in what they bring."""
        load, timeframe = self.load, self.load.series.timeframe
        fresh = self.take(event, self.asked[-1], self.request).bars
        merged = merge_bars(self._bars, fresh)
        self._bars = merged.bars if merged.revised_to.empty else fresh  # else all was restated in between
        opens = opens_of(self._bars)
        self._expected = self.wanted.complete_at(load.clock.now_s)
        self._missing = self._expected.take(np.flatnonzero(~match_held(self._expected, opens, timeframe)))
        self._lost = np.setdiff1d(self._held_s, opens, assume_unique=True)
        self._doubtful = self.seen.find_doubtful(self._missing)
        before, self._not_brought = self._not_brought, {*self._missing.opens.tolist(), *self._lost.tolist()}
        is_settled = not self._not_brought or (self._not_brought == before and self._is_clear)
        if is_settled or len(self.asked) >= MAX_ANSWERS:
            return self.decide()
        end_s = int(self.request.end.timestamp())
        return self._ask(reshape_to_now(load.series, self.wanted, load.limits, end_s, previous=self.asked))

    @property
    def _is_clear(self) -> bool:
        return not len(self._doubtful) or self.seen.are_beyond_reach(self._doubtful)

    def decide(self) -> list[Action]:
        """See `Episode.decide`."""
        self._refuse_incomplete()
        if len(self._doubtful) and not self.load.head_is_asked:
            return self.then(AskHead(self.number))
        unproven, head_s = self._doubtful, self.load.head_s
        if head_s is not None:
            unproven = unproven.take(np.flatnonzero(unproven.opens >= head_s))
        self.hold(self._bars)
        return self.settle(make_claims(self, self._expected, self._missing, unproven), whole=True)

    def _refuse_incomplete(self) -> None:
        """Raises:
        KtrdrError: the answers cannot replace the file, which stays as it is.
        """
        if self.has_no_word and not len(self._bars):
            raise TransientError(
                f'{len(self.asked)} answers without a bar, and without IB\'s "no data"',
                doing=self.doing,
                advice="This is no evidence of an empty window; run the load again.",
            )
        if len(self._lost):
            first = format_instant(datetime.fromtimestamp(int(self._lost[0]), UTC))
            raise DataError(
                f"IB's answer does not contain {len(self._lost)} of the {len(self._held_s)} held bars, the first {first}",
                doing=f"refreshing {self.load.series}",
                advice="Adjusted bars of different days do not go together: the file was left as it is. Move it away to "
                "begin anew with what IB has.",
            )
        if not self._is_clear:
            raise self.seen.explain_doubt(self._doubtful, self.request)

    def report_written(self, event: Stored, written: pd.DataFrame) -> None:  # noqa: ARG002 - restated bars are expected ones
        """See `Episode.report_written`."""
        if event.revised:
            self.load.report.notices.append(
                f"IB restated {event.revised} of {len(self._held_s)} held bars (a dividend or a split); all were replaced"
            )


TRANSITIONS: Transitions = {
    (State.PLANNED, Start): WholeEpisode.start,
    (State.COLLECTING, Answered): WholeEpisode.collect,
    (State.AWAITING_HEAD, HeadFound): WholeEpisode.resume,
    (State.SETTLING, Stored): WholeEpisode.finish,
    **{(state, Refused): WholeEpisode.fail for state in (State.COLLECTING, State.AWAITING_HEAD, State.SETTLING)},
}
WholeEpisode.transitions = TRANSITIONS
