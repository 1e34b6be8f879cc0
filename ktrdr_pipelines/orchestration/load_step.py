"""One step of a run: the loads of its series, driven together, as Dagster's events. What a load does is `loading/`'s."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

import dagster as dg

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.load_request import LoadRequest, Mode
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.report import Completed, Ended, Event, Failure, Fetched, LoadReport, Planned
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.orchestration.bookkeeping import finished_partitions
from ktrdr_pipelines.orchestration.checks import evaluate_checks
from ktrdr_pipelines.orchestration.load_config import LoadConfig, resolve
from ktrdr_pipelines.orchestration.metadata import REPORT, describe_partition, observe_load
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.planning.modes import Held

LOG_EVERY_S = 2.0
"""Every line of a run's log is an event in Dagster's database: requests share them."""


class LoadStep:
    """The loads of the ``chosen`` series in the partitions of the run."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        config: LoadConfig,
        gateway: GatewayResource,
        storage: StoreResource,
        chosen: Mapping[dg.AssetKey, Series],
    ) -> None:
        self._context, self._config, self._gateway = context, config, gateway
        self._limits = storage.history_limits
        self._logged_at_s = 0.0
        self._new_bars: dict[str, int] = {}
        """Since the last line of the log, by series name."""
        self._keys = {series.name: key for key, series in chosen.items()}
        self._store = storage.store()
        self._store.report_waits(self._show_wait_of_store)
        self._entry_point = gateway.entry_point(context.instance, context.run.run_id)
        span = context.partition_time_window
        window = Window(span.start.astimezone(UTC), span.end.astimezone(UTC))
        self._reports = [
            LoadReport(series, window, merged_file=str(self._store.csv_path(series))) for series in chosen.values()
        ]
        self._entry_point.reports += self._reports

    def run(self) -> Iterator[dg.AssetCheckResult]:
        """The checks of each series; finished partitions are recorded as they finish.

        Raises:
            dagster.Failure: at the end, when anything failed.
        """
        loads = []
        for report in self._reports:
            try:
                loads.append(self._make_load(report, self._config.request(report.series)))
            except KtrdrError as error:
                report.failures.append(Failure(report.window, error.while_doing(f"loading {report.series}")))
                report.status = "failed"
                yield from self._sum_up(report)
        with finished_partitions(self._context) as finished:
            for load, event in drive(
                loads,
                open_requests=self._gateway.open_requests,
                on_wait=self._show_wait,
                on_idle=finished.store_due,
            ):
                self._entry_point.on_event(load.series, event)
                self._log(load.series, event)
                if isinstance(event, Completed):
                    finished.add(self._materialize(event, load.report))
                elif isinstance(event, Ended):
                    finished.flush()  # checks are about what is recorded
                    yield from self._sum_up(load.report)
        failed = [report for report in self._reports if report.failures]
        if failed:
            raise _failure(failed)

    def _make_load(self, report: LoadReport, request: LoadRequest) -> Load:
        return Load(
            report.series,
            report.window,
            store=self._store,
            history=self._gateway.history,
            limits=self._limits,
            now=lambda: datetime.now(UTC),
            recheck_last=request.mode is Mode.TAIL,
            report=report,
            resolve=partial(self._resolve, request, report),
            work=self._config.work_class(),
        )

    def _resolve(self, request: LoadRequest, report: LoadReport, held: Held | None, now: datetime) -> Window:
        return resolve(self._config, request, held, now, report)

    # -- what Dagster gets --------------------------------------------------------------------------------------------

    def _materialize(self, event: Completed, report: LoadReport) -> dg.AssetMaterialization:
        closes = self._store.read_bars(report.series, event.partition.window)["close"].tolist()
        return dg.AssetMaterialization(
            self._keys[report.series.name],
            partition=event.partition.key,
            metadata=describe_partition(event, report, closes, report.merged_file),
        )

    def _sum_up(self, report: LoadReport) -> Iterator[dg.AssetCheckResult]:
        """The end of one series."""
        key = self._keys[report.series.name]
        if self._config.notice and self._config.notice not in report.notices:
            report.notices.append(self._config.notice)
        for notice in report.notices:
            self._context.log.info(f"{report.series}: {notice}")
        yield from evaluate_checks(key, report)
        self._context.log_event(observe_load(key, report))

    def _show_wait(self, load: Load, waiting: Waiting) -> None:
        self._show_wait_of(f"{load.series}: ", waiting)

    def _show_wait_of_store(self, waiting: Waiting) -> None:
        self._show_wait_of("", waiting)

    def _show_wait_of(self, whose: str, waiting: Waiting) -> None:
        until = f" until {format_instant(waiting.until)} at the latest" if waiting.until else ""
        self._context.log.info(f"{whose}waiting{until}: {waiting.reason}")
        self._entry_point.on_wait(waiting)

    def _log(self, series: Series, event: Event) -> None:
        log = self._context.log
        if isinstance(event, Planned):
            log.info(f"{series}: gaps found: {len(event.gaps)}, requests planned: {len(event.requests)}")
        elif isinstance(event, Fetched):
            self._new_bars[series.name] = self._new_bars.get(series.name, 0) + event.rows
            if event.done == event.planned or time.monotonic() - self._logged_at_s > LOG_EVERY_S:
                self._logged_at_s = time.monotonic()
                rows = self._new_bars.pop(series.name)
                log.info(f"{series}: {event.done} of {event.planned} requests, up to {event.request}: {rows} new bars")
        elif isinstance(event, Failure):
            log.error(f"{event.window}: {event.error}")


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
