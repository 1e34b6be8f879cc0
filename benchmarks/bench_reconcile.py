"""How long the first rounds of reconciling take in a new Dagster home: 26,000 partitions of 100 series, and 2,000 series at rest.

Run `python benchmarks/bench_reconcile.py` from the project's folder. The promise: all reported within five minutes, no tick
longer than its interval. Beside it what Dagster's own call for one partition takes, in the same run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
from rows import print_point, print_row

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.automation.reconcile import TICK_INTERVAL_S, Reconciler
from ktrdr_pipelines.settings import load_settings
from ktrdr_pipelines.store.store import Store

NOW = datetime(2024, 3, 5, 16, 0, 30, tzinfo=UTC)
PROMISE_S = 300.0
MANY_SERIES = 100


def make_files(data_dir: Path, universe: list[Series]) -> None:
    """A year of bars in one file, linked to the other names."""
    first, store = universe[0], Store(data_dir)
    window = Window(NOW - timedelta(days=364), NOW)
    opens = expected_bars(first, window, complete_at_s=int(NOW.timestamp())).opens
    price = np.full(len(opens), 100.0)
    store.write(
        first, bars_from_columns(opens, price, price, price, price, price), answered=window, source="simulator", now=NOW
    )
    for series in universe:
        if series is not first:
            os.link(store.csv_path(first), store.csv_path(series))
            shutil.copy2(store.sidecar_path(first), store.sidecar_path(series))
        os.utime(store.csv_path(series), (NOW.timestamp() - 600,) * 2)


def run_round(reconciler: Reconciler, instance: dg.DagsterInstance) -> tuple[int, float, float, float]:
    """Reported partitions; seconds of the whole round as the daemon would take (a tick each interval); of all and the longest
    tick."""
    reported, ticks, cursor = 0, [], ""
    while True:
        began = time.perf_counter()
        tick = reconciler.run_tick(instance, cursor, NOW)
        ticks.append(time.perf_counter() - began)
        reported, cursor = reported + tick.reported, tick.cursor
        if tick.is_round_over:
            return reported, TICK_INTERVAL_S * (len(ticks) - 1) + ticks[-1], sum(ticks), max(ticks)


def measure(timeframe: str, count: int) -> None:
    universe = [Series(stock(f"S{i:04d}"), TIMEFRAMES[timeframe]) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.local_temp(folder) as instance:
        settings = load_settings(data_dir=Path(folder) / "data", dagster_home=Path(folder))
        make_files(settings.data_dir, universe)
        reconciler = Reconciler(settings, universe)
        reported, round_s, working_s, longest_s = run_round(reconciler, instance)
        if timeframe == "1m":
            print_point("reconcile, a new home: wall time", reported, "partitions", working_s, "s")
        if count < MANY_SERIES:
            return
        what = f"reconcile in a new home, {reported:,} partitions of {count:,} series"
        print_row(f"{what}, in ticks of the daemon: wall time", round_s, "s", at_most=PROMISE_S)
        print_row(f"{what}: longest tick", longest_s, "s", at_most=TICK_INTERVAL_S)
        began = time.perf_counter()
        for i in range(50):
            instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(universe[0]), partition=f"p{i}"))
        single_s = (time.perf_counter() - began) / 50
        print_row(
            f"{what}: work", working_s, "s", against=reported * single_s, of="Dagster's call for each", at_most=1,
            reach_unit="times",
        )  # fmt: skip
        run_round(reconciler, instance)
        *_, idle_s, _ = run_round(reconciler, instance)
        print_row(f"reconcile of {count:,} series, nothing changed: a round", idle_s, "s")


def main() -> None:
    for count in (1, 10, 100):
        measure("1m", count)
    measure("1d", 2000)


if __name__ == "__main__":
    main()
