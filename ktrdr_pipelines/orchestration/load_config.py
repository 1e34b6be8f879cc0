"""Run config of a load in Dagster: one `LoadRequest` for all series of a run, and the window that it means for each.

The fields are what the UI's launchpad shows. Entry points write them with `LoadRequest.to_config`.
"""

from __future__ import annotations

from datetime import datetime

import dagster as dg
from pydantic import Field

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, parse_instant
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import InputError, PermanentError
from ktrdr_pipelines.ib.discovery import describe_retention
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.planning.modes import Held, resolve_window


class LoadConfig(dg.Config):
    """Run config of a step: a `LoadRequest` for each of its series. Without it: everything missing in its partitions."""

    mode: str = Field(
        default=Mode.FULL.value,
        description="full: everything missing in the partitions of the run. tail: only from the last held bar on, which is "
        "asked for again. backfill: only before the first held bar. A start wins over the mode.",
    )
    start: str = Field(default="", description="Ask for nothing before this time (ISO 8601, UTC; included).")
    end: str = Field(default="", description="Ask for nothing from this time on (ISO 8601, UTC; not included).")
    oldest: str = Field(
        default="",
        description="Where the load begins unless start or mode decide; empty: with the first partition of the run.",
    )
    notice: str = Field(default="", description="For the report: what the user should know of the chosen partitions.")
    symbol: str = Field(default="", description="Empty, or the asset's.")
    timeframe: str = Field(default="", description="Empty, or the asset's.")
    sec_type: str = Field(default="", description="This and the next three: the choice of contract, for the record.")
    exchange: str = ""
    currency: str = ""
    con_id: int = 0
    work: str = Field(
        default="", description="The class of its requests: tail, interactive or backfill; empty: by how many it needs."
    )

    def work_class(self) -> WorkClass | None:
        """The class that was asked for; None: the load decides. A misspelt one is none."""
        return WorkClass(self.work) if self.work in tuple(WorkClass) else None

    def request(self, series: Series) -> LoadRequest:
        """The request, for ``series``.

        Raises:
            InputError: a malformed time or mode, or the request of another series.
        """
        symbol, timeframe = series.instrument.symbol, series.timeframe
        try:
            request = LoadRequest.from_config(
                {**self.model_dump(), "symbol": self.symbol or symbol, "timeframe": self.timeframe or timeframe.name}
            )
        except InputError as error:
            raise error.while_doing("reading the run config") from None
        if (request.symbol, request.timeframe) != (symbol, timeframe):
            raise InputError(
                f"this is the request of {request.symbol} {request.timeframe}, not of {series}",
                doing="reading the run config",
                advice="Leave symbol and timeframe empty.",
            )
        return request


def resolve(config: LoadConfig, request: LoadRequest, held: Held | None, now: datetime, report: LoadReport) -> Window:
    """The part of the run's partitions (``report.window``) that ``request`` means; empty where its mode has nothing to do.

    Raises:
        InputError: start and end leave nothing of the partitions. PermanentError: all of it is beyond IB's retention.
    """
    chosen = report.window
    if max(request.start or chosen.start, chosen.start) >= min(request.end or chosen.end, chosen.end):
        raise InputError(
            f"start {config.start or '(none)'} and end {config.end or '(none)'} leave nothing of {chosen}",
            doing="reading the run config",
            advice="Widen them, or choose other partitions.",
        )
    oldest = parse_instant(config.oldest, "oldest") if config.oldest else chosen.start
    window = resolve_window(request, held, until=min(now, chosen.end), oldest=oldest)
    window = _cut_to_kept(report.series, window, now, report)
    return window.intersect(chosen) or Window(chosen.start, chosen.start)


def _cut_to_kept(series: Series, window: Window, now: datetime, report: LoadReport) -> Window:
    """``window`` without what IB no longer has.

    Raises:
        PermanentError: that is all of it.
    """
    kept = series.timeframe.retained_from(now)
    if kept is None or window.is_empty or window.start >= kept:
        return window
    if window.end <= kept:
        raise PermanentError(describe_retention(series, kept), advice="Choose later partitions, or a longer timeframe.")
    report.notices.append(describe_retention(series, kept))
    return Window(kept, window.end)
