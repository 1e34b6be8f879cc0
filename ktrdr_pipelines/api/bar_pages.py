"""Held series as the REST API shows them: the list, and bars by window, in bounded pages, as JSON, CSV or Arrow.

Read through `store.peek`: a question changes no file. Memory follows the page, not the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice

import pandas as pd
from fastapi.responses import Response

from ktrdr_pipelines.api import models
from ktrdr_pipelines.bars.schema import COLUMNS, empty_bars, opens_of
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.services.gaps import count_missing, describe_missing
from ktrdr_pipelines.services.membership import look_at
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.csv_format import render_file, render_stamps
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.snapshot import peek
from ktrdr_pipelines.store.store import Store, utc_now
from ktrdr_pipelines.universe.file import universe_of

MOST_BARS = 50_000
ARROW = "application/vnd.apache.arrow.stream"


class Format(StrEnum):
    """How bars are written."""

    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"


@dataclass(frozen=True)
class Page:
    """The oldest bars of a window, and where the next page begins (None: nothing is left)."""

    bars: pd.DataFrame
    next_start: datetime | None
    notices: tuple[str, ...] = ()
    """What is wrong with the file and will be put right by the next load (rows that are no bars are not in ``bars``), and how
    many bars of the page's part of the window are expected and neither held nor confirmed absent."""


def read_page(settings: Settings, series: Series, start: datetime | None, end: datetime | None, limit: int) -> Page:
    """At most ``limit`` bars from ``start`` (included) to ``end`` (not included).

    Raises:
        DataError: the rows break the rules. StoreError: the disk refuses.
    """
    now = utc_now()
    with peek(open_store(settings.data_dir), series, now=now) as (store, pending):
        notices = tuple(pending.describe())
        extent = store.extent(series)
        if extent is None:
            notice = f"nothing is held of {series}; POST /api/v1/data/load loads it"
            if start is not None:
                notice = _describe_missing(series, store, Window(start, max(start, end or now)), now)
            return Page(empty_bars(), None, (*notices, notice) if notice else notices)
        held = Window.from_epoch(extent.first_open_s, extent.last_open_s + 1)
        window = Window(max(held.start, start or held.start), max(held.start, start or held.start, end or held.end))
        common = held.intersect(window)
        page = _collect(store, series, common, limit) if common else Page(empty_bars(), None)
        begin = start or held.start
        until = page.next_start or (end or held.end)
        notice = _describe_missing(series, store, Window(begin, max(begin, until)), now)
        return replace(page, notices=(*notices, notice) if notice else notices)


def _describe_missing(series: Series, store: Store, window: Window, now: datetime) -> str:
    """Missing bars are not "no data": the warning of `ktrdr_pipelines.read_bars`, as a notice."""
    try:
        missing = count_missing(series, store, window, now)
    except InputError as error:  # no calendar, or before calendars begin: the bars are shown without it
        return f"what is missing is not known: {error.message}"
    return f"{describe_missing(series, window, missing)}; the route /gaps has which and why" if missing else ""


def _collect(store: Store, series: Series, window: Window, limit: int) -> Page:
    """Partition by partition, several at once where they are thin, until one bar more than the page is read."""
    partitions = partitions_in(series.timeframe, window)
    found: list[pd.DataFrame] = []
    count, width = 0, 1
    while count <= limit and (some := list(islice(partitions, width))):
        span = Window(max(window.start, some[0].window.start), min(window.end, some[-1].window.end))
        rows = store.read_bars(series, span)
        count += len(rows)
        found.append(rows)
        width = width * 2 if len(rows) * 4 < limit else width
    bars = pd.concat(found, ignore_index=True) if found else empty_bars()
    if len(bars) <= limit:
        return Page(bars, None)
    next_open_s = int(opens_of(bars.iloc[limit : limit + 1])[0])
    return Page(bars.iloc[:limit], datetime.fromtimestamp(next_open_s, UTC))


def render_page(series: Series, page: Page, format: Format) -> Response:
    """``page`` as it goes out.

    Raises:
        InputError: Arrow is wished, and its library is not installed.
    """
    next_start = format_instant(page.next_start) if page.next_start else None
    headers = {"X-Next-Start": next_start} if next_start else {}
    if page.notices:
        headers["X-Notice"] = _as_header("; ".join(page.notices))
    if format is Format.CSV:
        return Response(b"".join(render_file(page.bars)), media_type="text/csv", headers=headers)
    if format is Format.ARROW:
        return Response(_to_arrow(page.bars), media_type=ARROW, headers=headers)
    stamps = render_stamps(opens_of(page.bars))
    columns = [page.bars[name].tolist() for name in COLUMNS[1:]]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(stamps, *columns, strict=True)]
    body = {
        "symbol": series.instrument.symbol,
        "timeframe": series.timeframe.name,
        "count": len(rows),
        "next_start": next_start,
        "notices": list(page.notices),
        "bars": rows,
    }
    return Response(json.dumps(body), media_type="application/json", headers=headers)


def _as_header(text: str) -> str:
    """``text`` as a header takes it: a damaged row may hold any byte."""
    plain = "".join(c if c.isprintable() else " " for c in text[:1000])
    return plain.encode("ascii", "backslashreplace").decode()[:1000]


def _to_arrow(bars: pd.DataFrame) -> bytes:
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError("Arrow is not installed here", advice="Install the extra `api`, or ask for csv.") from None
    table = pa.Table.from_pandas(bars, preserve_index=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def list_held(settings: Settings, limit: int, offset: int) -> models.HeldList:
    """A page of the universe's series, with what is held of each."""
    universe = list(universe_of(settings))
    store, now = open_store(settings.data_dir), utc_now()
    chosen = universe[offset : offset + limit]
    more = offset + limit if offset + limit < len(universe) else None
    return models.HeldList(
        series=[
            models.Held.model_validate({**look_at(each, store, now).as_dict(), "file": str(store.csv_path(each))})
            for each in chosen
        ],
        total=len(universe),
        next_offset=more,
    )
