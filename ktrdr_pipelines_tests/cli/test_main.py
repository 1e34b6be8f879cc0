"""Promises of the `ktrdr` command: bad input is one line and an exit code, nothing is lost, a load ends in the CSV.

Each command is a process of its own; those of `started_ktrdr` are started as a user does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines_tests.conftest import Ktrdr, StartGateway
from ktrdr_pipelines_tests.load_forks import Ended

pytestmark = pytest.mark.slow


def assert_refused(done: Ended, code: int, *words: str) -> None:
    """One line on stderr with these words, this exit code, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ktrdr: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["AAPL", "7m"], ["unknown timeframe '7m'", "1h"]),
        (["AAPL", "1h", "--start", "2024-13-01"], ["start '2024-13-01' is not a date", "2024-03-05"]),
        (["AAPL", "1h", "--end", "soon"], ["end 'soon' is not a date"]),
        (["AAPL", "1h", "--start", "2024-03-01", "--end", "2024-02-01"], ["is not before end"]),
        (["AAPL", "1h", "--start", "2024-03-01", "--end", "2024-03-01"], ["is not before end"]),
        (["AAPL", "1h", "--start", "2099-01-01"], ["in the future"]),
        (["AAPL", "1h", "--start", "1800-01-01"], ["1970"]),
        (["AAPL", "1h", "--mode", "sideways"], ["'tail', 'backfill', 'full'"]),
        (["AAPL"], ["TIMEFRAME"]),
        (["../../etc/passwd", "1h"], ["is not a symbol"]),
        (["", "1h"], ["is not a symbol"]),
        (["A" * 500, "1h"], ["is not a symbol"]),
        (["AAPL", "1h", "--strat", "2024-01-01"], ["No such option"]),
    ],
)
def test_input_that_cannot_be_meant_is_one_line_and_exit_code_2(
    ktrdr: Ktrdr, arguments: list[str], words: list[str]
) -> None:
    """Wrong arguments are refused before anything is asked or written."""
    assert_refused(ktrdr("ib-load", *arguments), 2, *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("IB_PORT", "abc"), ("IB_PORT", "0"), ("KTRDR_HISTORY_LIMITS", "huge"), ("KTRDR_PARTITION_STARTS", "{"),
     ("KTRDR_PARTITION_STARTS", '{"7m": "2020-01-01"}'), ("IB_RETRY_WAITS", "soon"),
     ("IB_RETRY_WAITS", "nan"), ("IB_RETRY_WAITS", "-1")],
)  # fmt: skip
def test_a_setting_that_cannot_be_meant_names_its_variable(ktrdr: Ktrdr, name: str, value: str) -> None:
    """The line names the variable, so that a person finds it."""
    assert_refused(ktrdr("ib-load", "AAPL", "1h", **{name: value}), 2, name, "README")


def test_a_closed_gateway_says_where_it_looked_and_what_to_do(ktrdr: Ktrdr, unused_port: int, tmp_path: Path) -> None:
    """Exit code 5, the port, the well-known ports, the simulator; no file appears."""
    done = ktrdr("ib-load", "AAPL", "1h", "--start", "2024-03-01", "--end", "2024-03-05")
    assert_refused(done, 5, f"127.0.0.1:{unused_port}", "4001", "ktrdr simulator", "AAPL 1h")
    assert not list((tmp_path / "data").glob("*.csv"))


def test_an_unknown_symbol_is_refused_and_not_added(start_gateway: StartGateway, ktrdr: Ktrdr, tmp_path: Path) -> None:
    """Exit code 3, what was tried, and the universe stays as it was."""
    done = ktrdr("ib-load", "NOSUCH", "1h", port=start_gateway().port)
    assert_refused(done, 3, "NOSUCH", "spelling")
    assert not (tmp_path / "data" / "universe.yaml").exists()


@pytest.mark.parametrize(
    "content", [b"<html><body>no bars</body></html>\n", b"\x00\x01\x02\x03" * 100, b"a,b,c\n1,2,3\n"]
)
def test_a_csv_that_is_none_is_left_alone(
    start_gateway: StartGateway, ktrdr: Ktrdr, tmp_path: Path, content: bytes
) -> None:
    """Exit code 6, the file's name, and not a byte of it changes."""
    path = tmp_path / "data" / "AAPL_1h.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    done = ktrdr("ib-load", "AAPL", "1h", "--start", "2024-03-01", "--end", "2024-03-05", port=start_gateway().port)
    assert_refused(done, 6, "AAPL_1h.csv")
    assert path.read_bytes() == content


def test_a_data_folder_that_cannot_be_written_is_one_line(start_gateway: StartGateway, ktrdr: Ktrdr) -> None:
    """Exit code 7 and what to do. (/proc refuses even root.)"""
    done = ktrdr(
        "ib-load", "AAPL", "1h", "--start", "2024-03-01", "--end", "2024-03-05",
        port=start_gateway().port, KTRDR_DATA_DIR="/proc/ktrdr",
    )  # fmt: skip
    assert_refused(done, 7, "/proc/ktrdr")


