"""The simulated gateway in a process of its own, and a fresh user's folders: what benchmarks of whole loads run against."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KTRDR = (sys.executable, "-m", "ktrdr_pipelines.cli")
DAGSTER = (sys.executable, "-W", "ignore", "-m", "dagster")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A simulated gateway that runs: its port, and what it was asked."""

    port: int
    log: Path

    def history_requests(self) -> list[dict[str, Any]]:
        """The requests for bars so far, in the order in which they came."""
        records = map(json.loads, self.log.read_text().splitlines() if self.log.exists() else ())
        return [record for record in records if record["kind"] == "history"]


@contextmanager
def run_gateway(*options: object) -> Iterator[Gateway]:
    """A gateway that judges pacing and counts durations strictly, unless ``options`` of ``ktrdr simulator`` say otherwise."""
    with tempfile.TemporaryDirectory(prefix="bench_gateway_") as folder:
        log = Path(folder) / "requests.jsonl"
        command = [*KTRDR, "simulator", "--port", 0, "--durations", "strict", "--log", log, *options]
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout is not None
                found = re.search(r":(\d+),", child.stdout.readline())
                if found is None:
                    raise SystemExit("the simulated gateway did not start")
                yield Gateway(int(found[1]), log)
            finally:
                child.send_signal(signal.SIGTERM)


class User:
    """Folders of a new user: data, Dagster's home, state. Calendars are kept from one user to the next, as on any machine after
    the first load."""

    def __init__(self, folder: Path, cache: Path, port: int = 4001, **settings: object) -> None:
        self.folder, self.data, self.home = folder, folder / "data", folder / "home"
        for each in (self.data, self.home):
            each.mkdir(parents=True)
        shutil.copyfile(ROOT / "dagster_home" / "dagster.yaml", self.home / "dagster.yaml")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("IB_", "KTRDR_", "DAGSTER_"))}
        mine = {
            "IB_HOST": "127.0.0.1", "IB_PORT": port, "KTRDR_DATA_DIR": self.data, "DAGSTER_HOME": self.home,
            "KTRDR_STATE_DIR": folder / "state", "XDG_CACHE_HOME": cache, "PYTHONPATH": ROOT, "PWD": folder, **settings,
        }  # fmt: skip
        self.environment = inherited | {name: str(value) for name, value in mine.items()}

    def write_universe(self, entries: list[str]) -> None:
        """A universe file of ``entries``: lists of YAML such as ``{symbol: AAPL, timeframes: [1h]}``."""
        (self.data / "universe.yaml").write_text("\n".join(["series:", *(f"- {entry}" for entry in entries)]) + "\n")

    def held_bars(self, name: str) -> int:
        """How many rows the CSV of series ``name`` (AAPL_1h) has."""
        return (self.data / f"{name}.csv").read_bytes().count(b"\n") - 1


@contextmanager
def new_users() -> Iterator[Any]:
    """A function that makes a `User` for a port and settings; their folders are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bench_users_") as folder:
        count = 0

        def make(port: int = 4001, **settings: object) -> User:
            nonlocal count
            count += 1
            return User(Path(folder) / f"user{count}", Path(folder) / "cache", port, **settings)

        yield make
