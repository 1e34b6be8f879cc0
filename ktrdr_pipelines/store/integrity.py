"""Comparison of a whole CSV with its sidecar and the rules for bars: a list of everything that is wrong.

Changes nothing and takes no lock. Repair is in `settle.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_pipelines.bars.schema import rules_for
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.atomic import explained
from ktrdr_pipelines.store.csv_format import HEADER, MalformedFile, parse_rows
from ktrdr_pipelines.store.csv_scan import count_lines, first_and_last_open, read_range
from ktrdr_pipelines.store.partition_marks import locate_partitions, mark_located
from ktrdr_pipelines.store.paths import fault_at, opened
from ktrdr_pipelines.store.sidecar import PartitionMark, Sidecar, UnreadableSidecar
from ktrdr_pipelines.store.sidecar_cache import SidecarCache


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a file. ``partition`` and ``line`` are set where they are known."""

    text: str
    partition: str = ""
    line: int = 0

    def __str__(self) -> str:
        return self.text


def verify_files(sidecars: SidecarCache, series: Series, window: Window | None) -> list[Problem]:
    """See `Store.verify`."""
    doing = f"verifying {series}"
    path = sidecars.files.csv(series)
    problems: list[Problem] = []
    recorded = Sidecar()
    try:
        recorded = sidecars.load(series, doing)
    except UnreadableSidecar as failure:
        problems.append(Problem(f"{sidecars.files.sidecar(series).name} is unreadable: {failure}"))
    wanted = None if window is None else {p.key for p in partitions_in(series.timeframe, window)}
    marks: dict[str, PartitionMark] = {}
    committed = recorded.file.size if recorded.file else 0
    with explained(path, doing), opened(path, committed) as file:
        if file is not None:
            fd, state = file
            try:
                first_and_last_open(fd, state.size)
                places = locate_partitions(fd, series.timeframe, len(HEADER), state.size)
            except MalformedFile:
                return problems + _list_bad_lines(fd, state.size, series)
            marks = mark_located(fd, places)
            for key, (_, start, end) in places.items():
                if wanted is None or key in wanted:
                    problems += _list_bad_rows(fd, start, end, series, key)
    return problems + [
        _describe_change(key, mark, marks.get(key))
        for key, mark in sorted(recorded.partitions.items())
        if (wanted is None or key in wanted) and marks.get(key) != mark
    ]


def _describe_change(key: str, recorded: PartitionMark, found: PartitionMark | None) -> Problem:
    if found is None:
        return Problem(f"{key}: the {recorded.rows} rows last written are gone", key)
    return Problem(f"{key}: its {found.rows} rows are not the {recorded.rows} rows last written", key)


def _list_bad_rows(fd: int, start: int, end: int, series: Series, key: str) -> list[Problem]:
    _, faults = parse_rows(read_range(fd, start, end), rules_for(series))
    before = count_lines(fd, 0, start) if faults else 0
    shown = [fault_at(fd, start + offset, why, before + row + 1) for row, offset, why in faults]
    return [Problem(str(fault), key, fault.line) for fault in shown]


def _list_bad_lines(fd: int, size: int, series: Series) -> list[Problem]:
    """For a file that is not sorted, in which partitions cannot be located."""
    header_end = read_range(fd, 0, 4096).find(b"\n") + 1 or size
    problems = []
    if read_range(fd, 0, header_end) != HEADER:
        problems.append(Problem(str(fault_at(fd, 0, "not the header of a normal file", 1)), line=1))
    if read_range(fd, size - 1, size) != b"\n":
        problems.append(Problem("the last line has no end", line=count_lines(fd, 0, size) + 1))
    return problems + _list_bad_rows(fd, header_end, size, series, "")
