"""What one tick of the sensors costs for 2,000 series (500 symbols at 1m, 5m, 1h, 1d), and a round of reconciling.

Run `python benchmarks/bench_sensor.py` from the project's folder. Real files (sidecars with two years of partitions), a real
Dagster instance, no gateway. "New process": nothing is cached. Seconds are of the CPU, so that other programs do not count. The
promise of the tail sensor is two seconds for a tick, the worst one included. A tick of the gap sensor that has to read files
ends after its budget; the next one continues.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
from rows import print_row

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.automation.cancelled import read_cancelled
from ktrdr_pipelines.orchestration.automation.gap_fill import GapFiller, GapState, write_cursor
from ktrdr_pipelines.orchestration.automation.reconcile import Reconciler
from ktrdr_pipelines.orchestration.automation.sensors import make_tail_sensor
from ktrdr_pipelines.orchestration.runs.queries import ActiveRuns
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.store import Store

SYMBOLS = 500
NOW = datetime(2024, 3, 5, 16, 0, 30, tzinfo=UTC)  # a Tuesday, 11:00:30 in New York
PROMISE_S = 2.0
GAP_TIME_OUT_S = 60.0  # of Dagster, for one evaluation of a sensor


def make_files(data_dir: Path, universe: Sequence[Series]) -> None:
    """One file for each timeframe, linked to the other symbols' names: two gigabytes less to write."""
    made: dict[str, Series] = {}
    store = Store(data_dir)
    for series in universe:
        name = series.timeframe.name
        if name not in made:
            window = Window(NOW - timedelta(days=730), NOW + timedelta(days=1))
            settled = NOW - timedelta(minutes=31) if name == "1d" else NOW
            opens = expected_bars(series, window, complete_at_s=int(settled.timestamp())).opens
            price = np.full(len(opens), 100.0)
            bars = bars_from_columns(opens, price, price, price, price, price)
            store.write(series, bars, answered=Window(NOW - timedelta(days=730), NOW), source="simulator", now=NOW)
            made[name] = series
        else:
            os.link(store.csv_path(made[name]), store.csv_path(series))
            shutil.copy2(store.sidecar_path(made[name]), store.sidecar_path(series))
        os.utime(store.sidecar_path(series), (NOW.timestamp(),) * 2)


def tick(
    sensor: dg.SensorDefinition, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition
) -> tuple[float, int]:
    began = time.process_time()
    data = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, repository_def=repository))
    return time.process_time() - began, sum(len(r.asset_selection or ()) for r in data.run_requests or ())


def measure(settings: Settings, universe: Sequence[Series], instance: dg.DagsterInstance) -> float:
    repository = build_defs(settings, universe).get_repository_def()
    expected_bars(
        universe[0], Window(NOW - timedelta(days=1), NOW)
    )  # builds the calendar, which a code server does once
    worst = 0.0
    clock = [NOW]
    sensor = make_tail_sensor(settings, universe, now=lambda: clock[0])
    for label, sensor_now, fresh in (
        ("all complete, new process", NOW, True),
        ("all complete", NOW, False),
        ("1m and 5m due (five minutes later)", NOW + timedelta(minutes=5), False),
        ("all due (next evening)", NOW + timedelta(hours=30), False),
        ("all due, new process, a week later", NOW + timedelta(days=7), True),
        ("all years behind, new process", NOW + timedelta(days=7 * 365), True),
    ):
        clock[0] = sensor_now
        if fresh:
            sensor = make_tail_sensor(settings, universe, now=lambda: clock[0])
        took_s, due = tick(sensor, instance, repository)
        worst = max(worst, took_s)
        sys.stdout.write(f"{label:45s} {took_s:6.2f} s   {due:5d} of {len(universe)} series asked for\n")
    reconciler = Reconciler(settings, [s for s in universe if s.timeframe.name in ("1h", "1d")][:100])
    for label in ("report 100 series of 1h and 1d", "compare them", "nothing changed"):
        began = time.process_time()
        done = reconciler.run_tick(instance, "", NOW)
        took_s = time.process_time() - began
        sys.stdout.write(f"reconcile: {label:34s} {took_s:6.2f} s   {done.describe()}\n")
    return worst


def measure_gaps(settings: Settings, universe: Sequence[Series], instance: dg.DagsterInstance) -> float:
    """The longest tick, after the files of all 1m series were changed too."""
    filler, state, worst, label = GapFiller(settings, universe), GapState(), 0.0, "new process"
    now = NOW + timedelta(hours=1)
    for step in range(60):
        began = time.process_time()
        found = filler.run_tick(instance, ActiveRuns({}), read_cancelled(instance, now), state, now)
        took_s = time.process_time() - began
        worst, state = max(worst, took_s), GapState.from_cursor(write_cursor(found))
        at = f", goes on at {found.continue_at}" if found.continue_at else ""
        sys.stdout.write(f"gaps: {label:39s} {took_s:6.2f} s   {len(found.requests)} runs requested{at}\n")
        if not found.continue_at and label == "nothing changed":
            return worst
        if not found.continue_at:
            label = "nothing changed" if label == "all 1m files changed" else "all 1m files changed"
            if label == "all 1m files changed":
                for series in universe:
                    if series.timeframe.name == "1m":
                        os.utime(Store(settings.data_dir).sidecar_path(series), (NOW.timestamp() + step + 1,) * 2)
    return worst


def main() -> None:
    universe = [
        Series(stock(f"S{i:03d}"), TIMEFRAMES[name]) for i in range(SYMBOLS) for name in ("1m", "5m", "1h", "1d")
    ]
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.local_temp(folder) as instance:
        settings = load_settings(data_dir=Path(folder) / "data", dagster_home=Path(folder))
        make_files(settings.data_dir, universe)
        worst = measure(settings, universe, instance)
        worst_of_gaps = measure_gaps(settings, universe, instance)
    what = f"{len(universe):,} series: longest tick of"
    print_row(f"{what} gap_fill, CPU", worst_of_gaps, "s", at_most=GAP_TIME_OUT_S)
    print_row(f"{what} tail_fill, CPU", worst, "s", at_most=PROMISE_S)


if __name__ == "__main__":
    main()
