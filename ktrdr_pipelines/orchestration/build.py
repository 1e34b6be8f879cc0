"""Builds Dagster's definitions from settings and universe."""

import warnings
from collections.abc import Iterable

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.orchestration.assets import make_assets
from ktrdr_pipelines.orchestration.automation.reconcile import make_reconcile_sensor
from ktrdr_pipelines.orchestration.automation.retention import make_retention_schedule
from ktrdr_pipelines.orchestration.automation.schedules import make_tail_schedules
from ktrdr_pipelines.orchestration.automation.sensors import make_gap_sensor, make_tail_sensor
from ktrdr_pipelines.orchestration.freshness import add_freshness
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource
from ktrdr_pipelines.settings import Settings

_SENSORS = (make_tail_sensor, make_gap_sensor, make_reconcile_sensor)


def build_definitions(settings: Settings, universe: Iterable[Series], *, automation: bool = False) -> dg.Definitions:
    """Assets of every series in ``universe``, with the gateway and the data folder of ``settings``.

    The series of one timeframe are one multi-asset. With ``automation`` also sensors, schedules and freshness policies,
    which the daemon needs and a command that runs one asset does not.

    Raises:
        InputError: a setting or the universe is invalid.
    """
    universe = tuple(universe)
    by_timeframe: dict[Timeframe, list[Series]] = {}
    for series in universe:
        by_timeframe.setdefault(series.timeframe, []).append(series)
    with warnings.catch_warnings():
        # Backfill policies are beta; they work in the pinned release.
        warnings.simplefilter("ignore", category=dg.BetaWarning)
        assets = [make_assets(mine, define_partitions(each, settings)) for each, mine in by_timeframe.items()]
        return dg.Definitions(
            assets=[add_freshness(each, universe, settings) for each in assets] if automation else assets,
            resources={"gateway": GatewayResource.of(settings), "storage": StoreResource.of(settings)},
            executor=dg.in_process_executor,
            sensors=[make(settings, universe) for make in _SENSORS] if automation else (),
            schedules=[*make_tail_schedules(settings, universe), make_retention_schedule(settings)]
            if automation
            else (),
        )
