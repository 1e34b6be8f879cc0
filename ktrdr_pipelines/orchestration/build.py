"""Builds Dagster's definitions from settings and universe."""

import warnings
from collections.abc import Iterable

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.orchestration.assets import make_asset
from ktrdr_pipelines.orchestration.automation.schedules import make_tail_schedules
from ktrdr_pipelines.orchestration.automation.sensors import make_reconcile_sensor, make_tail_sensor
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.settings import Settings


def build_definitions(settings: Settings, universe: Iterable[Series], *, automation: bool = False) -> dg.Definitions:
    """Assets of every series in ``universe``, with the gateway and the data folder of ``settings``.

    Assets of one timeframe share one partitions definition object. With ``automation`` also sensors and schedules, which
    the daemon needs and a command that runs one asset does not.

    Raises:
        InputError: a setting or the universe is invalid.
    """
    universe = tuple(universe)
    shared: dict[Timeframe, dg.TimeWindowPartitionsDefinition] = {}
    assets: list[dg.AssetsDefinition] = []
    with warnings.catch_warnings():
        # Backfill policies and code references are beta; they work in the pinned release.
        warnings.simplefilter("ignore", category=dg.BetaWarning)
        for series in universe:
            if series.timeframe not in shared:
                shared[series.timeframe] = define_partitions(series.timeframe, settings)
            assets.append(make_asset(series, shared[series.timeframe]))
        return dg.Definitions(
            assets=dg.with_source_code_references(assets),
            resources={"gateway": GatewayResource.of(settings), "storage": StoreResource.of(settings)},
            executor=dg.in_process_executor,
            sensors=[make_tail_sensor(settings, universe), make_reconcile_sensor(settings, universe)]
            if automation
            else (),
            schedules=make_tail_schedules(settings, universe) if automation else (),
        )
