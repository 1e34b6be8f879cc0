"""The cache of sidecars: one parse as long as the files are unchanged, and every change is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ktrdr_pipelines.store import sidecar_cache
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.store.test_store import AAPL_1M, NOW, QuickDisk, edit_lines, make_bars, window_of, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Ten bars and a claim, written by another store of the same folder."""
    write(Store(tmp_path, disk=QuickDisk()), make_bars(range(10)), window_of(0, 10))
    return Store(tmp_path, disk=QuickDisk())


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(sidecar_cache, name)

    def counting(*arguments: object) -> object:
        calls.append(name)
        return real(*arguments)

    monkeypatch.setattr(sidecar_cache, name, counting)
    return calls


def test_unchanged_files_are_parsed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    parses = count_calls(monkeypatch, "parse_sidecar")
    scans = count_calls(monkeypatch, "scan_opens")
    for _ in range(3):
        store.read_sidecar(AAPL_1M)
        store.read_bars(AAPL_1M)
        store.prepare(AAPL_1M, now=NOW)
    write(store, make_bars([20]), window_of(20, 21))
    assert store.read_sidecar(AAPL_1M).rows == 11
    assert (len(parses), len(scans)) == (1, 0)


def test_an_edited_csv_is_scanned_and_corrected_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.read_sidecar(AAPL_1M)
    edit_lines(store, lambda lines: lines[:-1])
    parses = count_calls(monkeypatch, "parse_sidecar")
    scans = count_calls(monkeypatch, "scan_opens")
    corrections = count_calls(monkeypatch, "locate_partitions")
    for _ in range(3):
        assert len(store.held_opens(AAPL_1M)) == 9
        assert store.read_sidecar(AAPL_1M).answered == ()
    assert (len(parses), len(scans), len(corrections)) == (0, 1, 1)


@pytest.mark.parametrize("is_rescanned", [True, False])
def test_a_csv_beside_an_unreadable_sidecar_is_scanned_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, is_rescanned: bool
) -> None:
    """Once more after each change of either file."""
    store.sidecar_path(AAPL_1M).write_text("{")
    scans = count_calls(monkeypatch, "scan_opens")
    for n in range(3):
        if is_rescanned:
            os.utime(store.csv_path(AAPL_1M), ns=(n, n))
        store.read_bars(AAPL_1M)
    assert len(scans) == (3 if is_rescanned else 1)


def test_a_sidecar_of_the_same_state_and_other_bytes_is_noticed(store: Store) -> None:
    """Same size, time of change and inode, as after two writes in one tick of the clock."""
    path = store.sidecar_path(AAPL_1M)
    state = path.stat()
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 10),)
    with path.open("r+b") as file:
        content = file.read().replace(b"14:40:00Z", b"14:35:00Z")
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size) == (state.st_ino, state.st_size)
    assert store.read_sidecar(AAPL_1M).answered_windows == (window_of(0, 5),)
