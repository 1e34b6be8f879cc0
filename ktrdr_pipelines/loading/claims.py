"""What a settled window claims: which of its missing bars are absent, which may only be late, and where history starts. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.calendars import ExpectedBars
from ktrdr_pipelines.domain.arrays import BoolArray
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.loading.actions import Claims
from ktrdr_pipelines.loading.context import LoadContext
from ktrdr_pipelines.loading.episode import Episode
from ktrdr_pipelines.planning.coverage import find_gaps
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import Evidence, HistoryStart, ProvenEmpty

INTRADAY_GRACE, DAILY_GRACE = (15 * 60, 24 * 3600), (24 * 3600, 4 * 24 * 3600)
"""Seconds. How long after its close the newest bar may come late (IB: seconds to minutes; daily bars up to settlement, hours);
and how far back the run of newest bars that is late with it may reach."""


def make_claims(episode: Episode, expected: ExpectedBars, missing: ExpectedBars, unproven: ExpectedBars) -> Claims:
    """The claims of ``episode``, whose bars ``expected`` by now are held but for the ``missing`` ones (those that are still
    forming among them). Sets `pending`, `absent` and `history_start_s` of the episode. ``unproven`` bars are never claimed."""
    load, window = episode.load, episode.request.window
    is_pending = _are_pending(load, missing, unproven)
    absent, pending = missing.take(np.flatnonzero(~is_pending)), missing.take(np.flatnonzero(is_pending))
    if len(pending):
        window = Window.from_epoch(window.start_s, max(window.start_s, int(pending.opens[0])))
    start = _find_history_start(load, missing) if len(missing) else None
    episode.pending, episode.absent = pending, absent
    episode.history_start_s = int(start.open.timestamp()) if start is not None else None
    # Of a sparse series the answered window says it all; a range for each minute without a trade would swamp the sidecar.
    runs = [] if load.is_sparse else find_gaps(expected, absent)
    evidence = tuple(episode.evidence)
    return Claims(
        answered=window,
        absent=[
            ProvenEmpty(start=run.window.start, end=run.window.end, opens=run.opens, evidence=evidence) for run in runs
        ],
        complete_until=datetime.fromtimestamp(int(expected.closes[-1]), UTC) if len(expected) else None,
        history_start=start,
        sparse=True if load.is_sparse and not load.known.sidecar.sparse else None,
    )


def _are_pending(load: LoadContext, missing: ExpectedBars, unproven: ExpectedBars) -> BoolArray:
    """Which missing bars answers cannot settle: closed a moment ago with nothing newer held (IB may be late, and two
    requests within a second agree about nothing but that), forming by the gateway's clock, or newest and without IB's "no
    data"."""
    last_s, now_s = load.known.held.last_s, load.clock.now_s
    grace_s, run_s = INTRADAY_GRACE if load.series.timeframe.is_intraday else DAILY_GRACE
    is_newest = np.ones(len(missing), np.bool_) if last_s is None else missing.opens > last_s
    is_late = bool((is_newest & (missing.closes > now_s - grace_s)).any())
    is_pending = is_newest & (missing.closes > now_s - run_s) & is_late
    is_pending |= ~missing.is_complete_at(now_s)
    return is_pending | np.isin(missing.opens, unproven.opens)


def _find_history_start(load: LoadContext, missing: ExpectedBars) -> HistoryStart | None:
    """If the ``missing`` bars lie right before the first held one, and not after IB's head timestamp: that bar is where history
    starts, and nothing older needs to be asked for, now or later."""
    if load.series.instrument.refreshes_whole:
        return None  # its answers are for all there is: there is nothing older to be saved from asking for
    first_s, head_s = load.known.held.first_s, load.head_s
    if first_s is None or head_s is None or head_s <= int(missing.opens[-1]):
        return None
    before = load.expected.opens[load.expected.opens < first_s]
    if not len(before) or int(before[-1]) not in missing.opens:
        return None
    known_by = f"nothing right before it, and IB's head timestamp is {_instant(head_s)}"
    return HistoryStart(open=datetime.fromtimestamp(first_s, UTC), known_by=known_by)


def describe_head(load: LoadContext, request: Request) -> Evidence:
    """The head timestamp of ``load`` as evidence beside an empty answer to ``request``."""
    assert load.head_s is not None
    assert load.head_asked_at is not None
    return Evidence(
        asked_at=load.head_asked_at, duration="", end=request.end, text=f"head timestamp {_instant(load.head_s)}"
    )


def describe_pending(load: LoadContext, pending: ExpectedBars) -> str:
    """What a user should know of bars that stay missing without a failure."""
    last_s, first = load.known.held.last_s, _instant(int(pending.opens[0]))
    if last_s is None or int(pending.opens[0]) > last_s:
        return f"{len(pending)} of the newest bars are not there yet, from {first}; they are asked for again next time"
    return (
        f"{len(pending)} bars are missing, from {first}, and their absence at IB is not confirmed; they are asked for again next "
        "time. If history begins later, give a later --start"
    )


def _instant(second: int) -> str:
    return format_instant(datetime.fromtimestamp(second, UTC))
