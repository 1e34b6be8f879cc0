"""``make matrix``: play the whole fault matrix and print it as a table, faults in rows. Exit code 1 if a promise is broken.

The cells are those of `ktrdr_pipelines_tests/scenarios/fault_matrix.py`. ``tools/matrix.py TEXT ...`` plays only cells whose name
contains one of the texts.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ktrdr_pipelines_tests.scenarios.fault_matrix import Cell, check, list_cells


@dataclass
class Row:
    """One fault over all its cells."""

    cells: int = 0
    failed: int = 0
    lost: list[int] = field(default_factory=lambda: [0, 0])
    wrong: list[int] = field(default_factory=lambda: [0, 0])
    requests: list[int] = field(default_factory=lambda: [0, 0])
    reports: Counter[str] = field(default_factory=Counter)


def shorten(text: str) -> str:
    """A report without series and window, which differ from cell to cell."""
    text = text.split("Z: ")[-1]
    return text.replace("the gateway answered ", "").replace("Historical Market Data Service error message:", "")[:88]


def play(cell: Cell, row: Row, scratch: Path) -> str:
    """Both runs of a cell into its row. Returns the promise broken, or an empty string."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        runs = cell.play(scratch, folder)
        row.cells += 1
        row.failed += bool(runs[0].report.failures)
        row.reports[shorten(runs[0].summary)] += 1
        for n, run in enumerate(runs):
            row.lost[n] += sum(run.window.start_s <= s < run.window.end_s for s in run.verdict.lost)
            row.wrong[n] += len(run.verdict.wrong) + len(run.verdict.invented) + run.verdict.doubled
            row.requests[n] += run.requests
        check(cell, *runs)
    except AssertionError as broken:
        return str(broken).splitlines()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Play the fault matrix and print it as a table.")
    parser.add_argument("texts", nargs="*", help="only cells whose name contains one of these")
    wanted = parser.parse_args().texts
    cells = [cell for cell in list_cells() if not wanted or any(text in cell.name for text in wanted)]
    logging.disable(logging.CRITICAL)  # every fault is logged; the table lists it once
    rows: dict[str, Row] = {}
    broken: list[str] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells:
            if why := play(cell, rows.setdefault(cell.fault.name, Row()), Path(scratch)):
                broken.append(f"{cell.name}: {why}")
    print("runs: first with the fault, second without; bars summed over the cells of a row\n")
    print(
        f"{'fault':<37} {'cells':>5} {'failed':>6} {'lost 1':>6} {'lost 2':>6} {'wrong 1, 2':>10} {'requests':>8}  run 1"
    )
    for name, row in rows.items():
        lost, wrong, asked = row.lost, f"{row.wrong[0]}, {row.wrong[1]}", "+".join(map(str, row.requests))
        reports = row.reports.most_common(1)[0][0] if row.reports else "?"
        print(f"{name:<37} {row.cells:>5} {row.failed:>6} {lost[0]:>6} {lost[1]:>6} {wrong:>10} {asked:>8}  {reports}")
    print(f"\n{len(cells)} cells in {time.monotonic() - begun:.0f} s, {len(broken)} promises broken")
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
