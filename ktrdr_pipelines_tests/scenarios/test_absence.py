"""Holes: whatever a gateway leaves out of all its answers in the same way, no existing bar is ever called proven empty.

Whole loads into files, from a history that cuts every answer alike; what really exists is drawn at random. The judgement of
single answers is in `loading/evidence.py`, the choice of the next question in `loading/probes.py`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.evidence import Doubt, Heard, judge_holes
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.durations import is_allowed, reach_back
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, IntArray, pick, raw_bars, utc, window

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""An example is a whole load: making a failing one smaller takes minutes."""

Cut = Callable[[int], IntArray]
"""How many bars an answer has -> the places of those that are sent."""


def _middle(size: int, rows: int, up: bool) -> IntArray:
    first = max(0, (size - rows + up) // 2)
    return np.r_[0:first, min(size, first + rows) : size]


CUTS: dict[str, Cut] = {
    "the first half": lambda n: np.arange(floor(n / 2)),
    "the first half, rounded up": lambda n: np.arange(ceil(n / 2)),
    "the first 90 %": lambda n: np.arange(ceil(n * 0.9)),
    "the first 99 %": lambda n: np.arange(floor(n * 0.99)),
    "the last half": lambda n: np.arange(n - floor(n / 2), n),
    "the last half, rounded up": lambda n: np.arange(n - ceil(n / 2), n),
    "the last 90 %": lambda n: np.arange(n - ceil(n * 0.9), n),
    "all but seven in the middle": lambda n: _middle(n, 7, up=False),
    "all but one in the middle": lambda n: _middle(n, 1, up=True),
    "all but every 10th": lambda n: np.flatnonzero(np.arange(n) % 10 != 9),
    "all but every 10th from the first": lambda n: np.flatnonzero(np.arange(n) % 10 != 0),
    "all but every 7th from the end": lambda n: np.flatnonzero((n - 1 - np.arange(n)) % 7 != 3),
    "every second": lambda n: np.arange(0, n, 2),
    "the newest 40": lambda n: np.arange(max(0, n - 40), n),
    "the oldest 40": lambda n: np.arange(min(n, 40)),
    "all but the first": lambda n: np.arange(1, n),
    "all but the last": lambda n: np.arange(n - 1),
    "all but the last three": lambda n: np.arange(max(0, n - 3)),
}


@dataclass
class CuttingHistory(FakeHistory):
    """Cuts every answer by ``cut``. ``counts_sessions``: D and W count days that have bars, so older ones come where a range is
    empty; else they are spans of the calendar."""

    cut: Cut | None = None
    counts_sessions: bool = False

    def fetch(self, series: Series, request: Request) -> RawBars:
        self.requests.append(request)
        assert is_allowed(series.timeframe, request.duration, HistoryLimits.CLASSIC)
        end_s = int(request.end.timestamp())
        opens = self.truth[self.truth < end_s]
        start_s = reach_back(end_s, request.duration)
        if self.counts_sessions and request.duration.unit in ("D", "W"):
            days = np.unique(opens // 86400)[-request.duration.count * {"D": 1, "W": 5}[request.duration.unit] :]
            start_s = min(start_s, int(days[0]) * 86400) if len(days) else start_s
        opens = opens[opens >= start_s]
        answer = raw_bars(opens, no_data_text="" if len(opens) else "HMDS query returned no data")
        return pick(answer, self.cut(len(opens))) if self.cut and len(opens) else answer


SPANS = {
    "1m": (window("2024-03-06", "2024-03-09"), timedelta(days=10)),
    "5m": (window("2024-03-04", "2024-03-13"), timedelta(days=12)),
    "1h": (window("2024-02-12", "2024-03-20"), timedelta(days=50)),
    "1d": (window("2023-08-01", "2024-03-20"), timedelta(days=900)),
}
SERIES = {name: Series(forex("EURUSD") if name == "5m" else stock("AAPL"), TIMEFRAMES[name]) for name in SPANS}


def draw_truth(data: st.DataObject, name: str, span: Window, margin: timedelta, *, cut: str = "") -> IntArray:
    """What exists: all but some single bars, some runs and perhaps everything before or after a day. Every n-th bar of a series
    that lacks a fifth of its bars anyway is no row that can be told from chance (`evidence.LONGEST_ROW`): there less is
    lacking."""
    around = expected_bars(SERIES[name], Window(span.start - margin, span.end + margin)).opens
    inside = np.flatnonzero((around >= span.start_s) & (around < span.end_s))
    exists = np.ones(len(around), np.bool_)
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    most = 3 if "every" in cut else 4
    share = data.draw(st.sampled_from([0.0, 0.003, 0.03, 0.2][:most]), label="share lacking")
    exists &= np.random.default_rng(seed).random(len(around)) >= share
    for _ in range(data.draw(st.integers(0, 3), label="runs")):
        first = data.draw(st.integers(int(inside[0]), int(inside[-1])))
        exists[first : first + data.draw(st.integers(1, 60))] = False
    if data.draw(st.booleans(), label="begins inside"):
        exists[: data.draw(st.integers(int(inside[0]), int(inside[-1])))] = False
    return around[exists]


def run(history: FakeHistory, name: str, span: Window, folder: Path) -> tuple[Load, Store]:
    store = Store(folder)
    job = Load(
        SERIES[name],
        span,
        store=store,
        history=lambda: history,
        limits=HistoryLimits.CLASSIC,
        now=lambda: utc("2024-06-15"),
    )
    list(job.run())
    return job, store


@pytest.mark.slow
@settings(max_examples=30, deadline=None, phases=PHASES)
@given(data=st.data(), name=st.sampled_from(list(SPANS)), cut=st.sampled_from(list(CUTS)))
def test_no_cut_of_all_answers_proves_an_existing_bar_empty(data: st.DataObject, name: str, cut: str) -> None:
    """The file equals the truth, or the load failed or owns up to what is missing; nothing that exists is called empty."""
    span, margin = SPANS[name]
    truth = draw_truth(data, name, span, margin, cut=cut)
    head = utc("2000-01-01") + timedelta(seconds=int(truth[0]) - utc("2000-01-01").timestamp()) if len(truth) else None
    history = CuttingHistory(
        truth,
        cut=CUTS[cut],
        counts_sessions=data.draw(st.booleans(), label="counts sessions"),
        head=head if data.draw(st.booleans(), label="tells its head") else None,
    )
    folder = Path(tempfile.mkdtemp())
    try:
        job, store = run(history, name, span, folder)
        inside = truth[(truth >= span.start_s) & (truth < span.end_s)]
        held = opens_of(store.read_bars(SERIES[name]))
        lost = inside[~np.isin(inside, held)]
        assert set(held.tolist()) <= set(truth.tolist())
        sidecar = store.read_sidecar(SERIES[name])
        for proven in sidecar.proven_empty:
            wrong = lost[(lost >= proven.start.timestamp()) & (lost < proven.end.timestamp())]
            assert not len(wrong), f"{len(wrong)} existing bars are called empty, first {wrong[0]}"
        if len(lost):
            assert job.report.missing_bars >= len(lost)
            assert job.report.failures or any("not there yet" in notice for notice in job.report.notices)
        for done in job.report.completed.values():
            mine = done.partition.window
            assert not ((lost >= mine.start_s) & (lost < mine.end_s)).any()
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, phases=PHASES)
@given(data=st.data(), name=st.sampled_from(list(SPANS)))
def test_an_honest_gateway_settles_every_series_however_sparse(data: st.DataObject, name: str) -> None:
    """What it lacks is proven or, if nothing newer exists, missing with a word; nothing fails, and the file equals the truth."""
    span, margin = SPANS[name]
    truth = draw_truth(data, name, span, margin)
    if not len(truth):
        return
    history = CuttingHistory(truth, head=utc("1980-12-12"))
    folder = Path(tempfile.mkdtemp())
    try:
        job, store = run(history, name, span, folder)
        assert [str(failure.error) for failure in job.report.failures] == []
        inside = truth[(truth >= span.start_s) & (truth < span.end_s)]
        assert opens_of(store.read_bars(SERIES[name])).tolist() == inside.tolist()
        assert len(history.requests) <= 5 * job.report.requests_planned
    finally:
        shutil.rmtree(folder)


# -- the judgement of single answers -----------------------------------------------------------------------------------

MINUTES = expected_bars(SERIES["1m"], window("2024-03-06", "2024-03-07"))


def judge(hole: slice, *ranges: tuple[int, int], says_empty: bool = False, **more: int) -> list[Doubt]:
    """Doubts about ``hole`` after answers for bars from the first to before the second of each of ``ranges``."""
    truth = np.delete(MINUTES.opens, np.arange(390)[hole])
    heard = [
        Heard(a, b, truth[(truth >= a) & (truth < b)], says_empty)
        for a, b in ((int(MINUTES.opens[lo]), int(MINUTES.closes[hi - 1])) for lo, hi in ranges)
    ]
    judged = judge_holes(MINUTES.take(hole), MINUTES, heard, TIMEFRAMES["1m"], **more)
    return sorted({Doubt(each) for each in judged.doubts})


@pytest.mark.parametrize(
    ("hole", "ranges", "doubt"),
    [
        pytest.param(slice(100, 107), [(0, 390)], Doubt.UNSEEN, id="one answer"),
        pytest.param(slice(100, 107), [(0, 390), (99, 110)], Doubt.NONE, id="an answer that encloses it"),
        pytest.param(slice(380, 390), [(0, 390), (370, 390)], Doubt.NEWER, id="nothing newer"),
        pytest.param(slice(0, 10), [(0, 390), (0, 20)], Doubt.OLDER, id="nothing older"),
        pytest.param(slice(192, 198), [(0, 390), (191, 199)], Doubt.MIDDLE, id="in the middle twice"),
        pytest.param(slice(192, 198), [(0, 390), (191, 220)], Doubt.NONE, id="in the middle once"),
        pytest.param(slice(9, 380, 10), [(0, 390), (0, 385)], Doubt.REGULAR, id="every tenth, from the same place"),
        pytest.param(slice(9, 380, 10), [(0, 390), (3, 385)], Doubt.NONE, id="every tenth, from another place"),
    ],
)
def test_what_leaves_a_hole_in_doubt(hole: slice, ranges: list[tuple[int, int]], doubt: Doubt) -> None:
    """Each uniform cut that could have made the hole is a reason to ask on."""
    assert judge(hole, *ranges) == [doubt]


def test_an_answer_that_lacks_a_known_bar_is_no_witness() -> None:
    """The second answer is cut as well, elsewhere: it confirms nothing."""
    first = np.delete(MINUTES.opens, np.arange(100, 107))
    second = np.delete(MINUTES.opens, np.r_[100:107, 200:207])
    end_s = int(MINUTES.closes[-1])
    heard = [Heard(int(MINUTES.opens[0]), end_s, first), Heard(int(MINUTES.opens[5]), end_s, second)]
    judged = judge_holes(MINUTES.take(slice(100, 107)), MINUTES, heard, TIMEFRAMES["1m"])
    assert set(judged.doubts.tolist()) == {Doubt.UNSEEN}


def test_ibs_words_prove_a_range_that_lies_in_the_hole() -> None:
    """Nothing newer is known, and IB says that there is nothing: that is no cut."""
    truth = MINUTES.opens[:380]
    start_s, end_s = int(MINUTES.opens[380]), int(MINUTES.closes[-1])
    nothing = np.empty(0, np.int64)
    hole = MINUTES.take(slice(380, 390))
    whole = Heard(int(MINUTES.opens[0]), end_s, truth)
    for says_empty, doubt in ((True, Doubt.NONE), (False, Doubt.UNSEEN)):
        heard = [whole, Heard(start_s, end_s, nothing, says_empty)]
        assert set(judge_holes(hole, MINUTES, heard, TIMEFRAMES["1m"]).doubts.tolist()) == {doubt}


def test_an_answer_seen_whole_at_its_newest_end_speaks_for_shorter_ones() -> None:
    """Of a gateway that cut the newest part, no longer answer could be whole there; later bars may only be late."""
    later = int(MINUTES.closes[-1])
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=381, whole_before_s=later) == [Doubt.NONE]
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=10, whole_before_s=later) == [Doubt.NEWER]
    assert judge(slice(380, 390), (0, 390), (370, 390), whole=381) == [Doubt.NEWER]


