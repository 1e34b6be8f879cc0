"""What a load would do, without doing it: `ktrdr ib-load --dry-run` between parsing and printing.

The gaps and the requests are the plan of the load's own machine (`Load.open_machine`), which is not driven. Nothing is written,
no run is made; a file that the load would correct first is corrected in a scratch copy. When the requests could go out is
`ib/pacing/forecast.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.ib.discovery import known_to_account
from ktrdr_pipelines.ib.history import IBHistory, describe_bars
from ktrdr_pipelines.ib.pacing.budget import Budget, PauseOfAll
from ktrdr_pipelines.ib.pacing.forecast import Sending, forecast
from ktrdr_pipelines.ib.pacing.rules import WINDOW_UNITS, Entry
from ktrdr_pipelines.ib.pacing.sqlite_backend import ledger_path
from ktrdr_pipelines.ib.symbol_cache import HEAD_KEPT
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.planning.coverage import Gap
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.services.gaps import place
from ktrdr_pipelines.services.load_inputs import choose_window, identify
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a load would ask for. ``sendings`` belong to ``requests``, one each."""

    series: Series
    mode: Mode
    window: Window
    now: datetime
    gaps: Sequence[Gap]
    requests: Sequence[Request]
    sendings: Sequence[Sending]
    used: int
    """How many of the budget's `WINDOW_UNITS` are used now."""
    waiting: int
    """How many other requests wait; they are not in the forecast."""
    pauses: Sequence[PauseOfAll]
    """Pauses of all requests."""
    notices: Sequence[str]

    @property
    def missing_bars(self) -> int:
        """Expected bars that are asked for because they are neither held nor confirmed absent."""
        return sum(gap.opens for gap in self.gaps)

    @property
    def done_at(self) -> datetime:
        """When the last request could go out; now, when there is none."""
        return datetime.fromtimestamp(self.sendings[-1].at_s, UTC) if self.sendings else self.now

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC, windows half-open."""
        return {
            "dry_run": True,
            "symbol": self.series.instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "mode": str(self.mode),
            "start": format_instant(self.window.start),
            "end": format_instant(self.window.end),
            "missing_bars": self.missing_bars,
            "gaps": [{**_ends(gap.window), "bars": gap.opens, "reason": gap.reason} for gap in self.gaps],
            "requests": [
                {
                    **_ends(request.window),
                    "duration": str(request.duration),
                    "end_date_time": format_instant(request.end),
                    "send_at": format_instant(datetime.fromtimestamp(sending.at_s, UTC)),
                    "held_up_by": str(sending.waited_for) if sending.waited_for else None,
                }
                for request, sending in zip(self.requests, self.sendings, strict=True)
            ],
            "budget": {
                "used": self.used,
                "limit": WINDOW_UNITS,
                "waiting": self.waiting,
                "holds": [
                    {"until": format_instant(datetime.fromtimestamp(pause.until_s, UTC)), "reason": pause.reason}
                    for pause in self.pauses
                ],
            },
            "now": format_instant(self.now),
            "done_at": format_instant(self.done_at),
            "notices": list(self.notices),
        }


def _ends(window: Window) -> dict[str, str]:
    return {"start": format_instant(window.start), "end": format_instant(window.end)}


def plan_series(request: LoadRequest, *, settings: Settings | None = None) -> DryRun:
    """What `load.load_series` with the same request would find missing, what it would ask for, and when it could.

    IB is asked only for what cannot be known otherwise: which contract an unknown symbol means, and where history starts
    when there is neither a CSV nor a start (one or two requests, which count). Then a gateway is needed, else none. Without
    one the plan of a future that was never loaded goes on after its end.

    Raises:
        KtrdrError: as `load.load_series`.
    """
    settings = settings or load_settings()
    now = datetime.now(UTC)
    with IBHistory(GatewayResource.of(settings).address()) as history:
        series, request = identify(request, settings, history)
        with peek(open_store(settings.data_dir), series, now=now) as (store, pending):
            notices = pending.describe()
            chosen = choose_window(request, series, store, history, settings, now)
            if history.costs.requests:
                notices.append(_say_asked(series, history, now))
            if chosen.notice:
                notices.append(chosen.notice)
            gaps, requests, work = _plan(request, series, chosen.window, store, history, settings, now)
        budget = read_budget(history)
    now_s = budget.now_s if budget else now.timestamp()
    past: Sequence[Entry] = budget.past if budget else ()
    asks = [describe_bars(series, each) for each in requests]
    return DryRun(
        series=series,
        mode=request.mode,
        window=chosen.window,
        now=datetime.fromtimestamp(now_s, UTC),
        gaps=gaps,
        requests=requests,
        sendings=forecast(asks, past, now_s, work=work, pause_until_s=budget.pause_until_s if budget else None),
        used=budget.used if budget else 0,
        waiting=budget.waiting if budget else 0,
        pauses=budget.pauses if budget else (),
        notices=notices,
    )


def _say_asked(series: Series, history: IBHistory, since: datetime) -> str:
    """That IB was asked where history starts, and what of it the load will ask again: a head timestamp is remembered where IB
    has one; whether there is anything older is looked up each time."""
    known = known_to_account(history).find_head(history.pin(series.instrument))
    is_new = known is not None and known.until - HEAD_KEPT >= since
    again = history.costs.requests - is_new
    plural = "s" if history.costs.requests > 1 else ""
    asked = f"where history starts was asked of IB ({history.costs.requests} request{plural})"
    if not again:
        return f"{asked} and is remembered: the load does not ask again"
    return f"{asked}; the load makes {again} of them again, before these"


def _plan(
    request: LoadRequest,
    series: Series,
    window: Window,
    store: Store,
    history: IBHistory,
    settings: Settings,
    now: datetime,
) -> tuple[Sequence[Gap], Sequence[Request], WorkClass]:
    """The gaps and requests of the load and their class, from its machine's plan. ``store`` is settled for ``series``. Of a
    future that was never loaded IB is asked when it expires, as the load does."""
    load = Load(
        series,
        window,
        store=store,
        history=lambda: history,
        limits=settings.history_limits,
        now=lambda: now,
        recheck_last=request.mode is Mode.TAIL,
    )
    machine = load.open_machine()
    if machine is None:
        return (), (), WorkClass.INTERACTIVE
    # The load looks at its window only; users want to know how a gap lies to all that is held.
    held = store.extent(series)
    first_s, last_s = (held.first_open_s, held.last_open_s) if held else (None, None)
    gaps = [replace(gap, reason=place(gap.window.start_s, first_s, last_s)) for gap in machine.plan.gaps]
    return gaps, machine.plan.requests, machine.plan.work


def read_budget(history: IBHistory) -> Budget | None:
    """The pacing budget of the login of ``history``; None where no request was ever made: no ledger is created."""
    address = history.address
    if not address.ledger_url and not ledger_path(address.state_dir / "ib", address.login).exists():
        return None
    return history.ledger.snapshot()
