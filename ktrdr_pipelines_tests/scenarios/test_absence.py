"""Absence: whatever a gateway leaves out of all its answers in the same way, no existing bar is recorded as absent.

Whole loads into files, from a history that cuts every answer alike; the existing bars are drawn at random. Evidence is judged
in `loading/evidence.py`, the next probe is chosen in `loading/probes.py`.
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
from ktrdr_pipelines.domain.calls import Call
from ktrdr_pipelines.domain.instruments import Series, forex, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.client import RawBars
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.planning.durations import is_allowed, reach_back
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import FakeHistory, IntArray, pick, raw_bars, run_load, utc, window

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""An example is a whole load: making a failing one smaller takes minutes."""

Cut = Callable[[int], IntArray]
"""The number of bars of an answer -> the positions of those that are sent."""


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

    def fetch(self, series: Series, request: Request, call: Call | None = None) -> RawBars:
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


def draw_truth(data: st.DataObject, name: str, span: Window, margin: timedelta) -> IntArray:
    """The existing bars: all but some single ones, some runs and perhaps everything before a day."""
    around = expected_bars(SERIES[name], Window(span.start - margin, span.end + margin)).opens
    inside = np.flatnonzero((around >= span.start_s) & (around < span.end_s))
    exists = np.ones(len(around), np.bool_)
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    share = data.draw(st.sampled_from([0.0, 0.003, 0.03, 0.2]), label="share absent")
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
    list(run_load(job))
    return job, store


@pytest.mark.slow
@settings(max_examples=30, deadline=None, phases=PHASES)
@given(data=st.data(), name=st.sampled_from(list(SPANS)), cut=st.sampled_from(list(CUTS)))
def test_no_cut_of_all_answers_makes_an_existing_bar_absent(data: st.DataObject, name: str, cut: str) -> None:
    """The file equals the truth, or the load failed or reports what is missing; no existing bar is recorded as absent."""
    span, margin = SPANS[name]
    truth = draw_truth(data, name, span, margin)
    head = utc("2000-01-01") + timedelta(seconds=int(truth[0]) - utc("2000-01-01").timestamp()) if len(truth) else None
    history = CuttingHistory(
        truth,
        cut=CUTS[cut],
        counts_sessions=data.draw(st.booleans(), label="counts sessions"),
        head=head if data.draw(st.booleans(), label="knows its head") else None,
    )
    folder = Path(tempfile.mkdtemp())
    try:
        job, store = run(history, name, span, folder)
        inside = truth[(truth >= span.start_s) & (truth < span.end_s)]
        held = opens_of(store.read_bars(SERIES[name]))
        lost = inside[~np.isin(inside, held)]
        assert set(held.tolist()) <= set(truth.tolist())
        sidecar = store.read_sidecar(SERIES[name])
        for absent in sidecar.proven_empty:
            wrong = lost[(lost >= absent.start.timestamp()) & (lost < absent.end.timestamp())]
            assert not len(wrong), f"{len(wrong)} existing bars are recorded as absent, first {wrong[0]}"
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
    """Bars that do not exist are absent or, if nothing newer exists, reported as missing; nothing fails, and the file equals the
    truth."""
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


@pytest.mark.parametrize("counts_sessions", [True, False])
@pytest.mark.parametrize("weeks", [1, 3, 5])
def test_a_halt_across_requests_is_settled_by_one_load(tmp_path: Path, weeks: int, counts_sessions: bool) -> None:
    """Its end is in the bars of another request, or beyond the longest one: those bars are held by then."""
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
    list(run_load(again))
    assert len(history.requests) == asked


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "share"), [("5m", 0.3), ("5m", 0.5), ("1h", 0.5), ("1d", 0.4)])
def test_a_thin_series_is_not_taken_for_a_cut_one(tmp_path: Path, name: str, share: float, seed: int) -> None:
    """Absent bars at equal distances by chance, last bars without a trade: all are settled, and no request is wasted."""
    span, margin = SPANS[name]
    around = expected_bars(SERIES[name], Window(span.start - margin, span.end + margin)).opens
    truth = around[np.random.default_rng(seed).random(len(around)) < share]
    job, store = run(CuttingHistory(truth, counts_sessions=bool(seed % 2)), name, span, tmp_path)
    assert [str(failure.error) for failure in job.report.failures] == []
    assert job.report.missing_bars == 0
    assert opens_of(store.read_bars(SERIES[name])).tolist() == pick_inside(truth, span).tolist()


def pick_inside(truth: IntArray, span: Window) -> IntArray:
    return truth[(truth >= span.start_s) & (truth < span.end_s)]
