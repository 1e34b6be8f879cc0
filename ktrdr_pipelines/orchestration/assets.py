"""The asset factory: one partitioned asset per series, key ``ohlcv/<symbol>/<timeframe>``.

The shape (a generator with ``output_required=False`` that yields one materialization per finished partition and raises
``Failure`` at the end) is the only one that marks exactly the right partitions (docs/dagster_facts.md, 3). What a load does is
`loading/machine.py`'s; what the UI shows is `metadata.py`'s and `checks.py`'s.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import dagster as dg
from pydantic import Field

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, parse_instant
from ktrdr_pipelines.errors import InputError, KtrdrError, PermanentError
from ktrdr_pipelines.ib.discovery import describe_retention
from ktrdr_pipelines.ib.history import Waiting
from ktrdr_pipelines.loading.driver import Load
from ktrdr_pipelines.loading.report import Completed, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.orchestration.checks import evaluate_checks, specs_for
from ktrdr_pipelines.orchestration.metadata import (
    COLUMN_SCHEMA,
    REPORT,
    describe_asset,
    describe_partition,
    observe_load,
)
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint
from ktrdr_pipelines.planning.modes import Held, resolve_window
from ktrdr_pipelines.store.locks import series_lock

GATEWAY_POOL = "ib_gateway"
"""At most one step at a time talks to the gateway. The pacing budget is the ledger's, not this."""


class LoadConfig(dg.Config):
    """Run config of one series: a `LoadRequest`. Without it everything missing in the partitions of the run is asked for."""

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
        entry_point = gateway.entry_point(context.instance, context.run.run_id)
        entry_point.reports.append(report)
        try:
            request = config.request(series)
            with series_lock(store.data_dir, series, on_wait=partial(_report_wait, context, entry_point)):
                now = datetime.now(UTC)
                prepared = store.prepare(series, now=now)
                report.notices += prepared.describe()
                held = Held.of(store.extent(series), store.read_sidecar(series))
                report.window = _resolve(config, request, held, now, report)
                load = Load(
                    series,
                    report.window,
                    store=store,
                    history=gateway.history,
                    limits=storage.history_limits,
                    now=lambda: datetime.now(UTC),
                    recheck_last=request.mode is Mode.TAIL,
                    report=report,
                    prepared=prepared,
                )
                for event in load.run():
                    entry_point.on_event(series, event)
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
        if config.notice and config.notice not in report.notices:
            report.notices.append(config.notice)
        for notice in report.notices:
            context.log.info(notice)
        yield from evaluate_checks(report)
        context.log_event(observe_load(key, report))
        if report.failures:
            raise _failure(report)

    return bars


def _resolve(config: LoadConfig, request: LoadRequest, held: Held | None, now: datetime, report: LoadReport) -> Window:
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


def _report_wait(context: dg.AssetExecutionContext, entry_point: EntryPoint, reason: str) -> None:
    """This load waits for the series lock: ``reason`` names the other load."""
    context.log.info(f"waiting for {reason}")
    entry_point.on_wait(Waiting(reason, math.inf, None))


def _log_event(context: dg.AssetExecutionContext, series: Series, event: Event) -> None:
    if isinstance(event, Planned):
        context.log.info(f"{series}: gaps found: {len(event.gaps)}, requests planned: {len(event.requests)}")
    elif isinstance(event, Fetched):
        context.log.info(f"{event.done} of {event.planned}: {event.request}: {event.rows} new bars")
    elif isinstance(event, Failure):
        context.log.error(f"{event.window}: {event.error}")


def _failure(report: LoadReport) -> dg.Failure:
    lines = [str(failure.error) for failure in report.failures]
    return dg.Failure(
        description=f"{len(lines)} windows of {report.series} failed:\n" + "\n".join(lines),
        metadata={REPORT: dg.MetadataValue.json(report.as_dict())},
        allow_retries=False,
    )
