"""The asset factory: one partitioned asset per series, key ``ohlcv/AAPL_1h``; one step loads all selected series of a timeframe.

The shape (a multi-asset with skippable outputs whose generator yields one materialization per finished partition and raises
``Failure`` at the end) is the only one that marks exactly the right partitions of the right series (docs/dagster_facts.md, 3
and 12). What a load does is `loading/machine.py`'s; what the UI shows is `metadata.py`'s and `checks.py`'s.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT, Series
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.ib.history import Waiting
from ktrdr_pipelines.loading.driver import Load
from ktrdr_pipelines.loading.report import Completed, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.orchestration.checks import evaluate_checks, specs_for
from ktrdr_pipelines.orchestration.load_config import LoadConfig, resolve
from ktrdr_pipelines.orchestration.metadata import (
    COLUMN_SCHEMA,
    REPORT,
    describe_asset,
    describe_partition,
    observe_load,
)
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint
from ktrdr_pipelines.planning.modes import Held
from ktrdr_pipelines.store.locks import series_lock

GATEWAY_POOL = "ib_gateway"
"""At most one step at a time talks to the gateway. The pacing budget is the ledger's, not this."""


def asset_key(series: Series) -> dg.AssetKey:
    """``ohlcv/AAPL_1h``; the symbol as in file names."""
    return dg.AssetKey(list(series.asset_path))


def op_name(series: Series) -> str:
    """The name under which run config addresses the step of a series: one per timeframe, such as ``ohlcv_1h``."""
    return f"{ASSET_ROOT}_{series.timeframe.name}"


def make_assets(universe: Sequence[Series], partitions: dg.PartitionsDefinition) -> dg.AssetsDefinition:
    """The assets of ``universe``: series (at least one) of one timeframe."""
    by_key = {asset_key(series): series for series in universe}
    name = op_name(universe[0])

    @dg.multi_asset(
        name=name,
        specs=[_spec_of(series, key) for key, series in by_key.items()],
        check_specs=[spec for key, series in by_key.items() for spec in specs_for(series, key)],
        partitions_def=partitions,
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=GATEWAY_POOL,
        description=f"Loads the selected {universe[0].timeframe.name} series over one connection.",
    )
    def bars(
        context: dg.AssetExecutionContext, config: LoadConfig, gateway: GatewayResource, storage: StoreResource
    ) -> Iterator[dg.AssetMaterialization | dg.AssetCheckResult]:
        reports = []
        for key in sorted(context.selected_asset_keys):
            report = _make_report(context, by_key[key], storage)
            reports.append(report)
            yield from _load(context, config, gateway, storage, report)
            if config.notice and config.notice not in report.notices:
                report.notices.append(config.notice)
            for notice in report.notices:
                context.log.info(f"{report.series}: {notice}")
            yield from evaluate_checks(key, report)
            context.log_event(observe_load(key, report))
        if any(report.failures for report in reports):
            raise _failure([report for report in reports if report.failures])

    return bars


def _spec_of(series: Series, key: dg.AssetKey) -> dg.AssetSpec:
    instrument, timeframe = series.instrument, series.timeframe
    return dg.AssetSpec(
        key,
        skippable=True,
        group_name=op_name(series),
        kinds={"csv", "pandas"},
        owners=["team:ktrdr"],
        tags={
            "ktrdr/timeframe": timeframe.name,
            "ktrdr/sec_type": instrument.sec_type,
            "ktrdr/currency": instrument.currency,
        },
        description=describe_asset(series),
        metadata={
            "dagster/column_schema": COLUMN_SCHEMA,
            "what_to_show": instrument.what_to_show,
        },
    )


def _make_report(context: dg.AssetExecutionContext, series: Series, storage: StoreResource) -> LoadReport:
    span = context.partition_time_window
    chosen = Window(span.start.astimezone(UTC), span.end.astimezone(UTC))
    return LoadReport(series, chosen, merged_file=str(storage.store().csv_path(series)))


def _load(
    context: dg.AssetExecutionContext,
    config: LoadConfig,
    gateway: GatewayResource,
    storage: StoreResource,
    report: LoadReport,
) -> Iterator[dg.AssetMaterialization]:
    """Load one series; ``report`` is true at its end."""
    series, store = report.series, storage.store()
    entry_point = gateway.entry_point(context.instance, context.run.run_id)
    entry_point.reports.append(report)
    try:
        request = config.request(series)
        with series_lock(store.data_dir, series, on_wait=partial(_report_wait, context, entry_point)):
            now = datetime.now(UTC)
            prepared = store.prepare(series, now=now)
            report.notices += prepared.describe()
            held = Held.of(store.extent(series), store.read_sidecar(series))
            report.window = resolve(config, request, held, now, report)
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
                        asset_key(series),
                        partition=event.partition.key,
                        metadata=describe_partition(event, report, closes, report.merged_file),
                    )
    except KtrdrError as error:
        report.failures.append(Failure(report.window, error.while_doing(f"loading {series} {report.window}")))
        report.status = "failed"


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


def _failure(reports: Sequence[LoadReport]) -> dg.Failure:
    """The end of a step some of whose series failed: every failed window with its reason."""
    lines = []
    for report in reports:
        lines.append(f"{len(report.failures)} windows of {report.series} failed:")
        lines += [str(failure.error) for failure in report.failures]
    failures = [{"series": str(report.series), **each} for report in reports for each in report.list_failures()]
    return dg.Failure(
        description="\n".join(lines),
        metadata={REPORT: dg.MetadataValue.json({"failures": failures})},
        allow_retries=False,
    )
