"""What a year of hourly tails of 100 series leaves in a Dagster home, and what is left after pruning.

Run `python benchmarks/bench_retention.py [RUNS]` from the project's folder; a year has 1,764 runs (seven a session), the default
is a tenth of that. One real run on SQLite, copied with its rows and files as often, with the identity, age and partition of each
run. Then the size of the home, the time of the UI's partition page (a real webserver) and of the sensors' ticks, and pruning.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
from rows import print_row

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.domain.partitions import partition_at
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.automation.reconcile import Reconciler
from ktrdr_pipelines.orchestration.automation.retention import KeepRules
from ktrdr_pipelines.orchestration.automation.run_requests import request_run
from ktrdr_pipelines.orchestration.automation.sensors import make_tail_sensor
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.leftovers import measure_home
from ktrdr_pipelines.orchestration.runs.pruning import prune
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.store.store import Store

SERIES = 100
RUNS_OF_A_YEAR = 1764
PAGE = """query($k: AssetKeyInput!){assetNodeOrError(assetKey:$k){... on AssetNode{
  partitionStats{numMaterialized numFailed numMaterializing numPartitions}
  assetPartitionStatuses{... on TimePartitionStatuses{ranges{startKey endKey status}}}
  assetMaterializations(limit:1){runId partition}}}}"""
_COPIED = {
    "runs": "run_id snapshot_id pipeline_name mode status run_body partition partition_set create_timestamp update_timestamp "
    "start_time end_time backfill_id",
    "run_tags": "run_id key value",
    "event_logs": "run_id event dagster_event_type timestamp step_key asset_key partition",
    "asset_check_executions": "asset_key check_name partition run_id execution_status evaluation_event "
    "evaluation_event_timestamp evaluation_event_storage_id materialization_event_storage_id create_timestamp",
}


def make_files(settings: Settings, universe: Sequence[Series], now: datetime) -> None:
    """Fourteen months of hourly bars up to now for each series, and the universe file."""
    opens = expected_bars(universe[0], Window(now - timedelta(days=420), now), complete_at_s=int(now.timestamp())).opens
    price = np.full(len(opens), 100.0)
    bars = bars_from_columns(opens, price, price, price, price, price)
    store = Store(settings.data_dir)
    for series in universe:
        store.write(series, bars, answered=None, source="simulator", now=now)
        os.utime(store.csv_path(series), (now.timestamp() - 600,) * 2)
    names = "\n".join(f"  - {{symbol: {s.instrument.symbol}, timeframes: [1h]}}" for s in universe)
    settings.universe_path.write_text(f"series:\n{names}\n")


def run_once(settings: Settings, universe: Sequence[Series], instance: dg.DagsterInstance, now: datetime) -> str:
    """One real run of the tail sensor for all series."""
    partition = partition_at(universe[0].timeframe, now)
    request = request_run(universe, partition, partition, Mode.TAIL, origin="sensor", run_key="one")
    result = (
        build_defs(settings, universe)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            asset_selection=list(request.asset_selection or ()),
            partition_key=request.partition_key,
            raise_on_error=False,
            tags={**request.tags, "dagster/sensor_name": "tail_fill"},
            run_config={**request.run_config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    )
    return result.run_id


def copy_run(home: Path, run_id: str, ends: Sequence[datetime], universe: Sequence[Series]) -> None:
    """Copies of the run ``run_id`` that ended at ``ends``, oldest first."""
    index, runs = (sqlite3.connect(home / "history" / name) for name in ("runs/index.db", "runs.db"))
    newest = index.execute("select max(timestamp) from event_logs").fetchone()[0]
    month = partition_at(universe[0].timeframe, datetime.fromisoformat(newest).replace(tzinfo=UTC)).key
    rows = {
        (connection, name): connection.execute(
            f"select {columns.replace(' ', ',')} from {name} where run_id=?", (run_id,)
        ).fetchall()
        for connection, names in ((runs, ("runs", "run_tags")), (index, ("event_logs", "asset_check_executions")))
        for name, columns in ((n, _COPIED[n]) for n in names)
    }
    for end in ends:
        made = str(uuid.uuid4())
        changes = {run_id: made, month: partition_at(universe[0].timeframe, end).key}
        for (connection, name), found in rows.items():
            columns = _COPIED[name].split()
            marks = ",".join("?" * len(columns))
            connection.executemany(
                f"insert into {name} ({','.join(columns)}) values ({marks})",
                [_change(columns, row, changes, end) for row in found],
            )
        shard = home / "history" / "runs" / f"{made}.db"
        shutil.copyfile(home / "history" / "runs" / f"{run_id}.db", shard)
        if (logs := home / "storage" / run_id).exists():
            shutil.copytree(logs, home / "storage" / made)
        for connection in (index, runs):
            connection.commit()
    index.close()
    runs.close()


def _change(columns: Sequence[str], row: Sequence[object], changes: dict[str, str], end: datetime) -> list[object]:
    changed = []
    for column, value in zip(columns, row, strict=True):
        if "timestamp" in column and value is not None:
            changed.append(end.strftime("%Y-%m-%d %H:%M:%S.%f"))
        elif column in ("start_time", "end_time"):
            changed.append(end.timestamp())
        elif isinstance(value, str):
            for old, new in changes.items():
                value = value.replace(old, new)
            changed.append(value)
        else:
            changed.append(value)
    return changed


@contextmanager
def webserver(settings: Settings) -> Iterator[str]:
    """A webserver on the home; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(settings.dagster_home),
        "KTRDR_DATA_DIR": str(settings.data_dir),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    program = Path(sys.executable).with_name("dagster-webserver")
    server = subprocess.Popen(
        [program, "-m", "ktrdr_pipelines.definitions", "-p", str(port)],
        cwd=settings.data_dir, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/graphql"
    try:
        for _ in range(240):
            try:
                ask(url, universe_key="S000_1h")
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def ask(url: str, *, universe_key: str) -> dict[str, object]:
    body = json.dumps({"query": PAGE, "variables": {"k": {"path": ["ohlcv", universe_key]}}}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        found = json.load(answer)["data"]["assetNodeOrError"]
    if "partitionStats" not in found:
        raise OSError("not loaded yet")
    return found


def took_s(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Look:
    """A home as its user meets it: what things cost, and what the UI shows of every twentieth series."""

    figures: dict[str, float]
    shown: list[object]


def measure(label: str, settings: Settings, universe: Sequence[Series], instance: dg.DagsterInstance) -> Look:
    """Look at the home, and print one line."""
    files, size = measure_home(instance)
    with webserver(settings) as url:
        keys = [s.name for s in universe]
        cold = took_s(lambda: ask(url, universe_key=keys[1]))
        warm = took_s(lambda: [ask(url, universe_key=key) for key in keys[2:12]]) / 10
        shown = [ask(url, universe_key=key) for key in keys[::20]]
    repository = build_defs(settings, universe).get_repository_def()
    sensor = make_tail_sensor(settings, universe)
    context = dg.build_sensor_context(instance=instance, repository_def=repository)
    sensor.evaluate_tick(context)
    tail = took_s(lambda: sensor.evaluate_tick(context))
    reconciler = Reconciler(settings, universe)
    now = datetime.now(UTC)
    first = took_s(lambda: reconciler.run_tick(instance, "", now))
    while not reconciler.run_tick(instance, "", now).unchanged:
        pass
    idle = took_s(lambda: reconciler.run_tick(instance, "", now))
    sys.stdout.write(
        f"{label:7s} {size / 1e6:9.1f} MB {files:6d} files   partition page {cold:5.2f} s, then {warm:5.3f} s   "
        f"tick of tail_fill {tail:5.2f} s, of reconcile {first:5.2f} s, unchanged {idle:5.2f} s\n"
    )
    sys.stdout.flush()
    figures = {"size": size / 1e6, "partition page": warm, "tick of tail_fill": tail}
    return Look(figures, [{k: v for k, v in each.items() if k != "assetMaterializations"} for each in shown])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS_OF_A_YEAR // 10
    universe = [Series(stock(f"S{i:03d}"), TIMEFRAMES["1h"]) for i in range(SERIES)]
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data_dir=Path(folder) / "data", dagster_home=Path(folder) / "home", ib_port=1)
        make_files(settings, universe, now)
        with open_instance(settings) as instance:
            empty = measure_home(instance)
            run_id = run_once(settings, universe, instance, now)
            files, size = measure_home(instance)
            print_row(f"records of one tail run of {SERIES} series", (size - empty[1]) / 1e6, "MB")
            print(f"one run of {SERIES} series: {files - empty[0]} files")
            ends = [now - timedelta(days=365 * (count - i) / count) for i in range(count)]
            copy_run(settings.dagster_home, run_id, ends, universe)
            before = measure("before", settings, universe, instance)
            rules = KeepRules.of(settings)
            pruning = took_s(
                lambda: sys.stdout.write(
                    "\n".join(prune(instance, rules.find_expiry, datetime.now(UTC), earliest=rules.shortest).describe())
                    + "\n"
                )
            )
            print(f"pruned in {pruning:.1f} s, {1000 * pruning / count:.0f} ms a run")
            after = measure("after", settings, universe, instance)
    if before.shown != after.shown:
        raise SystemExit("after pruning the UI shows something else than before")
    print(f"{count} runs; what the UI shows is the same")
    for what, unit in (("size", "MB"), ("partition page", "s"), ("tick of tail_fill", "s")):
        print_row(
            f"after pruning {count:,} runs of {SERIES} series: {what}", after.figures[what], unit,
            against=before.figures[what], of="before", at_most=1, reach_unit="times",
        )  # fmt: skip


if __name__ == "__main__":
    main()
