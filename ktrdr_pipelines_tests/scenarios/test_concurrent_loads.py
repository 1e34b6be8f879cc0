"""Concurrent loads: beside another load of the series, a reader, an editor, and on a fresh Dagster home.

Real processes, a real Dagster instance, a simulated gateway on a real socket. Killed loads are in `scenarios/test_kills.py`.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import opens_of
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.conftest import CommandEnvironment, LoadAt, StartGateway
from ktrdr_pipelines_tests.fakes import window
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import poll
from ktrdr_pipelines_tests.load_forks import CommandForks, ForkServer, LoadForks

MakeSettings = Callable[..., Settings]

pytestmark = pytest.mark.slow

AAPL_1H = Series(stock("AAPL"), TIMEFRAMES["1h"])
FIRST, AFTER = "2023-01-01", "2024-01-01"


def expected_opens(start: str = FIRST, end: str = AFTER) -> np.ndarray:
    return expected_bars(AAPL_1H, window(start, end)).opens


@pytest.fixture(scope="module")
def truth(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The CSV of one undisturbed load, with long requests."""
    folder = tmp_path_factory.mktemp("truth")
    with run_in_thread(SyntheticMarket(), judge=False) as gateway:
        forks = LoadForks(fork_server, gateway.port, folder)
        assert forks.wait(forks.start("AAPL", "1h", FIRST, AFTER, limits="current")) == 0
    data = (folder / "data" / "AAPL_1h.csv").read_bytes()
    assert data.count(b"\n") == 1 + len(expected_opens())
    return data


def assert_sound(folder: Path, truth: bytes) -> None:
    """The file is the truth, the sidecar fits it, no temporary file is left."""
    store = Store(folder / "data")
    assert store.csv_path(AAPL_1H).read_bytes() == truth
    assert store.verify(AAPL_1H) == []
    assert store.is_as_left(AAPL_1H)
    assert not list((folder / "data").glob(".*.new"))


# ---------------------------------------------------------------------------------------------------- two loads


def test_two_loads_of_one_series_ask_once_and_lose_nothing(
    start_gateway: StartGateway, load_at: LoadAt, tmp_path: Path, truth: bytes
) -> None:
    """The second waits for the first, and finds no bar missing; on two Dagster homes, where no part of Dagster separates them."""
    gateway = start_gateway()
    forks = load_at(gateway.port)
    loads = [forks.start("AAPL", "1h", FIRST, AFTER, home=home) for home in ("home", "another home")]
    assert [forks.wait(pid) for pid in loads] == [0, 0], (tmp_path / "loads.log").read_text()
    assert len({(r.end, r.duration) for r in gateway.requests}) == len(gateway.requests)
    assert_sound(tmp_path, truth)


def test_two_loads_of_one_series_that_overlap_lose_nothing_and_ask_for_no_bar_twice(
    start_gateway: StartGateway, load_at: LoadAt, tmp_path: Path, truth: bytes
) -> None:
    gateway = start_gateway()
    forks = load_at(gateway.port)
    loads = [
        forks.start("AAPL", "1h", FIRST, "2023-10-01"),
        forks.start("AAPL", "1h", "2023-03-01", AFTER, home="another home"),
    ]
    assert [forks.wait(pid) for pid in loads] == [0, 0], (tmp_path / "loads.log").read_text()
    assert len(gateway.requests) <= 14  # a month each; the seven common months twice would make 19
    assert_sound(tmp_path, truth)


# ---------------------------------------------------------------------------------------------------- a reader


@contextmanager
def under_way(forks: LoadForks, *job: str, may_fail: bool = False) -> Iterator[Callable[[], bool]]:
    """A load in progress; yields whether it still runs. It must succeed, or end with failed windows if it ``may_fail``."""
    pid, over, codes = forks.start(*job), threading.Event(), []

    def wait() -> None:
        codes.append(forks.wait(pid))
        over.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield lambda: not over.is_set()
    finally:
        thread.join()
    assert codes == [0] or (may_fail and codes == [1])