def test_a_load_ends_in_the_csv_and_a_tail_continues_it(
    start_gateway: StartGateway, ktrdr: Ktrdr, started_ktrdr: Ktrdr, tmp_path: Path
) -> None:
    """full with a start and an end, then tail up to a later end: one gapless file, result fields as specified."""
    gateway = start_gateway()
    first = started_ktrdr(
        "ib-load",
        "MSFT",
        "1d",
        "--mode",
        "full",
        "--start",
        "2022-01-01",
        "--end",
        "2023-01-01",
        "--json",
        port=gateway.port,
    )
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert {k: result[k] for k in ("status", "fetched_bars", "cached_before", "gaps_analyzed", "segments_fetched")} == {
        "status": "success", "fetched_bars": 251, "cached_before": False, "gaps_analyzed": 1, "segments_fetched": 1,
    }  # fmt: skip
    assert result["merged_file"] == str(tmp_path / "data" / "MSFT_1d.csv")
    assert result["ib_requests_made"] == 1
    assert result["partitions_completed"] == ["2022"]
    second = ktrdr("ib-load", "MSFT", "1d", "--mode", "tail", "--end", "2024-01-01", port=gateway.port)
    assert second.returncode == 0, second.stderr
    assert "250 bars fetched" in second.stdout
    stamps = [line.split(",")[0] for line in (tmp_path / "data" / "MSFT_1d.csv").read_text().splitlines()[1:]]
    assert len(stamps) == 501
    assert stamps == sorted(set(stamps))


def test_a_symbol_that_no_universe_names_is_discovered_and_added(
    start_gateway: StartGateway, ktrdr: Ktrdr, tmp_path: Path
) -> None:
    """GBPUSD is found as a currency pair, loaded, and is part of the universe from then on."""
    done = ktrdr("ib-load", "gbp.usd", "1h", "--start", "2024-01-08", "--end", "2024-01-10", port=start_gateway().port)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "GBPUSD_1h.csv").exists()
    universe = (tmp_path / "data" / "universe.yaml").read_text()
    assert "GBPUSD" in universe
    assert "AAPL" in universe


def test_a_window_that_fails_is_reported_and_the_rest_is_kept(
    start_gateway: StartGateway, ktrdr: Ktrdr, tmp_path: Path
) -> None:
    """Exit code 4, the failed window in the line, the other windows in the file; a second run completes it."""
    gateway = start_gateway([FaultRule(kind="error", code=162, text="Unbekannter Fehler", nth=(2,))])
    arguments = ["ib-load", "AAPL", "1h", "--start", "2024-01-01", "--end", "2024-04-01"]
    done = ktrdr(*arguments, port=gateway.port)
    assert_refused(done, 4, "AAPL 1h", "Unbekannter Fehler", "162")
    assert "STILL MISSING" in done.stdout
    path = tmp_path / "data" / "AAPL_1h.csv"
    before = len(path.read_text().splitlines())
    assert (
        ktrdr(*arguments, port=gateway.port, DAGSTER_HOME=str(tmp_path / "other")).returncode == 0
    )  # an empty ledger: no wait
    assert len(path.read_text().splitlines()) == 1 + 61 * 7 > before


def test_help_needs_no_heavy_imports() -> None:
    """`ktrdr --help` imports neither dagster nor pandas nor ib_insync, nor what serves the REST API."""
    code = (
        "import sys\nfrom ktrdr_pipelines.cli.main import cli\n"
        "try: cli.main(['ib-load', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'dagster', 'pandas', 'ib_insync', 'pandera', 'numpy', 'fastapi', 'uvicorn', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        ("ib status", {"dagster", "pandas", "pandera"}),
        ("ib-load AAPL 1h --mode full --start 2024-02-01 --end 2024-03-01 --dry-run", {"dagster", "ib_insync"}),
        ("ib-load AAPL 1h --mode full --start 2024-02-01 --end 2024-03-01", {"pandas", "pandera", "ib_insync"}),
    ],
    ids=["status", "dry run", "nothing to do"],
)
def test_commands_import_only_what_they_use(
    ktrdr: Ktrdr, start_gateway: StartGateway, tmp_path: Path, arguments: str, unneeded: set[str]
) -> None:
    """Start-up is nearly all imports: a query makes no run, and a load that has nothing to do no table."""
    gateway = start_gateway()
    if "ib-load" in arguments:
        loaded = ktrdr(*arguments.replace(" --dry-run", "").split(), port=gateway.port)
        assert loaded.returncode == 0, loaded.stderr
    code = (
        "import sys\nfrom ktrdr_pipelines.cli.main import main\n"
        f"sys.argv[1:] = {arguments.split()!r}\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        f"print(sorted({unneeded!r} & set(sys.modules)))"
    )
    environment = os.environ | {
        "IB_HOST": "127.0.0.1", "IB_PORT": str(gateway.port),
        "KTRDR_DATA_DIR": str(tmp_path / "data"), "DAGSTER_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_in_the_middle_of_a_load_is_one_line(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Exit code 130, no traceback, what was loaded is kept, and the next run completes it."""
    gateway = start_gateway([FaultRule(kind="silent", nth=(2,))])
    environment = os.environ | {
        "IB_PORT": str(gateway.port), "KTRDR_DATA_DIR": str(tmp_path / "data"), "DAGSTER_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "ktrdr_pipelines.cli.main",
        "ib-load",
        "AAPL",
        "1h",
        "--start",
        "2024-01-01",
        "--end",
        "2024-04-01",
    ]
    running = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(gateway.requests) < 2 and time.monotonic() < deadline and running.poll() is None:
        select.select([], [], [], 0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "ktrdr: interrupted; what was loaded is kept" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "data" / "AAPL_1h.csv").exists()
