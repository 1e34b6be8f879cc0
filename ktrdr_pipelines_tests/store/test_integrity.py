"""The search for damage: every bad row with its partition and line, and rows that are as written are not parsed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ktrdr_pipelines.bars.schema import bars_from_columns
from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.store import integrity
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.fakes import utc, window

AAPL_1M = Series(stock("AAPL"), TIMEFRAMES["1m"])
MARCH = window("2024-03-01", "2024-04-01")
ROWS_A_DAY = 390


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """March of AAPL 1m: 20 partitions of 390 rows."""
    made = Store(tmp_path)
    opens_s = expected_bars(AAPL_1M, MARCH).opens
    price = 100 + np.arange(len(opens_s)) % 77 / 8
    bars = bars_from_columns(opens_s, price, price + 1, price - 1, price, np.arange(len(opens_s)))
    made.write(AAPL_1M, bars, answered=MARCH, source="simulator", now=utc("2024-06-01"))
    return made


def spoil_rows(store: Store, *numbers: int) -> list[int]:
    """Make rows invalid; their line numbers."""
    path = store.csv_path(AAPL_1M)
    lines = path.read_text().splitlines(keepends=True)
    for number in numbers:
        stamp, *_ = lines[number + 1].split(",")
        lines[number + 1] = f"{stamp},1,2,3,1,5\n"
    path.write_text("".join(lines))
    return [number + 2 for number in numbers]


@pytest.mark.parametrize("parsed_bytes", [1, 50_000, 1 << 23])
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_each_bad_row_is_found_with_its_partition_and_line(
    store: Store, has_sidecar: bool, parsed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In neighbouring partitions and apart, at the ends of partitions and of the file, parsed one by one or together."""
    monkeypatch.setattr(integrity, "_PARSED_BYTES", parsed_bytes)
    rows = [0, ROWS_A_DAY - 1, ROWS_A_DAY, 7 * ROWS_A_DAY + 5, 20 * ROWS_A_DAY - 1]
    lines = spoil_rows(store, *rows)
    if not has_sidecar:
        store.sidecar_path(AAPL_1M).unlink()
    found = Store(store.data_dir).verify(AAPL_1M)
    by_row = [(problem.partition, problem.line) for problem in found if problem.line]
    keys = ["2024-03-01", "2024-03-01", "2024-03-04", "2024-03-12", "2024-03-28"]
    assert by_row == list(zip(keys, lines, strict=True))
    changed = [problem.partition for problem in found if not problem.line]
    assert changed == (sorted(set(keys)) if has_sidecar else [])


def test_only_partitions_of_the_window_are_searched(store: Store) -> None:
    """A bad row outside is another window's."""
    spoil_rows(store, 0, 7 * ROWS_A_DAY)
    found = store.verify(AAPL_1M, window("2024-03-11", "2024-03-14"))
    assert {problem.partition for problem in found} == {"2024-03-12"}


def test_rows_as_written_are_not_parsed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checksum is the recorded one, and they were validated before."""
    monkeypatch.setattr(integrity, "parse_rows", lambda *_: pytest.fail("rows were parsed"))
    assert store.verify(AAPL_1M) == []
