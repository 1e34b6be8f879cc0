"""How the claims of a sidecar grow and shrink: answered windows, absent bars, partitions.

Pure. Whatever is in doubt is withdrawn: that costs requests, never bars.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime

from ktrdr_pipelines.domain.partitions import partition_from_key
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.store.sidecar import PartitionMark, ProvenEmpty, Sidecar, Span

_KEPT_EVIDENCE = 5


def add_answered(spans: Sequence[Span], window: Window, until: datetime) -> tuple[Span, ...]:
    """``spans``, which are disjoint and sorted, with ``window``, cut at ``until`` and inwards to whole seconds; again so."""
    start = datetime.fromtimestamp(math.ceil(window.start.timestamp()), UTC)
    end = datetime.fromtimestamp(math.floor(min(window.end, until).timestamp()), UTC)
    if start >= end:
        return tuple(spans)
    first = bisect_left(spans, start, key=lambda span: span.end)
    after = bisect_right(spans, end, lo=first, key=lambda span: span.start)
    touched = spans[first:after]
    if touched:
        start, end = min(start, touched[0].start), max(end, touched[-1].end)
    return (*spans[:first], Span(start=start, end=end), *spans[after:])


def subtract_windows(spans: Sequence[Span], windows: Iterable[Window]) -> tuple[Span, ...]:
    """``spans`` without any instant of ``windows``."""
    cuts = sorted(windows)
    if not cuts:
        return tuple(spans)
    kept: list[Span] = []
    for span in spans:
        start = span.start
        for cut in cuts:
            if cut.end <= start or cut.start >= span.end:
                continue
            if start < cut.start:
                kept.append(Span(start=start, end=cut.start))
            start = max(start, cut.end)
        if start < span.end:
            kept.append(span if start == span.start else Span(start=start, end=span.end))
    return tuple(kept)


def add_proven_empty(ranges: Sequence[ProvenEmpty], new: Iterable[ProvenEmpty]) -> tuple[ProvenEmpty, ...]:
    """``ranges`` with ``new`` ones, sorted by start.

    A new one replaces the ranges that it covers and keeps their evidence; one that an old range covers adds nothing.
    ``ranges`` are sorted and none covers another, as this function leaves them.
    """
    kept = list(ranges)
    starts = [r.start for r in kept]
    for fresh in new:
        # Ranges that cover no other are sorted by end as well, so those in question are neighbours.
        lo = bisect_left(starts, fresh.start)
        if lo and kept[lo - 1].window.covers(fresh.window):
            continue
        hi = lo
        while hi < len(kept) and fresh.window.covers(kept[hi].window):
            hi += 1
        if hi == lo and lo < len(kept) and kept[lo].window.covers(fresh.window):
            continue
        evidence = list(dict.fromkeys(e for r in (*kept[lo:hi], fresh) for e in r.evidence))[-_KEPT_EVIDENCE:]
        kept[lo:hi] = [fresh.model_copy(update={"evidence": tuple(evidence)})]
        starts[lo:hi] = [fresh.start]
    return tuple(kept)


def drop_disproved(ranges: Sequence[ProvenEmpty], opens_s: Sequence[int]) -> tuple[ProvenEmpty, ...]:
    """``ranges`` without those in which a bar opens (``opens_s``: epoch seconds, sorted)."""
    if not len(opens_s):
        return tuple(ranges)
    first, last = (datetime.fromtimestamp(open_s, UTC) for open_s in (opens_s[0], opens_s[-1]))
    kept = []
    position = 0
    for item in sorted(ranges, key=lambda r: r.start):
        if item.end <= first or item.start > last:
            kept.append(item)
            continue
        while position < len(opens_s) and opens_s[position] < item.window.start_s:
            position += 1
        if position == len(opens_s) or opens_s[position] >= item.window.end_s:
            kept.append(item)
    return tuple(kept)


def partition_windows(timeframe: Timeframe, keys: Iterable[str]) -> tuple[Window, ...]:
    """The windows of the partitions called ``keys``; a key that is none of the timeframe has no window."""
    windows = []
    for key in keys:
        try:
            windows.append(partition_from_key(timeframe, key).window)
        except InputError:
            continue
    return tuple(windows)


def withdraw_partitions(
    sidecar: Sidecar, timeframe: Timeframe, found: Mapping[str, PartitionMark], grown: Collection[str] = ()
) -> tuple[Sidecar, tuple[str, ...]]:
    """``sidecar`` corrected to the partitions ``found`` in the CSV, and the keys of those that had been changed.

    Where a recorded partition is gone or has other bytes, rows may have been lost: its answered windows are withdrawn, so
    that its missing bars are requested again. Partitions that were not recorded withdraw nothing, nor do those that have
    only ``grown``.
    """
    changed = tuple(
        key for key, mark in sorted(sidecar.partitions.items()) if found.get(key) != mark and key not in grown
    )
    answered = subtract_windows(sidecar.answered, partition_windows(timeframe, changed))
    return sidecar.model_copy(update={"answered": answered, "partitions": dict(found)}), changed


def withdraw_all(sidecar: Sidecar) -> Sidecar:
    """``sidecar`` of a CSV that is gone: no claim about bars is left, the pinned instrument is."""
    update: dict[str, object] = {"answered": (), "proven_empty": (), "partitions": {}, "file": None}
    return sidecar.model_copy(update=update | {"history_start": None, "sparse": False})
