"""One planned request, from the question to the proof: fetch, cut, check, write, ask again for what is lacking.

`series_load.py` decides which requests there are and what they complete; here each is settled: its bars are in the file, its
holes are proven (by `evidence.py`, or by an answer and IB's head timestamp together), or it has failed. Which requests confirm a
hole is chosen in `probes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.bars.alignment import (
    list_lacking_beside_unexpected,
    refuse_ambiguous_labels,
    refuse_disagreement,
)
from ktrdr_pipelines.bars.answer import Answer, IntArray
from ktrdr_pipelines.bars.restatement import RESTATED_KINDS, find_ratio, report_split
from ktrdr_pipelines.bars.schema import (
    LATEST_SESSION_END_S,
    NormalisedAnswer,
    empty_bars,
    normalise_answer,
    opens_of,
)
from ktrdr_pipelines.calendars import ExpectedBars, find_unexpected, match_held, period_keys
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import DataError, TransientError
from ktrdr_pipelines.loading.gateway_clock import GatewayClock
from ktrdr_pipelines.loading.hearing import Hearing
from ktrdr_pipelines.loading.history_source import History
from ktrdr_pipelines.loading.probes import Confirmation, confirm_holes
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.planning.coverage import bars_inside, widen
from ktrdr_pipelines.planning.open_ended import reshape_to_now
from ktrdr_pipelines.planning.requests import Request, find_gaps
from ktrdr_pipelines.store.sidecar import Evidence, HistoryStart, ProvenEmpty
from ktrdr_pipelines.store.store import Store

MAX_CONFIRMATIONS = 5
"""How often one window is asked again while each answer brings a few bars that the ones before lacked."""

INTRADAY_GRACE, DAILY_GRACE = (15 * 60, 24 * 3600), (24 * 3600, 4 * 24 * 3600)
"""Seconds. How long after its close the newest bar may come late (IB: seconds to minutes; daily bars up to settlement, hours);
and how far back the run of newest bars that is late with it may reach."""

MAX_FRUITLESS, WORDS_AFTER = 4, (1, 3)
"""How often holes are asked for again that one more answer in vain leaves in doubt; and after how many answers in vain nothing
but the holes is asked for, so that IB may say in words that there is nothing."""

SPARSE_AFTER = 3
"""So many confirmations in a row that brought nothing new make a series sparse."""


@dataclass(frozen=True)
class Loaded:
    """What became of one request: ``rows`` new in the file; ``pending`` bars are missing but may only be late; nothing was proven
    if it ``is_put_off``; ``history_start_s`` is set when it showed where history starts (epoch seconds)."""

    rows: int
    pending: ExpectedBars | None = None
    history_start_s: int | None = None
    is_put_off: bool = False


class Asker:
    """Settles the requests of one load, one after the other."""

    def __init__(
        self,
        series: Series,
        *,
        store: Store,
        history: History,
        limits: HistoryLimits,
        now: Callable[[], datetime],
        now_s: int,
        expected: ExpectedBars,
        all_expected: ExpectedBars,
        report: LoadReport,
    ) -> None:
        """``series`` is pinned. ``expected`` bars are complete at ``now_s`` (epoch seconds, by this machine);
        ``all_expected`` has those bars around them too that are not complete, to tell which bars of an answer are still
        forming. Counts go into ``report``."""
        self._series, self._store, self._history = series, store, history
        self._limits, self._now, self._own_now_s = limits, now, now_s
        self._clock = GatewayClock(series, history, now_s, report)
        self._expected, self._all_expected, self._report = expected, all_expected, report
        self._head: datetime | None = None
        self._head_is_asked = False
        self._agreed = 0
        self._was_wordless = True
        self._arrived = np.empty(0, np.int64)
        """Opens of the bars that the answers to the request at hand brought."""
        self._hearing = Hearing(series, store=store, limits=limits, all_expected=all_expected)
        self._unproven = expected.take(slice(0, 0))
        self._may_put_off = self._is_put_off = False

    @property
    def head(self) -> datetime | None:
        """IB's head timestamp as far as it was asked for."""
        return self._head

    @property
    def _now_s(self) -> int:
        return self._clock.now_s

    def find_held_back(self) -> TransientError | None:
        """See `GatewayClock.find_held_back`."""
        forming = self._expected.take(self._expected.closes > self._now_s)
        return self._clock.find_held_back(self.find_holes(forming))

    def load(self, request: Request, *, may_put_off: bool) -> Loaded:
        """Fetch, verify and write one planned request.

        ``may_put_off``: an empty window that only IB's head timestamp speaks for may be left for later, when bars are held that
        could disprove the head timestamp.

        Raises:
            KtrdrError: the window failed; bars that arrived before are in the file, nothing is claimed about the rest.
        """
        self._may_put_off, self._is_put_off = may_put_off, False
        wanted = bars_inside(self._expected, request.window)
        evidence: list[Evidence] = []
        self._was_wordless = True  # until a bar or IB's own "no data" arrives
        self._arrived = np.empty(0, np.int64)
        self._hearing.look_around(request.window, self._now_s)
        answer = self._fetch(request, evidence)
        doubted = answer if self._contradicts_calendar(answer, wanted) else None
        self._unproven = wanted.take(slice(0, 0))
        rows = self._write(request, answer) if doubted is None else 0
        # By the gateway's clock some may not be complete: they are not there yet, whatever it answers.
        expected = wanted.take(np.flatnonzero(wanted.closes <= self._now_s))
        holes = doubtful = self.find_holes(expected)
        asked, poor, fruitless, found = [request], 0, 0, len(holes)
        while len(doubtful) and (doubted is not None or not self._lie_before_head(holes, request, evidence)):
            if poor > MAX_CONFIRMATIONS:
                raise DataError(
                    f"{len(asked)} answers each brought a few other bars and {len(holes)} are still missing",
                    doing=f"loading {self._series} {request.window}",
                    advice="What arrived is in the file; run the load again.",
                )
            again = self._reshape(doubtful, asked, fruitless)
            if doubted is None:
                for other in again:
                    rows += self._write(other.request, self._fetch(other.request, evidence, from_s=other.from_s))
            else:
                others = [(o.request, self._fetch(o.request, evidence, from_s=o.from_s)) for o in again]
                refuse_disagreement(
                    self._series.timeframe,
                    f"loading {self._series} {request.window}",
                    self._expected,
                    doubted.bars,
                    [theirs.bars for _, theirs in others],
                )
                rows += self._write(request, doubted)
                holes, doubted = self.find_holes(holes), None
                found = len(holes)
                rows += sum(self._write(other, theirs) for other, theirs in others)
            asked += [other.request for other in again]
            before, holes = holes, self.find_holes(holes)
            poor += len(before) - len(holes) < len(before) / 10  # a gateway may send little at a time, and get there
            if len(holes) < len(before):
                fruitless, doubtful = 0, holes
                continue
            self._refuse_vanished(holes, request)
            if self._was_wordless:
                if self._lie_before_head(holes, request, evidence, is_repeated=True):
                    break
                raise TransientError(
                    f"{len(asked)} answers without a bar, and without a word that there are none",
                    advice="This is no proof of an empty window; run the load again.",
                )
            fruitless += 1
            doubtful = self._hearing.find_doubtful(holes)
            is_given_up = self._hearing.reach_the_end(doubtful) if len(doubtful) else False
            is_given_up |= fruitless > WORDS_AFTER[0]  # once newer bars are held they are looked at again
            if (is_given_up and self._hearing.are_newest(doubtful)) or self._hearing.are_beyond_reach(doubtful):
                self._unproven = self._hearing.leave_out_expired(doubtful, self._now_s)
                break
            if len(doubtful) and fruitless > MAX_FRUITLESS:
                self._hearing.refuse_unproven(doubtful, request, len(asked))
        self._refuse_vanished(holes, request)
        if len(asked) > 1 and len(holes) < len(expected):
            self._learn_sparseness(agreed=len(holes) == found)
        if self._is_put_off:
            return Loaded(rows, is_put_off=True)
        holes = wanted.take(np.flatnonzero(np.isin(wanted.opens, holes.opens) | (wanted.closes > self._now_s)))
        pending = self._prove(request.window, expected, holes, evidence)
        return Loaded(rows, pending, history_start_s=self._note_history_start(holes) if len(holes) else None)

    def _refuse_vanished(self, holes: ExpectedBars, request: Request) -> None:
        """Bars that an answer brought and the file lacks all the same were taken away by another program: they are no proof of
        anything.

        Raises:
            DataError: there are such bars.
        """
        vanished = int(match_held(holes, self._arrived, self._series.timeframe).sum()) if len(holes) else 0
        if vanished:
            raise DataError(
                f"{vanished} bars that IB sent are not in the file: another program changed it meanwhile",
                doing=f"loading {self._series} {request.window}",
                advice="Close the file there (an editor, a copy under way) and run the load again.",
            )

    def _reshape(self, holes: ExpectedBars, asked: Sequence[Request], fruitless: int) -> list[Confirmation]:
        """Requests for ``holes`` of another shape than those ``asked``, the last ``fruitless`` of them in vain."""
        if self._series.instrument.ends_now:
            again = reshape_to_now(self._series, holes, self._limits, self._own_now_s, previous=asked)
            return [Confirmation(again, again.window.start_s)]
        return confirm_holes(
            self._series.timeframe,
            holes,
            self._limits,
            expected=self._hearing.complete,
            heard=self._hearing.heard,
            previous=asked,
            attempt=len(asked),
            until_s=self._now_s,
            held=self._hearing.held,
            empty=self._hearing.empty_windows,
            fruitless=fruitless,
            # Bars that have nothing newer after them can only be proven by IB's words; others, if bars on both sides do not help.
            exactly=fruitless in WORDS_AFTER or self._hearing.reach_the_end(holes),
        )

    def _check_scale(self, raw: Answer, request: Request) -> None:
        """Compare every complete bar of an answer, inside the window or not, with what is held.

        Raises:
            ScaleChanged: they differ by a ratio.
        """
        if not len(raw.opens_s) or self._series.instrument.sec_type not in RESTATED_KINDS:
            return
        held = self._store.read_bars(
            self._series, Window.from_epoch(int(raw.opens_s.min()), int(raw.opens_s.max()) + 1)
        )
        may_roll = self._series.instrument.sec_type == "CONTFUT"
        ratio = find_ratio(held, raw, may_roll=may_roll) if len(held) else None
        if ratio is not None:
            raise report_split(self._series, held, raw, ratio).while_doing(f"loading {self._series} {request.window}")

    def _learn_sparseness(self, *, agreed: bool) -> None:
        """After a window with bars was asked for twice: a series whose second answers keep agreeing that some do not exist is
        sparse (illiquid minutes without trades). What it lacks is then kept as answered windows, not as a range for each minute.

        It is asked twice all the same: accepting a hole on one answer was tried, and a cut answer slipped through.
        """
        self._agreed = self._agreed + 1 if agreed else 0
        is_sparse = self._agreed >= SPARSE_AFTER and self._series.timeframe.is_intraday
        if is_sparse and not self._store.read_sidecar(self._series).sparse:
            self._store.note(self._series, now=self._now(), sparse=True)

    def _contradicts_calendar(self, answer: NormalisedAnswer, wanted: ExpectedBars) -> bool:
        """True if ``answer`` may be shifted. It is asked for again anyway, for what it lacks; until then it is not written."""
        lacking = list_lacking_beside_unexpected(opens_of(answer.bars), wanted, self._series.timeframe)
        return len(self.find_holes(lacking)) > 0

    def _fetch(self, request: Request, evidence: list[Evidence], *, from_s: int | None = None) -> NormalisedAnswer:
        raw = self._history.fetch(self._series, request)
        self._hearing.hear(raw, request, from_s)
        self._clock.doubt(raw.opens_s)
        self._check_scale(raw, request)
        answer = self._normalise(raw, request)
        self._was_wordless &= not len(raw.opens_s) and not raw.no_data_text
        text = raw.no_data_text or f"{len(raw.opens_s)} bars, {len(answer.bars)} of them in the window"
        evidence.append(Evidence(asked_at=self._now(), duration=str(request.duration), end=request.end, text=text))
        return answer

    def _write(self, request: Request, answer: NormalisedAnswer) -> int:
        if not len(answer.bars):
            return 0
        self._arrived = np.union1d(self._arrived, opens_of(answer.bars))
        if answer.volume_missing and self._series.instrument.has_volume:
            said = "IB sent no volume (-1) for some of the bars; 0 is stored for it"
            self._report.notices += [said] * (said not in self._report.notices)
        written = self._store.write(
            self._series,
            answer.bars,
            answered=None,
            source=self._history.source,
            now=self._now(),
        )
        expected = bars_inside(self._all_expected, request.window)  # a bar to compare with may lie outside the run
        self._report.fetched_bars += written.rows_added
        self._report.revised_bars += written.rows_revised
        self._report.unexpected_bars += int(
            find_unexpected(expected, opens_of(answer.bars), self._series.timeframe).sum()
        )
        if written.rows_revised:
            first = format_instant(written.revised_to["timestamp"].iloc[0].to_pydatetime())
            self._report.notices.append(f"IB answers {written.rows_revised} held bars differently now, first {first}")
        return written.rows_added

    def _normalise(self, raw: Answer, request: Request) -> NormalisedAnswer:
        # A request that ends inside a bar brings that bar cut off at its end: only what closed by then is whole.
        until_s = min(self._now_s, request.end.timestamp()) if self._series.timeframe.is_intraday else self._now_s
        refuse_ambiguous_labels(
            raw.opens_s,
            self._series,
            end_s=request.end.timestamp(),
            round_the_clock=self._all_expected.sessions_per_week > 5,
        )
        window = self._period_window(request.window)
        columns = {"timestamp": raw.opens_s, "open": raw.open, "high": raw.high, "low": raw.low, "close": raw.close}
        return normalise_answer(
            {**columns, "volume": raw.volume}, self._series, window, now_s=until_s, closes=self._closes_of
        )

    def _closes_of(self, opens_s: IntArray) -> IntArray:
        """When each bar is complete: by the calendar where it knows the bar, else at the latest that is thinkable."""
        timeframe = self._series.timeframe
        nominal = opens_s + timeframe.seconds + (0 if timeframe.is_intraday else LATEST_SESSION_END_S)
        if not len(self._all_expected):
            return nominal
        # A week or month may be labelled with any of its days.
        known, wanted = (period_keys(timeframe, stamps) for stamps in (self._all_expected.opens, opens_s))
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, self._all_expected.closes[at], nominal)

    def _period_window(self, window: Window) -> Window:
        """``window`` as bars are cut to it: for weeks and months it holds every label that one of its bars may carry."""
        if self._series.timeframe.seconds <= 86400:
            return window
        expected = bars_inside(self._expected, window)
        if not len(expected):
            return window
        days = np.arange(window.start_s // 86400 - 31, window.end_s // 86400 + 32, dtype=np.int64) * 86400
        keys = period_keys(self._series.timeframe, days)
        inside = days[np.isin(keys, period_keys(self._series.timeframe, expected.opens))]
        return Window.from_epoch(int(inside[0]), int(inside[-1]) + 86400)

    def find_holes(self, expected: ExpectedBars) -> ExpectedBars:
        """The bars of ``expected`` that are not in the file."""
        if not len(expected):
            return expected
        held = self._store.held_opens(
            self._series, widen(Window.from_epoch(int(expected.opens[0]), int(expected.opens[-1]) + 1))
        )
        return expected.take(np.flatnonzero(~match_held(expected, held, self._series.timeframe)))

    def _prove(
        self, window: Window, expected: ExpectedBars, holes: ExpectedBars, evidence: Sequence[Evidence]
    ) -> ExpectedBars:
        """Record that IB gave a verified answer for ``window``, and which of its bars are proven not to exist. Returns those that
        are not proven because they may only be late."""
        holes, pending = self._split_pending(holes)
        if len(pending):
            window = Window.from_epoch(window.start_s, max(window.start_s, int(pending.opens[0])))
        # Of a sparse series the answered window says it all; a range for each minute without a trade would swamp the sidecar.
        runs = [] if self._store.read_sidecar(self._series).sparse else find_gaps(expected, holes)
        proven = [
            ProvenEmpty(start=gap.window.start, end=gap.window.end, opens=gap.opens, evidence=tuple(evidence))
            for gap in runs
        ]
        self._store.write(
            self._series,
            empty_bars(),
            answered=window,
            proven_empty=proven,
            source=self._history.source,
            now=self._now(),
            complete_until=datetime.fromtimestamp(int(expected.closes[-1]), UTC) if len(expected) else None,
        )
        self._report.proven_empty += len(holes)
        extent = self._store.extent(self._series)
        if extent is not None:
            younger = holes.sessions[holes.opens > extent.first_open_s]
            self._report.empty_sessions += len(
                np.setdiff1d(younger, expected.sessions[~np.isin(expected.opens, holes.opens)])
            )
        return pending

    def describe_pending(self, pending: ExpectedBars) -> str:
        """What a person should know of bars that stay missing without a failure."""
        extent, first = self._store.extent(self._series), _instant(pending.opens[0])
        if extent is None or int(pending.opens[0]) > extent.last_open_s:
            return (
                f"{len(pending)} of the newest bars are not there yet, from {first}; they are asked for again next time"
            )
        return (
            f"{len(pending)} bars are missing, from {first}, and IB does not prove that they do not exist; they are asked for "
            "again next time. If history begins later, give a later --start"
        )

    def _split_pending(self, holes: ExpectedBars) -> tuple[ExpectedBars, ExpectedBars]:
        """Holes that answers can prove, and those that they cannot: closed a moment ago with nothing newer held (IB may be late,
        and two questions within a second agree about nothing but that), or newest and without a word of IB's."""
        extent = self._store.extent(self._series)
        grace_s, run_s = INTRADAY_GRACE if self._series.timeframe.is_intraday else DAILY_GRACE
        is_newest = np.ones(len(holes), np.bool_) if extent is None else holes.opens > extent.last_open_s
        is_late = bool((is_newest & (holes.closes > self._now_s - grace_s)).any())
        is_pending = is_newest & (holes.closes > self._now_s - run_s) & is_late
        is_pending |= holes.closes > self._now_s
        is_pending |= np.isin(holes.opens, self._unproven.opens)
        return holes.take(np.flatnonzero(~is_pending)), holes.take(np.flatnonzero(is_pending))

    def _lie_before_head(
        self, holes: ExpectedBars, request: Request, evidence: list[Evidence], *, is_repeated: bool = False
    ) -> bool:
        """True if ``holes`` are all older than anything held, and IB's head timestamp says too that they do not exist.

        The head timestamp alone proves nothing (it can be too late), an answer alone neither; together they are two
        sources. It is asked for once, and only when an answer is empty at its old end. An empty answer without a word counts
        only once it ``is_repeated``.
        """
        extent = self._store.extent(self._series)
        if extent is not None and extent.first_open_s <= int(holes.opens[-1]):
            return False
        head_s = self._find_head_s()
        if (self._was_wordless and not is_repeated) or head_s is None or head_s <= int(holes.opens[-1]):
            return False
        if (
            extent is not None
            and ((self._expected.opens >= head_s) & (self._expected.opens < extent.first_open_s)).any()
        ):
            # It promises bars that are not held: then it may be wrong about older ones too. Later they may be.
            self._is_put_off = self._was_wordless and self._may_put_off
            return self._is_put_off
        if extent is None and self._may_put_off:
            self._is_put_off = True  # until bars are held, which may disprove the head timestamp
            return True
        evidence.append(
            Evidence(asked_at=self._now(), duration="", end=request.end, text=f"head timestamp {_instant(head_s)}")
        )
        return True

    def _find_head_s(self) -> int | None:
        """IB's head timestamp (of daily and longer bars its day), asked for once; None when there is none, or a held bar is older
        and disproves it."""
        if not self._head_is_asked:
            self._head_is_asked = True
            self._head = self._history.find_head(self._series.instrument)
        if self._head is None:
            return None
        head_s = int(self._head.timestamp())
        if not self._series.timeframe.is_intraday:
            head_s -= head_s % 86400
        extent = self._store.extent(self._series)
        return None if extent is not None and extent.first_open_s < head_s else head_s

    def _note_history_start(self, holes: ExpectedBars) -> int | None:
        """If the proven holes lie right before the first held bar, and not before IB's head timestamp either: that bar is
        where history starts (epoch seconds), and nothing older needs to be asked for, now or ever."""
        extent = self._store.extent(self._series)
        head_s = self._find_head_s() if self._head_is_asked else None
        if extent is None or head_s is None or head_s <= int(holes.opens[-1]):
            return None
        before = self._expected.opens[self._expected.opens < extent.first_open_s]
        if not len(before) or int(before[-1]) not in holes.opens:
            return None
        start = datetime.fromtimestamp(extent.first_open_s, UTC)
        known_by = f"nothing right before it, and IB's head timestamp is {_instant(head_s)}"
        self._store.note(self._series, now=self._now(), history_start=HistoryStart(open=start, known_by=known_by))
        return extent.first_open_s


def _instant(second: int | np.int64) -> str:
    return format_instant(datetime.fromtimestamp(int(second), UTC))
