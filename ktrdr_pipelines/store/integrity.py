"""Reading a whole CSV against its sidecar and the rules for bars, and listing everything that is wrong.

Changes nothing and takes no lock. What puts a file right is in `settle.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_pipelines.bars.schema import rules_for
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    MalformedFile,
    count_lines,
    first_and_last_open,
    parse_rows,
    read_range,
)
from ktrdr_pipelines.store.paths import SeriesFiles, explained, fault_at, opened
from ktrdr_pipelines.store.sidecar import PartitionMark, Sidecar, UnreadableSidecar
from ktrdr_pipelines.store.splice import locate_partitions, mark_located


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``partition`` and ``line`` are set where they are known."""

    text: str
    partition: str = ""
    line: int = 0

    def __str__(self) -> str:
        return self.text


def verify_files(files: SeriesFiles, series: Series, window: Window | None) -> list[Problem]:
    """See `Store.verify`."""
    doing = f"verifying {series}"
    path = files.csv(series)
    problems: list[Problem] = []
    recorded = Sidecar()
    try:
        recorded = files.load_sidecar(series, doing)
    except UnreadableSidecar as failure:
        problems.append(Problem(f"{files.sidecar(series).name} is unreadable: {failure}"))
    marks: dict[str, PartitionMark] = {}
    wanted = None if window is None else {p.key for p in partitions_in(series.timeframe, window)}
    with explained(path, doing), opened(path) as file:
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
    for key, mark in sorted(recorded.partitions.items()):
        if wanted is not None and key not in wanted:
            continue
        if key not in marks:
            problems.append(Problem(f"{key}: the {mark.rows} rows last written are gone", key))
        elif marks[key] != mark:
            text = f"{key}: its {marks[key].rows} rows are not the {mark.rows} rows last written"
            problems.append(Problem(text, key))
    return problems


def _list_bad_rows(fd: int, start: int, end: int, series: Series, key: str) -> list[Problem]:
    _, faults = parse_rows(read_range(fd, start, end), rules_for(series))
    before = count_lines(fd, 0, start) if faults else 0
    shown = [fault_at(fd, start + offset, why, before + row + 1) for row, offset, why in faults]
    return [Problem(str(fault), key, fault.line) for fault in shown]


def _list_bad_lines(fd: int, size: int, series: Series) -> list[Problem]:
    """For a file without order, in which partitions cannot be told."""
    header_end = read_range(fd, 0, 4096).find(b"\n") + 1 or size
    problems = []
    if read_range(fd, 0, header_end) != HEADER:
        problems.append(Problem(str(fault_at(fd, 0, "not the header of a normal file", 1)), line=1))
    if read_range(fd, size - 1, size) != b"\n":
        problems.append(Problem("the last line has no end", line=count_lines(fd, 0, size) + 1))
    return problems + _list_bad_rows(fd, header_end, size, series, "")
