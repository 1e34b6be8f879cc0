"""The load of one series as a state machine: which request comes next, what became of it, what is complete now.

No I/O, no clock, no store, in the manner of h11: `start`, `open_next` and `receive` return actions (`actions.py`), whoever
drives the machine carries them out in order and gives each result back (`driver.py`). What one request needs until it is
settled is an episode (`window_episode.py`, `whole_episode.py`); here is what lies between the episodes:

1. what is missing of the window becomes the fewest requests (`load_plan.py`)
2. requests that a found start of history has answered are not made; those that it puts in doubt come last
3. a failed request does not stop the others, unless the next one cannot fare better
4. requests overlap, but their answers are taken in the planned order, so that every decision is the one that would be made if
   they were asked one by one, and bars arrive in the file in order
5. bars that were the newest when they were asked for are looked at once more when newer ones are held
6. partitions are reported as complete when they are, and what is left unfinished is remembered
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.bars.restatement import RESTATED_KINDS, ScaleChanged
from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.errors import (
    BugError,
    DataError,
    GatewayUnreachable,
    KtrdrError,
    RequestTimeout,
    StoreError,
    TransientError,
)
from ktrdr_pipelines.loading.actions import (
    Action,
    Answered,
    Begin,
    Begun,
    Input,
    Refused,
    Remember,
    Report,
    Start,
)
from ktrdr_pipelines.loading.claims import describe_pending
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.episode import Episode, State
from ktrdr_pipelines.loading.gateway_clock import GatewayClock
from ktrdr_pipelines.loading.knowledge import Knowledge
from ktrdr_pipelines.loading.load_plan import plan_load
from ktrdr_pipelines.loading.missing import MissingBars
from ktrdr_pipelines.loading.report import Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.loading.sizes import RequestSizes
from ktrdr_pipelines.loading.whole_episode import WholeEpisode
from ktrdr_pipelines.loading.window_episode import WindowEpisode
from ktrdr_pipelines.planning.coverage import unfinished_from, unfinished_until
from ktrdr_pipelines.planning.requests import Request, plan_requests


class LoadMachine:
    """One load of one series. ``report`` is true at every moment."""

    def __init__(
        self,
        series: Series,
        window: Window,
        known: Knowledge,
        limits: HistoryLimits,
        *,
        now: datetime,
        report: LoadReport,
        recheck_last: bool = False,
    ) -> None:
        """``window`` (not empty) is what was asked for; its end may lie after ``now``. ``known``: what the files hold of it.
        ``recheck_last``: if anything is asked at all, the last held bar is asked again (tail).

        Raises:
            InputError: no calendar is known for the instrument.
        """
        self.report = report
        self.plan = plan = plan_load(series, window, known, limits, now=now, recheck_last=recheck_last)
        now_s = int(now.timestamp())
        clock = GatewayClock(series.timeframe, now_s, report)
        self._load = LoadContext(series, limits, now_s, plan.expected, plan.all_expected, known, clock, report)
        self._window = window
        self._missing = MissingBars(self._load, plan)
        self._waiting: deque[Request] = deque()
        self._skipped: deque[Request] = deque()  # wholly before IB's head timestamp, oldest first
        self._pending: list[ExpectedBars] = []
        self._second_looks: deque[Request] = deque()
        self._looking_at: ExpectedBars | None = None
        self._open: dict[int, Episode] = {}  # in the order of their opening
        self._results: dict[int, Input] = {}
        """Results for open episodes before which others have to be settled."""
        self._sizes = RequestSizes(series.timeframe, limits)
        self._is_beginning = False
        self.is_over = False
        """Nothing is open, and nothing more can be opened: `finish` is next."""
        self._opened = self._done = 0
        self._planned = len(plan.requests)
        self._is_second_look = False
        self._is_stopped = False
        anchors = (plan.anchor_s, known.held.last_s if recheck_last else None)
        self._compared_s = [s for s in anchors if s is not None]
        """Held bars that are asked for again, to compare them: their opens, epoch seconds."""
        self._everything = _enclose(plan.requests) if plan.requests else None
        report.gaps_analyzed, report.requests_planned = len(plan.gaps), len(plan.requests)

    # -- the interface ------------------------------------------------------------------------------------------------

    def start(self) -> list[Action]:
        """The plan, the partitions that are complete already, and `Begin` when something has to be asked."""
        actions: list[Action] = [Report(Planned(self.plan.gaps, self.plan.requests))]
        for partition in self.plan.partitions:
            actions += self._missing.report_if_complete(partition)
        if self.plan.unreachable is not None:
            actions.append(self._fail(*self.plan.unreachable))
        if self.plan.requests:
            self._is_beginning = True
            actions.append(self._begin())
        return actions

    def begun(self, result: Begun | Refused) -> list[Action]:
        """The result of `Begin`."""
        self._is_beginning = False
        if isinstance(result, Refused):
            self._is_stopped = True
            assert self._everything is not None
            return [self._fail(self._everything, result.error)]
        self._load.series = Series(result.instrument, self._load.series.timeframe)
        self._load.clock.lag_s = result.clock_lag_s
        known = self._load.known
        if result.held is not None:
            known.held = result.held
        known.sidecar = known.sidecar.model_copy(update=self._unfinished)
        self._waiting.extend(self.plan.requests)
        return []

    def open_next(self) -> list[Action]:
        """Open the next episode, if there is one: its `Ask`. Requests that are not needed any more are reported as done.
        Empty when nothing more can be opened now; `is_over` shows whether that is the end."""
        actions: list[Action] = []
        if self._is_beginning:
            return actions
        while not any(not isinstance(action, Report) for action in actions):
            request = self._choose_next()
            if request is None:
                self.is_over = not self._open
                break
            if not self._is_second_look and not self._is_needed(request):
                self._done += 1
                actions.append(Report(Fetched(request, 0, self._done, self._planned)))
                actions += self._missing.report_touched(request, 0)
                continue
            episode = self._make_episode(request)
            self._open[episode.number] = episode
            actions += episode.receive(Start())
        return actions

    def receive(self, number: int, event: Input) -> list[Action]:
        """Give the result of an action to the episode that waits for it; at once if it is the first open one, else when those
        before it are settled. Results for episodes that a failure of the whole load has closed are ignored.

        Raises:
            BugError: no such episode was opened, or the input does not belong to its state.
        """
        if not 0 < number <= self._opened:
            raise BugError(f"episode {number} of the load of {self._load.series} was never opened")
        if number in self._open:
            self._results[number] = event
        actions: list[Action] = []
        while self._open and (first := next(iter(self._open))) in self._results:
            episode = self._open[first]
            actions += episode.receive(self._results.pop(first))
            if episode.is_final:
                del self._open[first]
                actions += self._close(episode)
        return actions

    @property
    def open_requests(self) -> int:
        """How many episodes are open."""
        return len(self._open)

    def finish(self, *, is_broken_off: bool = False) -> list[Action]:
        """The end, also of a load that ``is_broken_off``: the last failure, and what the next load has to remember."""
        actions: list[Action] = []
        if self._everything is not None and not self._is_stopped and not is_broken_off:
            forming = self._load.expected.take(~self._load.expected.is_complete_at(self._load.clock.now_s))
            held_back = self._load.clock.find_held_back(self._load.known.find_missing(forming))
            if held_back is not None:
                last = self.plan.requests[-1].window
                actions.append(self._fail(Window(last.start, self._everything.end), held_back))
        actions += self._remember_unfinished()
        if self._everything is not None or self.plan.unreachable is not None:
            self._sum_up()
        return actions

    # -- which request is next ----------------------------------------------------------------------------------------

    def _choose_next(self) -> Request | None:
        """The next request to open. What was skipped needs asking after all when the start of history could not be shown to lie
        later; bars that were the newest are looked at again at the end."""
        if self._is_stopped:
            return None
        if self._open and (not self._waiting or self._must_be_alone()):
            return None
        if self._waiting:
            return self._waiting.popleft()
        if self._skipped:
            return self._skipped.pop()
        if not self._second_looks:
            self._prepare_second_look()
        if not self._second_looks:
            return None
        self._is_second_look = True
        return self._second_looks.popleft()

    def _must_be_alone(self) -> bool:
        """True while what is open decides whether the next request is made at all: one that compares price scales; the last held
        bar; one older than anything held, which may lie before the start of history."""
        first_s = self._load.known.held.first_s
        if first_s is None or self._waiting[0].window.start_s < first_s:
            return True
        open_windows = [episode.request.window for episode in self._open.values()]
        return any(window.start_s < first_s or self._find_compared(window) for window in open_windows)

    def _prepare_second_look(self) -> None:
        """Bars that were the newest when they were asked for and are not any more: those after them can show now whether they
        exist."""
        self._end_second_look()
        while self._pending and not self._second_looks:
            self._looking_at = bars = self._pending.pop(0)
            last_s = self._load.known.held.last_s
            if last_s is not None and last_s >= bars.opens[-1] and not self._load.series.instrument.ends_now:
                self._second_looks.extend(plan_requests(self._load.series.timeframe, bars, self._load.limits))
            else:
                self._end_second_look()

    def _end_second_look(self) -> None:
        if self._looking_at is not None:
            missing = self._missing.all()
            still = self._looking_at.take(np.flatnonzero(np.isin(self._looking_at.opens, missing.opens)))
            self.report.notices += [describe_pending(self._load, still)] if len(still) else []
            self._looking_at = None

    def _make_episode(self, request: Request) -> Episode:
        self._opened += 1
        if self._load.series.instrument.refreshes_whole:
            return WholeEpisode(self._opened, request, self._load)
        return WindowEpisode(
            self._opened,
            request,
            self._load,
            may_put_off=bool(self._waiting),
            may_shrink=self._may_divide(request),
        )

    def _may_divide(self, request: Request) -> bool:
        """A request up to now cannot be divided: all parts would be answered with the newest bars."""
        is_fixed = self._is_second_look or self._load.series.instrument.ends_now
        return not is_fixed and self._sizes.may_shrink(self._bars_of(request))

    def _divide(self, request: Request) -> list[Request]:
        """``request`` in parts of the present size; the one that compares price scales first: it decides about the others."""
        complete = self._load.all_expected.complete_at(self._load.own_now_s)
        parts = self._sizes.divide(request, self._bars_of(request), complete)
        self._planned += len(parts) - 1
        return sorted(parts, key=lambda part: not self._find_compared(part.window))

    def _bars_of(self, request: Request) -> ExpectedBars:
        """What ``request`` is for: the missing bars of its window, and held ones that are compared."""
        missing, compared = self._missing.inside(request.window), self._find_compared(request.window)
        if not compared:
            return missing
        bars = self._load.all_expected
        return bars.take(np.flatnonzero(np.isin(bars.opens, [*missing.opens.tolist(), *compared])))

    def _find_compared(self, window: Window) -> list[int]:
        """The held bars in ``window`` that are asked for again."""
        return [s for s in self._compared_s if window.start_s <= s < window.end_s]

    def _is_needed(self, request: Request) -> bool:
        """False if what ``request`` was planned for is known by now (it lies before the start of history)."""
        last_s = self._load.known.held.last_s
        is_recheck = last_s is not None and request.window.start_s <= last_s < request.window.end_s
        if self.plan.anchor_s is not None:
            is_recheck |= request.window.contains(datetime.fromtimestamp(self.plan.anchor_s, UTC))
        return is_recheck or self._missing.count(request.window) > 0

    # -- what became of a request -------------------------------------------------------------------------------------

    def _close(self, episode: Episode) -> list[Action]:
        request = episode.request
        if episode.state is State.FAILED:
            if isinstance(episode.error, RequestTimeout) and self._shrink_after_time_out(episode):
                return []
            return self._close_failed(episode)
        if self._sizes.note_answer(*episode.answer_times):
            self._waiting = deque(part for each in self._waiting for part in self._divide(each))
        if episode.state is State.PUT_OFF:
            self._skipped.append(request)
        else:
            self._missing.settle(episode)
        actions: list[Action] = []
        if episode.state is State.COMPLETE:
            if not self._is_second_look:
                self._done += 1
                self.report.segments_fetched += 1
                self._pending += [episode.pending] if len(episode.pending) else []
                actions.append(Report(Fetched(request, episode.rows, self._done, self._planned)))
            actions += self._missing.report_touched(request, episode.rows)
        if self._load.head is not None and self._load.known.held.is_empty:
            head = self._load.head
            self._skipped += [r for r in self._waiting if r.window.end <= head]
            self._waiting = deque(r for r in self._waiting if r.window.end > head)
        return actions

    def _shrink_after_time_out(self, episode: Episode) -> bool:
        """Ask for the parts of a request that was too long to be answered in time; False when it cannot be smaller."""
        if len(episode.asked) > 1 or not self._may_divide(episode.request):
            return False
        self._sizes.note_time_out(len(self._bars_of(episode.request)))
        self._waiting.extendleft(reversed(self._divide(episode.request)))
        return True

    def _close_failed(self, episode: Episode) -> list[Action]:
        request, error = episode.request, episode.error
        assert error is not None
        self._missing.look_again(request.window)
        if self._is_second_look:
            return [self._fail(request.window, error)]
        if _concerns_all(error) or self._is_scale_unknown(episode):
            self._is_stopped = True
            given_up = [request, *self._give_up_open(error), *self._waiting, *self._skipped]
            self._waiting.clear()
            self._skipped.clear()
            return [self._fail(_enclose(given_up), error)]
        return [self._fail(request.window, error), *self._missing.report_touched(request, 0)]

    def _is_scale_unknown(self, episode: Episode) -> bool:
        """True if ``episode`` was to compare price scales and did not: bars of other requests could be on another one."""
        compared = self._find_compared(episode.request.window)
        is_restated = self._load.series.instrument.sec_type in RESTATED_KINDS
        return (
            is_restated and bool(compared) and not any(np.isin(compared, a.stamps).any() for a in episode.seen.answers)
        )

    def _give_up_open(self, error: KtrdrError) -> list[Request]:
        """The open requests that fail with ``error``; those that are answered go on, unless their bars could not be written."""
        keeps_answers = not isinstance(error, ScaleChanged | StoreError)
        given_up: list[Request] = []
        for number, episode in list(self._open.items()):
            result = self._results.get(number)
            if not (keeps_answers and isinstance(result, Answered)):
                given_up.append(episode.request)
                del self._open[number]
                self._results.pop(number, None)
        return given_up

    def _fail(self, window: Window, error: KtrdrError) -> Report:
        doing = f"loading {self._load.series} {window}"
        if str(self._load.series) not in error.doing:
            error.doing = f"{doing}: {error.doing}" if error.doing else doing
        failure = Failure(window, error)
        self.report.failures.append(failure)
        return Report(failure)

    # -- what is left for the next load -------------------------------------------------------------------------------

    def _begin(self) -> Begin:
        """Should this load fail or be killed half way, newer bars may be held than some it owes. The next tail or backfill would
        then pass over them."""
        first_s, last_s = self._load.known.held.first_s, self._load.known.held.last_s
        sidecar, requests = self._load.known.sidecar, self.plan.requests
        newer = [r.window.start for r in requests if last_s is None or r.window.end_s > last_s]
        older = [r.window.end for r in requests if first_s is not None and r.window.start_s < first_s]
        since = min([*newer, *filter(None, [sidecar.unfinished_from])], default=None)
        until = max([*older, *filter(None, [sidecar.unfinished_until])], default=None)
        self._unfinished = {"unfinished_from": since, "unfinished_until": until}
        return Begin(since, until)

    def _remember_unfinished(self) -> list[Action]:
        """What is still owed of what this and earlier loads were asked for. What lies outside of this load stays as it was."""
        sidecar, held = self._load.known.sidecar, self._load.known.held
        noted = (sidecar.unfinished_from, sidecar.unfinished_until)
        if noted == (None, None):
            return []
        missing = self._missing.all()
        ends = (held.first_s, held.last_s) if held.first_s is not None and held.last_s is not None else None
        since = unfinished_from(noted[0], self.plan.span, missing, ends)
        until = unfinished_until(noted[1], self.plan.span, missing, ends)
        return [Remember(since, until)] if (since, until) != noted else []

    def _sum_up(self) -> None:
        report = self.report
        if report.unexpected_bars or report.empty_sessions:
            report.notices.append(
                f"IB and the calendar disagree ({report.unexpected_bars} bars that it does not expect, "
                f"{report.empty_sessions} of its sessions without a bar); IB's bars are what is kept. "
                f"`ktrdr calendar {self._load.series.instrument.symbol}` compares the calendar with IB's schedule"
            )
        report.missing_bars = self._missing.count(self._window)
        if report.failures:
            report.status = "partial" if report.segments_fetched or report.fetched_bars else "failed"


def _enclose(requests: Sequence[Request]) -> Window:
    """From the oldest to the newest of ``requests``; the one that compares price scales is the first, wherever it lies."""
    return Window(min(r.window.start for r in requests), max(r.window.end for r in requests))


def _concerns_all(error: KtrdrError) -> bool:
    """True if the next window cannot fare better: bad bars or an unanswered request concern one window; a refusal, an
    unreachable gateway or a full disk concern all of them."""
    if isinstance(error, GatewayUnreachable | ScaleChanged):
        return True
    return not isinstance(error, DataError | TransientError)
