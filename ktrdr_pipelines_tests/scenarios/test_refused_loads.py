"""Whole commands on a disk that refuses: one line, exit code 7, and no file changed.

The command runs in this process with a disk that fails, except where the system itself can be made to refuse.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ktrdr_pipelines.cli.main import main
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.load_forks import ROOT

pytestmark = pytest.mark.slow

Load = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def load(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Load:
    """`ktrdr ib-load AAPL 1h` from a day of 2024-02 to another in this process: exit code and its own lines."""
    monkeypatch.setenv("IB_PORT", str(start_gateway().port))
    monkeypatch.setenv("KTRDR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(first: int, last: int, symbol: str = "AAPL") -> tuple[int, list[str]]:
        span = ["--start", f"2024-02-{first:02}", "--end", f"2024-02-{last:02}"]
        monkeypatch.setattr(sys, "argv", ["ktrdr", "ib-load", symbol, "1h", "--mode", "full", *span])
        with pytest.raises(SystemExit) as ended:
            main()
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return int(ended.value.code or 0), [line for line in errors.splitlines() if line.startswith("ktrdr: ")]

    return run


def files_in(folder: Path) -> dict[str, bytes]:
    """Name and content of all files but locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(
    ("code", "call", "reason"),
    [
        (errno.ENOSPC, "write", "the disk is full"),
        (errno.EDQUOT, "sync", "quota"),
        (errno.EROFS, "create", "read-only"),
        (errno.ENOSPC, "replace", "the disk is full"),
    ],
)
def test_a_disk_that_refuses_is_one_line_and_changes_nothing(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str, reason: str
) -> None:
    """Exit code 7, the name of the file and the reason; no byte differs; when the disk works again the load completes."""
    assert load(5, 7) == (0, [])
    before = files_in(tmp_path / "data")

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(Disk, call, refuse)
        exit_code, lines = load(5, 10)
    assert exit_code == 7
    assert len(lines) == 1
    assert reason in lines[0]
    assert "AAPL_1h.csv" in lines[0]
    assert files_in(tmp_path / "data") == before
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "another home"))  # an empty ledger: no wait for the same request
    assert load(5, 10) == (0, [])
    assert len((tmp_path / "data" / "AAPL_1h.csv").read_text().splitlines()) == 1 + 5 * 7


def test_a_symbol_too_long_for_a_file_name_is_one_line(load: Load, tmp_path: Path) -> None:
    """300 characters: wrong input, exit code 2, and no file."""
    code, lines = load(5, 7, symbol="A" * 300)
    assert (code, len(lines)) == (2, 1)
    assert "is not a symbol" in lines[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("limit_kib", [100, 20])
def test_a_dagster_home_without_room_is_one_line(load: Load, tmp_path: Path, limit_kib: int) -> None:
    """No file can grow: on a fresh home, and on one that is in use. No traceback, the bars as before, and the next command
    works."""
    if limit_kib == 20:
        assert load(5, 7) == (0, [])
    (tmp_path / "data").mkdir(exist_ok=True)
    before = files_in(tmp_path / "data")
    command = f"ulimit -f {limit_kib}; exec {sys.executable} -m ktrdr_pipelines.cli ib-load AAPL 1h --mode full"
    done = subprocess.run(
        ["bash", "-c", f"{command} --start 2024-02-05 --end 2024-02-10"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("ktrdr: ")]
    assert (done.returncode, len(lines)) == (7, 1), done.stderr
    assert "DAGSTER_HOME" in lines[0]
    assert "Traceback" not in done.stderr
    assert files_in(tmp_path / "data") == before
    assert load(5, 10) == (0, [])
