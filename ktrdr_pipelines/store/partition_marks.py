"""Rows and checksum of each partition of a CSV, as the sidecar records them.

They show which partitions another program changed. Work on open files, or on rows that were just rendered.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np

from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.partitions import partition_at, partition_from_key
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.store.csv_format import MalformedFile
from ktrdr_pipelines.store.csv_scan import checksum, find_row, scan_opens
from ktrdr_pipelines.store.sidecar import PartitionMark


def mark_partitions(fd: int, timeframe: Timeframe, start: int, end: int) -> dict[str, PartitionMark]:
    """Rows and checksum of each partition between two offsets, which must be bounds of partitions.

    Raises:
        MalformedFile: a line does not begin with a stamp, or stamps do not strictly increase.
    """
    return mark_located(fd, locate_partitions(fd, timeframe, start, end))


def mark_located(fd: int, places: Mapping[str, tuple[int, int, int]]) -> dict[str, PartitionMark]:
    """The marks of partitions found by `locate_partitions`."""
    return {key: PartitionMark(rows=rows, crc32=checksum(fd, low, high)) for key, (rows, low, high) in places.items()}


def locate_partitions(fd: int, timeframe: Timeframe, start: int, end: int) -> dict[str, tuple[int, int, int]]:
    """Partition key -> rows, first offset, end offset; otherwise like `mark_partitions`."""
    found: dict[str, tuple[int, int, int]] = {}
    for opens_s, offsets in scan_opens(fd, start, end):
        i = 0
        while i < len(opens_s):
            partition = partition_at(timeframe, _instant(int(opens_s[i])))
            j = int(np.searchsorted(opens_s, partition.window.end_s))
            rows, low, _ = found.get(partition.key, (0, int(offsets[i]), 0))
            found[partition.key] = (rows + j - i, low, end)
            i = j
    if not found:
        return {}  # a header and no row
    bounds = [*[low for _, low, _ in found.values()][1:], end]
    return {key: (rows, low, high) for (key, (rows, low, _)), high in zip(found.items(), bounds, strict=True)}


def mark_range(fd: int, timeframe: Timeframe, first_s: int, last_s: int) -> dict[str, PartitionMark]:
    """The marks of the partitions from ``first_s`` to ``last_s`` (opens of bars, epoch seconds)."""
    size = os.fstat(fd).st_size
    start = find_row(fd, size, partition_at(timeframe, _instant(first_s)).window.start_s)
    end = find_row(fd, size, partition_at(timeframe, _instant(last_s)).window.end_s)
    return mark_partitions(fd, timeframe, start, end)


def extend_marks(
    recorded: Mapping[str, PartitionMark], timeframe: Timeframe, held_s: int | None, opens_s: IntArray, rows: bytes
) -> dict[str, PartitionMark] | None:
    """The marks of the partitions that ``rows`` fall into (one for each of ``opens_s``, epoch seconds), which come after the last
    held bar, open at ``held_s``. Reads nothing: a partition that has rows already keeps its recorded checksum going.

    None when that one was not ``recorded``.
    """
    ends = np.flatnonzero(np.frombuffer(rows, np.uint8) == 10) + 1
    view = memoryview(rows)
    last_key = "" if held_s is None else partition_at(timeframe, _instant(held_s)).key
    found: dict[str, PartitionMark] = {}
    i = start = 0
    while i < len(opens_s):
        partition = partition_at(timeframe, _instant(int(opens_s[i])))
        j = int(np.searchsorted(opens_s, partition.window.end_s))
        end = int(ends[j - 1])
        before = PartitionMark(rows=0, crc32="0") if partition.key != last_key else recorded.get(partition.key)
        if before is None:
            return None
        crc = zlib.crc32(view[start:end], int(before.crc32, 16))
        found[partition.key] = PartitionMark(rows=before.rows + j - i, crc32=f"{crc:08x}")
        i, start = j, end
    return found


def only_grown(
    fd: int, places: Mapping[str, tuple[int, int, int]], recorded: Mapping[str, PartitionMark], size: int
) -> frozenset[str]:
    """The partition that had only grown at its end since the file had ``size`` bytes, if there is one: what was recorded of it
    is still there. ``places``: as `locate_partitions` returns them."""
    return frozenset(
        key
        for key, (_, low, high) in places.items()
        if low < size < high and key in recorded and recorded[key].crc32 == checksum(fd, low, size)
    )


def has_recorded_start(fd: int, timeframe: Timeframe, recorded: Mapping[str, PartitionMark], size: int) -> bool:
    """True if the first ``size`` bytes of the file are those of our last write, judged by the last ``recorded`` partition."""
    try:
        key = max(recorded)
        low = find_row(fd, size, partition_from_key(timeframe, key).window.start_s)
        return checksum(fd, low, size) == recorded[key].crc32
    except (ValueError, InputError, MalformedFile):
        return False


def _instant(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)
