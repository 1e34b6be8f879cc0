"""Growth with the number of series: `ktrdr gaps`, the code location, and a tick of the tail sensor, for 4 to 2,000 series.

Symbols at 1m, 5m, 1h and 1d. CPU: the list and the location in processes of their own, medians, beside one that only imports
pandas and Dagster; the tick in this process, with real files, all complete, after a first one.
Run by `make bench`, or: ``python benchmarks/bench_series.py``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import dagster as dg
from bench_sensor import NOW, make_files, tick
from gateway import KTRDR, User, new_users
from measuring import alternate, run
from rows import print_point, print_row

from ktrdr_pipelines.definitions import build_defs
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.automation.sensors import make_tail_sensor
from ktrdr_pipelines.settings import load_settings

NAMES = ("1m", "5m", "1h", "1d")
SIZES = (4, 100, 500, 2000)
LOCATION = "from ktrdr_pipelines.definitions import defs; defs.get_repository_def()"


def user_with(user: User, series: int) -> User:
    user.write_universe([f"{{symbol: S{i:04d}, timeframes: [{', '.join(NAMES)}]}}" for i in range(series // 4)])
    return user


def measure_processes(users: dict[int, User]) -> None:
    """The list without files, and the code location."""
    gaps, locations = {}, {}
    for size, user in users.items():
        gaps_of, location, bare = alternate(
            lambda user=user: run([*KTRDR, "gaps"], user.environment, user.folder),
            lambda user=user: run([sys.executable, "-c", LOCATION], user.environment, user.folder),
            lambda user=user: run([sys.executable, "-c", "import pandas, dagster"], user.environment, user.folder),
        )
        gaps[size], locations[size] = gaps_of.cpu_s, location.cpu_s
        print_point("ktrdr gaps: CPU", size, "series", gaps_of.cpu_s, "s")
        print_point("code location: CPU", size, "series", location.cpu_s, "s")
    print_row(
        "ktrdr gaps of 2,000 series without a file: CPU", gaps[2000], "s", against=bare.cpu_s, of="imports", at_most=3.5
    )  # fmt: skip
    print_row(
        "loading the code location of 2,000 series: CPU", locations[2000], "s", against=locations[4], of="of 4 series",
        at_most=2, reach_unit="times",
    )  # fmt: skip


def measure_tick(size: int) -> None:
    universe = [Series(stock(f"S{i:04d}"), TIMEFRAMES[name]) for i in range(size // 4) for name in NAMES]
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.local_temp(folder) as instance:
        settings = load_settings(data_dir=Path(folder) / "data", dagster_home=Path(folder))
        make_files(settings.data_dir, universe)
        repository = build_defs(settings, universe).get_repository_def()
        sensor = make_tail_sensor(settings, universe, now=lambda: NOW)
        tick(sensor, instance, repository)
        print_point(
            "tick of tail_fill: CPU", size, "series", min(tick(sensor, instance, repository)[0] for _ in range(3)), "s"
        )


def main() -> None:
    with new_users() as users:
        made = {size: user_with(users(), size) for size in SIZES}
        run([*KTRDR, "gaps"], made[4].environment, made[4].folder)  # keeps the calendar
        measure_processes(made)
    for size in SIZES:
        measure_tick(size)


if __name__ == "__main__":
    main()
