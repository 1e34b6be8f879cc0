"""The asset factory: one partitioned asset per series, key ``ohlcv/<symbol>/<timeframe>``.

The shape (a generator with ``output_required=False`` that yields one materialization per finished partition and raises
``Failure`` at the end) is the only one that marks exactly the right partitions (dagster_facts.md, 3). What a load does is
`loading/series_load.py`'s; what the UI shows is `metadata.py`'s and `checks.py`'s.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import dagster as dg
from pydantic import Field

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import Window, parse_instant
from ktrdr_pipelines.errors import InputError, KtrdrError, PermanentError
from ktrdr_pipelines.ib.discovery import kept_from, say_kept
from ktrdr_pipelines.ib.history import Waiting
from ktrdr_pipelines.loading.driver import Load
from ktrdr_pipelines.loading.report import Completed, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.orchestration.checks import evaluate_completeness, evaluate_schema, specs_for
from ktrdr_pipelines.orchestration.metadata import COLUMN_SCHEMA, describe_asset, describe_partition, flatten
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.orchestration.runs.door import current_door
from ktrdr_pipelines.planning.modes import Held, Mode, narrow_window
from ktrdr_pipelines.store.locks import series_lock

GATEWAY_POOL = "ib_gateway"
"""At most one step at a time talks to the gateway. The pacing budget is the ledger's, not this."""


class LoadConfig(dg.Config):
    """Run config of one load. Without it everything missing in the partitions of the run is asked for."""

    start: str = Field(default="", description="Ask for nothing before this time (ISO 8601, UTC; included).")
    end: str = Field(default="", description="Ask for nothing from this time on (ISO 8601, UTC; not included).")
    mode: str = Field(
        default="full",
        description="full: everything missing in the partitions of the run. tail: only from the last held bar on, which is "
        "asked for again. backfill: only before the first held bar. A given start or end wins.",
    )

    def narrow(self, window: Window, held: Held | None) -> Window:
        """``window`` without what this config leaves out; empty if the mode has nothing to do in it.

        Raises:
            InputError: a malformed time or mode, or start and end leave nothing of the window.
        """
        try:
            mode = Mode(self.mode)
        except ValueError:
            raise InputError(
                f"unknown mode {self.mode!r}", doing="reading the run config", advice=f"Use {', '.join(Mode)}."
            ) from None
        start = max(window.start, parse_instant(self.start, "start")) if self.start else window.start
        end = min(window.end, parse_instant(self.end, "end")) if self.end else window.end
        if start >= end:
            raise InputError(
                f"start {self.start or window.start} and end {self.end or window.end} leave nothing of {window}",
                doing="reading the run config",
                advice="Widen them, or choose other partitions.",
            )
        cut = Window(start, end)
        if (self.start and mode is Mode.TAIL) or (self.end and mode is Mode.BACKFILL):
            return cut
        return narrow_window(mode, cut, held)


def asset_key(series: Series) -> dg.AssetKey:
    """``ohlcv/<symbol>/<timeframe>``; the symbol as in file names (`series.file_symbol`)."""
    return dg.AssetKey(list(series.asset_path))


def op_name(series: Series) -> str:
    """The name under which run config addresses the asset: its key's parts joined with two underscores."""
    return asset_key(series).to_python_identifier()


def make_asset(series: Series, partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    """The asset of one series."""
    key = asset_key(series)
    instrument, timeframe = series.instrument, series.timeframe

    @dg.asset(
        key=key,
        partitions_def=partitions,
        output_required=False,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=specs_for(series, key),
        pool=GATEWAY_POOL,
        group_name=f"ohlcv_{timeframe.name}",
        kinds={"csv", "pandas"},
        owners=["team:ktrdr"],
        tags={
            "ktrdr/timeframe": timeframe.name,
            "ktrdr/sec_type": instrument.sec_type,
            "ktrdr/currency": instrument.currency,
        },
        description=describe_asset(series),
        metadata={"dagster/column_schema": COLUMN_SCHEMA, "what_to_show": instrument.what_to_show},
    )
    def bars(
        context: dg.AssetExecutionContext, config: LoadConfig, gateway: GatewayResource, storage: StoreResource
    ) -> Iterator[dg.AssetMaterialization | dg.AssetCheckResult]:
        span = context.partition_time_window
        chosen = Window(span.start.astimezone(UTC), span.end.astimezone(UTC))
        store = storage.store()
        report = LoadReport(series, chosen, merged_file=str(store.csv_path(series)))
        door = current_door()
        door.reports.append(report)
        try:
            with series_lock(store.data_dir, series, on_wait=partial(_report_wait, context)):
                now = datetime.now(UTC)
                report.notices += store.prepare(series, now=now).describe()
                held = Held.of(store.extent(series), store.read_sidecar(series))
                report.window = _cut_to_kept(series, config.narrow(chosen, held), now, report)
                load = Load(
                    series,
                    report.window,
                    store=store,
                    history=gateway.history,
                    limits=storage.history_limits,
                    now=lambda: datetime.now(UTC),
                    recheck_last=config.mode == Mode.TAIL and held is not None,
                    report=report,
                )
                for event in load.run():
                    door.on_event(series, event)
                    _log_event(context, series, event)
                    if isinstance(event, Completed):
                        closes = store.read_bars(series, event.partition.window)["close"].tolist()
                        yield dg.AssetMaterialization(
                            key,
                            partition=event.partition.key,
                            metadata=describe_partition(event, report, closes, report.merged_file),
                        )
        except KtrdrError as error:
            report.failures.append(Failure(report.window, error.while_doing(f"loading {series} {report.window}")))
            report.status = "failed"
        for notice in report.notices:
            context.log.info(notice)
        yield evaluate_schema(report)
        yield evaluate_completeness(report)
        if report.failures:
            raise _failure(report)

    return bars


def _cut_to_kept(series: Series, window: Window, now: datetime, report: LoadReport) -> Window:
    """``window`` without what IB no longer has.

    Raises:
        PermanentError: that is all of it.
    """
    kept = kept_from(series.timeframe, now)
    if kept is None or window.is_empty or window.start >= kept:
        return window
    if window.end <= kept:
        raise PermanentError(say_kept(series, kept), advice="Choose later partitions, or a longer timeframe.")
    report.notices.append(say_kept(series, kept))
    return Window(kept, window.end)


def _report_wait(context: dg.AssetExecutionContext, reason: str) -> None:
    """This load waits for the series lock: ``reason`` names the other load."""
    context.log.info(f"waiting for {reason}")
    current_door().on_wait(Waiting(reason, math.inf, None))


def _log_event(context: dg.AssetExecutionContext, series: Series, event: Event) -> None:
    if isinstance(event, Planned):
        context.log.info(f"{series}: {len(event.gaps)} gaps, {len(event.requests)} requests planned")
    elif isinstance(event, Fetched):
        context.log.info(f"{event.done} of {event.planned}: {event.request}: {event.rows} new bars")
    elif isinstance(event, Failure):
        context.log.error(f"{event.window}: {event.error}")


def _failure(report: LoadReport) -> dg.Failure:
    lines = [str(failure.error) for failure in report.failures]
    return dg.Failure(
        description=f"{len(lines)} windows of {report.series} failed:\n" + "\n".join(lines),
        metadata={"report": dg.MetadataValue.json(dict(flatten(report)))},
        allow_retries=False,
    )
