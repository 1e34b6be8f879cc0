"""Comparison of a whole CSV with its sidecar and the rules for bars: a list of everything that is wrong.

Changes nothing and takes no lock. Repair is in `settle.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

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

_PARSED_BYTES = 1 << 23


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
            # A partition with the recorded checksum has the rows that were validated when they were written.
            doubtful = {
                key: place[1:]
                for key, place in places.items()
                if (wanted is None or key in wanted) and recorded.partitions.get(key) != marks[key]
            }
            problems += _list_bad_partitions(fd, series, doubtful)
    return problems + [
        _describe_change(key, mark, marks.get(key))
        for key, mark in sorted(recorded.partitions.items())
        if (wanted is None or key in wanted) and marks.get(key) != mark
    ]


def _describe_change(key: str, recorded: PartitionMark, found: PartitionMark | None) -> Problem:
    if found is None:
        return Problem(f"{key}: the {recorded.rows} rows last written are gone", key)
    return Problem(f"{key}: its {found.rows} rows are not the {recorded.rows} rows last written", key)


def _list_bad_partitions(fd: int, series: Series, places: Mapping[str, tuple[int, int]]) -> list[Problem]:
    """The bad rows of partitions between two offsets each, in the order of the file. Neighbours are parsed together: parsing a
    day alone takes as long as parsing a month."""
    problems: list[Problem] = []
    keys, ranges = list(places), list(places.values())
    first = 0
    for i, (_, end) in enumerate(ranges):
        is_last = i + 1 == len(ranges) or ranges[i + 1][0] != end or end - ranges[first][0] >= _PARSED_BYTES
        if is_last:
            starts = [start for start, _ in ranges[first : i + 1]]
            for offset, problem in _list_bad_rows(fd, starts[0], end, series):
                problems.append(replace(problem, partition=keys[first + bisect_right(starts, offset) - 1]))
            first = i + 1
    return problems


def _list_bad_rows(fd: int, start: int, end: int, series: Series) -> list[tuple[int, Problem]]:
    """The bad rows between two offsets, each with its own."""
    _, faults = parse_rows(read_range(fd, start, end), rules_for(series))
    before = count_lines(fd, 0, start) if faults else 0
    shown = [(start + at, fault_at(fd, start + at, why, before + row + 1)) for row, at, why in faults]
    return [(at, Problem(str(fault), line=fault.line)) for at, fault in shown]


def _list_bad_lines(fd: int, size: int, series: Series) -> list[Problem]:
    """For a file that is not sorted, in which partitions cannot be located."""
    header_end = read_range(fd, 0, 4096).find(b"\n") + 1 or size
    problems = []
    if read_range(fd, 0, header_end) != HEADER:
        problems.append(Problem(str(fault_at(fd, 0, "not the header of a normal file", 1)), line=1))
    if read_range(fd, size - 1, size) != b"\n":
        problems.append(Problem("the last line has no end", line=count_lines(fd, 0, size) + 1))
    return problems + [problem for _, problem in _list_bad_rows(fd, header_end, size, series)]
