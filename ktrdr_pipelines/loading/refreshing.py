"""Series that are asked for whole: after a dividend or a split every adjusted bar is another one.

Each load asks for everything from the first held bar to now in one request and replaces the file's bars in one atomic write.
Two answers are joined only where they agree bar by bar; a held bar that IB does not tell any more keeps the old file as it is.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import empty_bars, opens_of
from ktrdr_pipelines.calendars import match_held
from ktrdr_pipelines.errors import DataError, TransientError
from ktrdr_pipelines.loading.asking import Asker, Loaded
from ktrdr_pipelines.planning.coverage import bars_inside
from ktrdr_pipelines.planning.open_ended import reshape_to_now
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import Evidence
from ktrdr_pipelines.store.splice import merge_bars

MAX_ANSWERS = 5


class WholeAsker(Asker):
    """Settles the one request of a load that refreshes the whole series."""

    def load(self, request: Request, *, may_put_off: bool) -> Loaded:  # noqa: ARG002 - one request, nothing to put off
        """Fetch, verify and write everything at once.

        Raises:
            KtrdrError: the file is as before.
        """
        evidence: list[Evidence] = []
        self._was_wordless = True
        self._hearing.look_around(request.window, self._now_s)
        wanted = bars_inside(self._expected, request.window)
        held = self._store.read_bars(self._series)
        held_s = opens_of(held)
        before: set[int] | None = None
        bars, asked = empty_bars(), [request]
        while True:
            bars = self._join(bars, self._fetch_whole(asked[-1], request, evidence))
            expected = wanted.take(np.flatnonzero(wanted.closes <= self._now_s))
            opens_s = opens_of(bars)
            holes = expected.take(np.flatnonzero(~match_held(expected, opens_s, self._series.timeframe)))
            lost = held_s[~np.isin(held_s, opens_s)]
            lacking = {*holes.opens.tolist(), *lost.tolist()}
            doubtful = self._hearing.find_doubtful(holes)
            is_clear = not len(doubtful) or self._hearing.are_beyond_reach(doubtful)
            if not lacking or (lacking == before and is_clear) or len(asked) >= MAX_ANSWERS:
                break
            before = lacking
            asked.append(
                reshape_to_now(self._series, wanted, self._limits, int(request.end.timestamp()), previous=asked)
            )
        if self._was_wordless and not len(bars):
            raise TransientError(
                f"{len(asked)} answers without a bar, and without a word that there are none",
                advice="This is no proof of an empty window; run the load again.",
            )
        if len(lost):
            raise DataError(
                f"IB's answer lacks {len(lost)} of the {len(held_s)} held bars, the first "
                f"{pd.Timestamp(int(lost[0]), unit='s', tz='UTC'):%Y-%m-%dT%H:%M:%SZ}",
                doing=f"refreshing {self._series}",
                advice="Adjusted bars of different days do not go together: the file was left as it is. Move it away to "
                "begin anew with what IB has.",
            )
        if not is_clear:
            self._hearing.refuse_unproven(doubtful, request, len(asked))
        head_s = self._find_head_s() if len(doubtful) else None
        self._unproven = doubtful if head_s is None else doubtful.take(doubtful.opens >= head_s)
        rows = 0
        if len(bars):
            written = self._store.write(
                self._series, bars, answered=None, source=self._history.source, now=self._now(), whole=True
            )
            rows = written.rows_added
            self._report.fetched_bars += rows
            self._report.revised_bars += written.rows_revised
            if written.rows_revised:
                self._report.notices.append(
                    f"IB restated {written.rows_revised} of {len(held_s)} held bars (a dividend or a split); all were replaced"
                )
        pending = self._prove(request.window, expected, holes, evidence)
        return Loaded(rows, pending)

    def _fetch_whole(self, request: Request, planned: Request, evidence: list[Evidence]) -> pd.DataFrame:
        raw = self._history.fetch(self._series, request)
        self._hearing.hear(raw, request)
        self._clock.doubt(raw.opens_s)
        answer = self._normalise(raw, planned)
        self._was_wordless &= not len(raw.opens_s) and not raw.no_data_text
        text = raw.no_data_text or f"{len(raw.opens_s)} bars, {len(answer.bars)} of them in the window"
        evidence.append(Evidence(asked_at=self._now(), duration=str(request.duration), end=request.end, text=text))
        return answer.bars

    @staticmethod
    def _join(known: pd.DataFrame, fresh: pd.DataFrame) -> pd.DataFrame:
        """Both, or only ``fresh`` where they tell one bar differently: then everything was restated in between."""
        merged = merge_bars(known, fresh)
        return merged.bars if merged.revised_to.empty else fresh