def test_a_reader_beside_a_load_sees_whole_files_and_true_claims(
    start_gateway: StartGateway, load_at: LoadAt, tmp_path: Path, truth: bytes
) -> None:
    """Each read, with a plain `open` and through the store, returns a file that some write left: never a part of one, never
    shorter than before, and no claim about bars that are not in the file read after it."""
    store = Store(tmp_path / "data")
    path = store.csv_path(AAPL_1H)
    expected = expected_opens()
    looks, sizes = 0, {0}
    forks = load_at(start_gateway().port)
    with under_way(forks, "AAPL", "1h", FIRST, AFTER) as goes_on:
        while goes_on():
            claimed = store.read_sidecar(AAPL_1H).answered_windows
            held = store.held_opens(AAPL_1H)
            for span in claimed:
                inside = expected[(expected >= span.start_s) & (expected < span.end_s)]
                assert np.isin(inside, held).all(), f"{span} is claimed and not held"
            data = path.read_bytes() if path.exists() else b""
            assert truth.startswith(data), "no file that a write left"
            assert len(data) >= max(sizes)
            bars = store.read_bars(AAPL_1H)
            assert len(bars) >= len(held)
            assert (np.diff(opens_of(bars)) > 0).all()
            looks, sizes = looks + 1, sizes | {len(data)}
    assert len(sizes) > 5, "the reader met hardly any write: the test is void"
    assert_sound(tmp_path, truth)


# ---------------------------------------------------------------------------------------------------- an editor


def save_in_place(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        file.write(data[len(data) // 2 :])


def save_by_renaming(path: Path, data: bytes) -> None:
    path.with_suffix(".swp").write_bytes(data)
    path.with_suffix(".swp").replace(path)


@pytest.mark.parametrize("save", [save_in_place, save_by_renaming])
def test_an_editor_that_saves_beside_a_load_costs_no_bar(
    start_gateway: StartGateway, load_at: LoadAt, tmp_path: Path, truth: bytes, save: Callable[[Path, bytes], None]
) -> None:
    """A user has the file open, deletes a row and saves the editor's content, again and again, while bars arrive. Each of the
    load's bars that a save removed is fetched again by the next load at the latest, the deleted row too."""
    path = tmp_path / "data" / "AAPL_1h.csv"
    forks = load_at(start_gateway().port)
    assert forks.wait(forks.start("AAPL", "1h", FIRST, "2023-03-01")) == 0
    with under_way(forks, "AAPL", "1h", FIRST, AFTER, may_fail=True) as goes_on:
        for _ in range(4):
            lines, before = path.read_bytes().splitlines(keepends=True), path.stat().st_size
            poll(
                lambda before=before: path.stat().st_size != before or not goes_on(), 60
            )  # until there are bars that the editor has not read
            save(path, b"".join(lines[:100] + lines[101:]))
    assert path.read_bytes() != truth, "no save removed a bar: the test is void"
    assert forks.wait(forks.start("AAPL", "1h", FIRST, AFTER)) == 0, (tmp_path / "loads.log").read_text()
    assert_sound(tmp_path, truth)


# ---------------------------------------------------------------------------------------------------- a fresh home


def test_a_fresh_home_used_by_four_commands_at_once_works(
    start_gateway: StartGateway,
    command_forks: CommandForks,
    command_environment: CommandEnvironment,
    make_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    """Four `ktrdr ib-load` of four series begin on an empty home at once: all of them succeed, and no pacing rule is broken."""
    gateway = start_gateway(judge=True)
    environment = command_environment(gateway.port)
    symbols = ("AAPL", "MSFT", "SPY", "GOOG")
    more = ("1h", "--mode", "full", "--start", "2024-02-05", "--end", "2024-02-10")
    running = [command_forks.start("ib-load", symbol, *more, environment=environment) for symbol in symbols]
    ended = [command_forks.wait(pid) for pid in running]
    assert [each.returncode for each in ended] == [0, 0, 0, 0], ended
    for symbol in symbols:
        with (tmp_path / "data" / f"{symbol}_1h.csv").open() as file:
            assert len(list(csv.reader(file))) == 1 + 5 * 7
    assert gateway.violations == []
    assert sorted(r.symbol for r in gateway.requests) == sorted(symbols)
    with open_instance(make_settings(gateway.port)) as instance:
        assert [run.status.value for run in instance.get_runs()] == ["SUCCESS"] * 4


def test_a_fresh_home_used_by_four_loads_of_one_series_at_once_works(
    start_gateway: StartGateway, load_at: LoadAt, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """The same with one series: the first of them requests it, once."""
    gateway = start_gateway()
    forks = load_at(gateway.port)
    loads = [forks.start("AAPL", "1h", "2024-02-05", "2024-02-10") for _ in range(4)]
    assert [forks.wait(pid) for pid in loads] == [0] * 4, (tmp_path / "loads.log").read_text()
    assert len(gateway.requests) == 1
    with open_instance(make_settings(gateway.port)) as instance:
        assert [run.status.value for run in instance.get_runs()] == ["SUCCESS"] * 4
    assert len((tmp_path / "data" / "AAPL_1h.csv").read_text().splitlines()) == 1 + 5 * 7
