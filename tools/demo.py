"""`make demo` and `make ui`: the main job on real bars, without an IB account.

The PyPI package `backtesting` carries hourly EURUSD (2017 to 2018) and daily GOOG (2004 to 2013). This script writes them in
the project's CSV layout into demo/source, lets the simulated gateway replay that folder on a socket, loads both series
through Dagster and the command line as any user would, and then compares every bar with the package's own files, with
nothing but the standard library, so that no code of the project judges itself.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SOURCE, DATA, HOME, LOG = DEMO / "source", DEMO / "data", DEMO / "dagster_home", DEMO / "gateway.jsonl"
BIN = Path(sys.executable).parent
SERIES = {"EURUSD_1h": "EURUSD.csv", "GOOG_1d": "GOOG.csv"}
# The zone of EURUSD's hours is not documented in the package; they are taken as UTC, here and in the comparison.


def package_file(name: str) -> Path:
    """A data file of the installed package, found without importing it."""
    for file in importlib.metadata.files("backtesting") or []:
        if file.name == name:
            return Path(str(file.locate()))
    raise SystemExit(f"demo: the package `backtesting` has no {name}")


def source_rows(name: str) -> Iterator[tuple[str, list[str]]]:
    """(stamp as the project writes it, open, high, low, close, volume as text) of the package's own file."""
    with package_file(name).open(newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for stamp, *values in reader:
            yield (stamp.replace(" ", "T") if " " in stamp else f"{stamp}T00:00:00") + "Z", values


def write_sources() -> None:
    SOURCE.mkdir(parents=True, exist_ok=True)
    for series, name in SERIES.items():
        with (SOURCE / f"{series}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["timestamp", "open", "high", "low", "close", "volume"])
            for stamp, values in source_rows(name):
                writer.writerow([stamp, *values])


@contextmanager
def gateway() -> Iterator[int]:
    """The simulated gateway as a process of its own; its port."""
    LOG.unlink(missing_ok=True)
    command = [BIN / "ktrdr", "simulator", "--replay", SOURCE, "--port", "0", "--log", LOG]
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if "listening on" not in line:
            raise SystemExit(f"demo: the simulated gateway did not start: {line}")
        print(line.strip())
        yield int(line.split("listening on")[1].split(",")[0].rsplit(":", 1)[1])
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(10)


def environment(port: int) -> dict[str, str]:
    """A user's environment: which gateway, where the data goes. The demo's own folders, never data/."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("IB_", "KTRDR_", "DAGSTER_"))}
    return inherited | {
        "IB_HOST": "127.0.0.1",
        "IB_PORT": str(port),
        "KTRDR_DATA_DIR": str(DATA),
        "DAGSTER_HOME": str(HOME),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PWD": str(DEMO),
        "KTRDR_TAIL_SENSOR": "false",  # the recordings end years ago: every tail would ask for bars that cannot come
        "PYTHONWARNINGS": "ignore",  # Dagster announces that its own command will be renamed one day
    }


def run(title: str, command: list[str], env: dict[str, str], *, show: bool) -> None:
    print(f"\n$ {' '.join(command)}", flush=True)
    began = time.monotonic()
    # Run in demo/: the project's .env would lead Dagster to the real home.
    done = subprocess.run(command, env=env, cwd=DEMO, text=True, capture_output=not show)
    if done.returncode:
        sys.stderr.write((done.stdout or "") + (done.stderr or ""))
        raise SystemExit(f"demo: {title} failed with exit code {done.returncode}")
    print(f"  ({time.monotonic() - began:.1f} s)")


def load(env: dict[str, str]) -> None:
    run(
        "loading EURUSD 1h",
        [
            "dagster", "asset", "materialize", "-m", "ktrdr_pipelines.definitions", "--select", "ohlcv/EURUSD_1h",
            "--partition-range", "2017-04-01...2018-02-01",
        ],
        env,
        show=False,
    )  # fmt: skip
    run(
        "loading GOOG 1d",
        ["ktrdr", "ib-load", "GOOG", "1d", "--mode", "full", "--end", "2013-03-02"],
        env,
        show=True,
    )


def compare(series: str) -> tuple[int, list[str]]:
    """Bars of the package's file, and every difference of the loaded CSV from them."""
    has_volume = series.startswith("GOOG")
    with (DATA / f"{series}.csv").open(newline="") as file:
        reader = csv.reader(file)
        next(reader)
        loaded = {stamp: [float(v) for v in values] for stamp, *values in reader}
    wrong = []
    count = 0
    for stamp, values in source_rows(SERIES[series]):
        count += 1
        wanted = [float(v) for v in values]
        if not has_volume:
            wanted[4] = 0.0  # IB has no volume for currency pairs
        found = loaded.pop(stamp, None)
        if found is None:
            wrong.append(f"{stamp} is missing")
        elif found != wanted:
            wrong.append(f"{stamp} is {found}, the source has {wanted}")
    wrong += [f"{stamp} is not in the source" for stamp in loaded]
    return count, wrong


def count_partitions() -> dict[str, int]:
    """Materialized partitions by series, as Dagster reports them."""
    code = (
        "import dagster as dg, json, sys\n"
        "with dg.DagsterInstance.from_config(sys.argv[1]) as i:\n"
        "    print(json.dumps({'_'.join(k.path[1:]): len(i.get_materialized_partitions(k))"
        " for k in i.all_asset_keys()}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(HOME)], text=True, capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def report() -> int:
    requests = [json.loads(line) for line in LOG.read_text().splitlines()]
    partitions = count_partitions()
    failed = 0
    bars, heads = (sum(r["kind"] == kind for r in requests) for kind in ("history", "head"))
    print(f"\nWhat was fetched ({bars} requests for bars, {heads} for the start of history):")
    for series in SERIES:
        symbol, timeframe = series.split("_")
        mine = [r for r in requests if r["symbol"] in (symbol, symbol[:3]) and r["kind"] == "history"]
        count, wrong = compare(series)
        print(
            f"  {symbol} {timeframe}: {count} bars in {len(mine)} requests, {partitions.get(series, 0)} partitions complete, "
            f"{DATA.relative_to(ROOT) / series}.csv"
        )
        if wrong:
            failed += 1
            print(f"    DIFFERENT from the source in {len(wrong)} bars: {'; '.join(wrong[:3])}")
        else:
            volume = "and volume" if series.startswith("GOOG") else "(IB has no volume for currency pairs)"
            print(f"    every one of the {count} bars equals the source: time, open, high, low, close {volume}")
    print(
        f"\nWhere to look next:\n  head {DATA.relative_to(ROOT)}/GOOG_1d.csv     the bars"
        f"\n  {DATA.relative_to(ROOT)}/GOOG_1d.meta.json    what is known about them"
        "\n  make ui                        the same in the Dagster UI: http://127.0.0.1:3000/assets"
    )
    return 1 if failed else 0


@contextmanager
def only_user_of_the_demo() -> Iterator[None]:
    """One demo or UI at a time: a demo makes the folders anew, which would pull them away from under an open UI."""
    with Path(__file__).open() as file:  # the lock needs a file, not a new one
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit("demo: another `make demo` or `make ui` is running on demo/; end it first.") from None
        yield


def main() -> int:
    with only_user_of_the_demo():
        return run_demo()


def run_demo() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ui", action="store_true", help="open the Dagster UI on the demo's data (made first if missing)"
    )
    parser.add_argument("--port", type=int, default=3000, help="port of the UI")
    options = parser.parse_args()
    if not options.ui or not (DATA / "GOOG_1d.csv").exists():
        shutil.rmtree(DEMO, ignore_errors=True)
        for folder in (DATA, HOME):
            folder.mkdir(parents=True)
        shutil.copyfile(ROOT / "dagster_home" / "dagster.yaml", HOME / "dagster.yaml")
        write_sources()
        print("Real bars: the PyPI package `backtesting`, replayed by the simulated gateway.")
        with gateway() as port:
            load(environment(port))
        code = report()
        if code or not options.ui:
            return code
    with gateway() as port:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            return subprocess.run([BIN / "ktrdr", "ui", "--port", str(options.port)], env=environment(port)).returncode
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