@pytest.mark.parametrize("counts_sessions", [True, False])
@pytest.mark.parametrize("weeks", [1, 3, 5])
def test_a_halt_across_requests_is_proven_by_one_load(tmp_path: Path, weeks: int, counts_sessions: bool) -> None:
    """Its end is in the bars of another request, or beyond the longest one: those are held by then."""
    span = window("2024-01-02", "2024-04-13")
    truth = expected_bars(SERIES["1h"], window("2023-10-01", "2024-05-01")).opens
    halt = Window(utc("2024-01-29"), utc("2024-01-29") + timedelta(weeks=weeks))
    truth = truth[(truth < halt.start_s) | (truth >= halt.end_s)]
    history = CuttingHistory(truth, counts_sessions=counts_sessions)
    job, store = run(history, "1h", span, tmp_path)
    assert [str(failure.error) for failure in job.report.failures] == []
    assert job.report.missing_bars == 0
    assert opens_of(store.read_bars(SERIES["1h"])).tolist() == pick_inside(truth, span).tolist()
    asked = len(history.requests)
    again = Load(SERIES["1h"], span, store=store, history=lambda: history, limits=HistoryLimits.CLASSIC,
                 now=lambda: utc("2024-06-16"))  # fmt: skip
    list(again.run())
    assert len(history.requests) == asked


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "share"), [("5m", 0.3), ("5m", 0.5), ("1h", 0.5), ("1d", 0.4)])
def test_a_thin_series_is_not_taken_for_a_cut_one(tmp_path: Path, name: str, share: float, seed: int) -> None:
    """Holes at equal distances by chance, last bars that nobody traded: all is proven, nothing creeps or ends in vain."""
    span, margin = SPANS[name]
    around = expected_bars(SERIES[name], Window(span.start - margin, span.end + margin)).opens
    truth = around[np.random.default_rng(seed).random(len(around)) < share]
    job, store = run(CuttingHistory(truth, counts_sessions=bool(seed % 2)), name, span, tmp_path)
    assert [str(failure.error) for failure in job.report.failures] == []
    assert job.report.missing_bars == 0
    assert opens_of(store.read_bars(SERIES[name])).tolist() == pick_inside(truth, span).tolist()


def pick_inside(truth: IntArray, span: Window) -> IntArray:
    return truth[(truth >= span.start_s) & (truth < span.end_s)]
