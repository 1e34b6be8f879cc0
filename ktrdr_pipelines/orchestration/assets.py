"""The asset factory: one partitioned asset per series, key ``ohlcv/AAPL_1h``; one step loads all selected series of a timeframe.

The shape (a multi-asset with skippable outputs that records one materialization per finished partition and raises ``Failure``
at the end) is the only one that marks exactly the right partitions of the right series (docs/dagster_facts.md, 3
and 12). The step: `load_step.py`; what the UI shows: `metadata.py` and `checks.py`.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from ktrdr_pipelines.domain.instruments import ASSET_ROOT, Series
from ktrdr_pipelines.orchestration.checks import specs_for
from ktrdr_pipelines.orchestration.load_config import LoadConfig
from ktrdr_pipelines.orchestration.load_step import LoadStep
from ktrdr_pipelines.orchestration.metadata import COLUMN_SCHEMA, describe_asset
from ktrdr_pipelines.orchestration.resources import GatewayResource, StoreResource


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
        description=f"Loads the selected {universe[0].timeframe.name} series over one connection.",
    )
    def bars(
        context: dg.AssetExecutionContext, config: LoadConfig, gateway: GatewayResource, storage: StoreResource
    ) -> Iterator[dg.AssetCheckResult]:
        chosen = {key: by_key[key] for key in sorted(context.selected_asset_keys)}
        yield from LoadStep(context, config, gateway, storage, chosen).run()

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
