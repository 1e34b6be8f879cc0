"""Session tables on disk: the same as computed ones, and never a reason to fail."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.calendars import table_cache
from ktrdr_pipelines.calendars.session_tables import SessionTable, build_table
from ktrdr_pipelines.calendars.table_cache import find_table


def columns(table: SessionTable) -> list[object]:
    values = [getattr(table, field.name) for field in fields(table)]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


def refuse_to_build(calendar: str, *, extended: bool) -> SessionTable:
    raise AssertionError(f"{calendar} {extended} was computed")


def break_at(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("extended", [False, True])
def test_a_kept_table_is_the_computed_one(extended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array, lunch breaks included; the second look computes nothing."""
    computed = build_table("JPX", extended=extended)
    assert columns(find_table("JPX", extended=extended, folder=tmp_path)) == columns(computed)
    monkeypatch.setattr(table_cache, "build_table", refuse_to_build)
    assert columns(find_table("JPX", extended=extended, folder=tmp_path)) == columns(computed)
    with pytest.raises(AssertionError):
        find_table("JPX", extended=not extended, folder=tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    """An empty file, half a file, a changed byte and another kind of file: none of them reaches a caller."""
    right = columns(find_table("XETR", extended=False, folder=tmp_path))
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    if damage == "flipped":
        break_at(path, size // 2)
    elif damage == "other":
        np.savez(path, dates=np.zeros(3))
    else:
        path.write_bytes(path.read_bytes()[: size // 2 if damage == "cut" else 0])
    assert columns(find_table("XETR", extended=False, folder=tmp_path)) == right
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size == size


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "calendars").write_text("")
    table = find_table("XETR", extended=False, folder=tmp_path / "calendars")
    assert columns(table) == columns(build_table("XETR", extended=False))


def test_other_sources_are_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new release of a library or of the zone data is not answered from an old table."""
    find_table("XETR", extended=False, folder=tmp_path)
    monkeypatch.setattr(table_cache, "version", lambda name: f"{name} 99")
    table_cache._sources.cache_clear()
    try:
        find_table("XETR", extended=False, folder=tmp_path)
    finally:
        table_cache._sources.cache_clear()
    assert len(list(tmp_path.iterdir())) == 2
