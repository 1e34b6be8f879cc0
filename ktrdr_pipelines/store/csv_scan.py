"""Rows of an open CSV: found by bisecting their stamps, so that the cost of a window does not grow with the file, and read.

Reads through a descriptor with positioned reads and never maps the file: an editor that truncates a mapped file kills the
reading process (SIGBUS). No locks, no writing: `store.py`. The bytes of a row: `csv_format.py`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ktrdr_pipelines.bars.schema import Rule, bars_from_columns
from ktrdr_pipelines.domain.arrays import IntArray
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.csv_format import (
    HEADER,
    STAMP_BYTES,
    MalformedFile,
    parse_columns,
    parse_rows,
    parse_stamps,
    render_stamp,
    split_rows,
)

if TYPE_CHECKING:
    import pandas as pd

MAX_ROW_BYTES = 4096
"""The longest row: five numbers of at most 330 digits fit."""

_STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ,")
CHUNK_BYTES = 1 << 22


def read_range(fd: int, start: int, end: int) -> bytes:
    """The bytes ``start`` to ``end`` of the file, fewer if it ends before."""
    parts = []
    while start < end and (part := os.pread(fd, min(end - start, 1 << 30), start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_range(
    fd: int, start: int, end: int, rules: Sequence[Rule]
) -> tuple[pd.DataFrame, list[tuple[int, int, str]]]:
    """`parse_rows` of the bytes ``start`` to ``end`` of the file, a few megabytes at a time: less memory, in half the time."""
    parts = [parse_columns(data, rules) for data in _blocks_of_rows(fd, start, end)]
    good = [part for part in parts if part is not None]
    if not parts or len(good) < len(parts) or any(a[0][-1] >= b[0][0] for a, b in pairwise(good)):
        return parse_rows(read_range(fd, start, end), rules)
    opens_s = np.concatenate([part[0] for part in good])
    return bars_from_columns(opens_s, *np.concatenate([part[1] for part in good], axis=1)), []


def _blocks_of_rows(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The rows between two offsets that are starts of rows, a few megabytes at a time. The last block may end inside a line."""
    while start < end:
        data = read_range(fd, start, min(end, start + CHUNK_BYTES))
        cut = len(data) if start + len(data) >= end else data.rfind(b"\n") + 1
        yield data[:cut] if cut else data
        start += cut or len(data)
        if not data:
            return


def find_row(fd: int, size: int, open_s: int) -> int:
    """Offset of the first row that opens at or after ``open_s``; ``size`` when there is none.

    Correct for a sorted file only (`sidecar_cache.SidecarCache.ensure_sorted`).

    Raises:
        MalformedFile: a line that was read is no row.
    """
    wanted = render_stamp(open_s)
    low, high = len(HEADER), size  # both are starts of rows, or the end
    while low < high:
        middle = (low + high) // 2
        base = max(low, middle - MAX_ROW_BYTES)
        block = os.pread(fd, middle + MAX_ROW_BYTES - base, base)
        newline = block.rfind(b"\n", 0, middle - base)
        if newline < 0 and base > low:
            raise MalformedFile("a line is far too long", base)
        start = newline + 1
        end = block.find(b"\n", start)
        if end < 0 or not _STAMP.match(block, start):
            raise MalformedFile("a line does not begin with a timestamp like 2024-01-02T14:30:00Z", base + start)
        if block[start : start + STAMP_BYTES] < wanted:
            low = base + end + 1
        else:
            high = base + start
    return low


def scan_opens(fd: int, start: int, end: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Opens and offsets of all rows between two offsets that are starts of rows, a few megabytes at a time.

    Raises:
        MalformedFile: a line does not begin with a stamp, or stamps do not strictly increase.
    """
    previous: int | None = None
    while start < end:
        data = read_range(fd, start, min(end, start + CHUNK_BYTES))
        cut = data.rfind(b"\n") + 1
        if not cut:
            raise MalformedFile(
                "the last line has no end" if start + len(data) >= end else "a line is far too long", start
            )
        array = np.frombuffer(data, np.uint8)[:cut]
        starts, _ = split_rows(array)
        opens_s, good = parse_stamps(array, starts)
        if not good.all():
            at = start + int(starts[int(np.argmin(good))])
            raise MalformedFile("a line does not begin with a timestamp like 2024-01-02T14:30:00Z", at)
        steps = np.diff(opens_s, prepend=opens_s[0] - 1 if previous is None else previous)
        if (steps <= 0).any():
            raise MalformedFile(
                "a row does not come after the row before it", start + int(starts[int(np.argmin(steps > 0))])
            )
        previous = int(opens_s[-1])
        yield opens_s, starts + start
        start += cut


def count_lines(fd: int, start: int, end: int) -> int:
    """Newlines between two offsets."""
    return sum(chunk.count(b"\n") for chunk in _chunks(fd, start, end))


def checksum(fd: int, start: int, end: int) -> str:
    """CRC-32 of the bytes between two offsets, eight hexadecimal digits."""
    crc = 0
    for chunk in _chunks(fd, start, end):
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _chunks(fd: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (chunk := os.pread(fd, min(end - start, 1 << 20), start)):
        yield chunk
        start += len(chunk)


def first_and_last_open(fd: int, size: int) -> tuple[int, int] | None:
    """Opens of the first and the last row, None without rows; three small reads.

    Raises:
        MalformedFile: the header, the first or the last line is not one of ours, or the last newline is missing.
    """
    head = os.pread(fd, len(HEADER) + STAMP_BYTES + 1, 0)
    if not head.startswith(HEADER):
        raise MalformedFile("the first line is not " + HEADER.decode().strip(), 0)
    if size == len(HEADER):
        return None
    base = max(len(HEADER), size - MAX_ROW_BYTES)
    tail = os.pread(fd, size - base, base)
    if not tail.endswith(b"\n"):
        raise MalformedFile("the last line has no end", size)
    start = tail.rfind(b"\n", 0, len(tail) - 1) + 1
    stamps = np.frombuffer(head[len(HEADER) :] + tail[start : start + STAMP_BYTES + 1] + b"\n", np.uint8)
    opens_s, good = parse_stamps(stamps, np.array([0, STAMP_BYTES + 1]))
    if not good.all():
        at = len(HEADER) if not good[0] else base + start
        raise MalformedFile("a line does not begin with a timestamp like 2024-01-02T14:30:00Z", at)
    return int(opens_s[0]), int(opens_s[1])


def find_window(fd: int, size: int, window: Window | None) -> tuple[int, int]:
    """Offsets of the first row of ``window`` and of the first after it, in a sorted file; all rows without a window."""
    if window is None:
        return len(HEADER), size
    return find_row(fd, size, window.start_s), find_row(fd, size, window.end_s)


def looks_normal(fd: int, size: int) -> bool:
    """True if header, first and last line are as we write them."""
    try:
        first_and_last_open(fd, size)
    except MalformedFile:
        return False
    return True
