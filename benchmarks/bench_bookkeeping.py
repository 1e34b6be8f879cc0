"""Milliseconds for recording a finished partition in Dagster: one by one as Dagster does it, by its own batches, and by ours.

Run `python benchmarks/bench_bookkeeping.py` from the project's folder: SQLite, and PostgreSQL where its programs are installed.
The events are those of a run's step. All three in the same run, so that only ratios count.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from rows import print_point, print_row

from ktrdr_pipelines.orchestration.bookkeeping import make_entry, store_entries
from ktrdr_pipelines_tests.postgres_server import throw_away_cluster

COUNTS = (50, 500, 5000)
SLOW_COUNT = 50
"""More are not recorded one by one: it would take minutes."""
KEY = dg.AssetKey(["ohlcv", "AAPL_1m"])
DAYS = dg.DailyPartitionsDefinition("2004-01-01", end_date="2024-01-01").get_partition_keys()


def make_materializations(count: int) -> list[dg.AssetMaterialization]:
    """With metadata of about the size of ours: 3.6 kB an event."""
    return [
        dg.AssetMaterialization(
            KEY,
            partition=day,
            metadata={
                "dagster/row_count": 390,
                "dagster/uri": "/data/AAPL_1m.csv",
                **{f"count_{i}": i for i in range(6)},
                "first_bar": dg.MetadataValue.timestamp(1.7e9),
                "last_bar": dg.MetadataValue.timestamp(1.7e9),
                "closes": dg.MetadataValue.md("x" * 950),
            },
        )
        for day in DAYS[:count]
    ]


def one_by_one(instance: dg.DagsterInstance, entries: Sequence[dg.EventLogEntry]) -> None:
    """What a step's ``yield`` does."""
    for entry in entries:
        instance.handle_new_event(entry)


def dagsters_batch(instance: dg.DagsterInstance, entries: Sequence[dg.EventLogEntry]) -> None:
    """What ``DAGSTER_EVENT_BATCH_SIZE`` leads to."""
    instance.event_log_storage.store_event_batch(entries)


WAYS: dict[str, Callable[[dg.DagsterInstance, Sequence[dg.EventLogEntry]], None]] = {
    "one by one": one_by_one,
    "Dagster's batch": dagsters_batch,
    "our batch": store_entries,
}


@contextmanager
def sqlite() -> Iterator[dg.DagsterInstance]:
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.local_temp(folder) as instance:
        yield instance


@contextmanager
def postgresql() -> Iterator[dg.DagsterInstance]:
    with throw_away_cluster("dagster") as server, tempfile.TemporaryDirectory() as folder:
        url = f"postgresql+psycopg2://ktrdr@/dagster?host={server}"
        (Path(folder) / "dagster.yaml").write_text(f"storage:\n  postgres:\n    postgres_url: {url}\n")
        with dg.DagsterInstance.from_config(folder) as instance:
            yield instance


def measure(name: str, opened: Callable[[], object]) -> None:
    with opened() as instance:  # type: ignore[attr-defined]
        made = 0
        for count in COUNTS:
            took_ms = {}
            for way, record in WAYS.items():
                if count > SLOW_COUNT and record is not store_entries:
                    continue
                made += 1
                entries = [
                    make_entry(each, run_id=f"00000000-0000-4000-8000-{made:012d}", job_name="job", step_key="step")
                    for each in make_materializations(count)
                ]
                record(instance, entries[:1])  # creates the run's database
                began = time.perf_counter()
                record(instance, entries)
                took_ms[way] = 1e3 * (time.perf_counter() - began) / count
            print_point(f"bookkeeping, {name}: wall time", count, "partitions", took_ms["our batch"] * count / 1e3, "s")
            for way in ("one by one", "Dagster's batch"):
                if way in took_ms:
                    print_row(
                        f"recording a finished partition of {count}, {name}: wall time", took_ms["our batch"], "ms",
                        against=took_ms[way], of=way, at_most=1, reach_unit="times",
                    )  # fmt: skip


def main() -> None:
    measure("SQLite", sqlite)
    if shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        measure("PostgreSQL", postgresql)


if __name__ == "__main__":
    main()
