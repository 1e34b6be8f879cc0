"""What is known about a CSV beside its bars: the sidecar's model, its JSON, and how knowledge is added or withdrawn.

Pinned instrument, source, start of history, answered windows, proven-empty ranges, and per partition rows and checksum.
Pure: `store.py` reads and writes the file. Losing a sidecar costs requests, never bars; so whatever is in doubt is
withdrawn. See docs/design.md, 4.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, ValidationError

from ktrdr_pipelines.domain.instruments import Instrument, Series
from ktrdr_pipelines.domain.partitions import partition_from_key
from ktrdr_pipelines.domain.time import Window, format_instant, require_utc
from ktrdr_pipelines.domain.timeframes import Timeframe
from ktrdr_pipelines.errors import InputError, StoreError

VERSION = 1
"""The format this program writes. A higher number in a file means a newer program: hands off."""

_KEPT_EVIDENCE = 5

Instant = Annotated[datetime, AfterValidator(require_utc), PlainSerializer(format_instant)]
Source = Literal["simulator", "paper", "live"]
VolumeUnit = Literal["shares", "lots", "none", "unknown"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Pinned(_Model):
    """The instrument as it was when bars were first written; ``con_id`` is 0 until known."""

    con_id: int = 0
    symbol: str
    ib_symbol: str
    sec_type: str
    exchange: str
    primary_exchange: str = ""
    currency: str
    expiry: str = ""
    what_to_show: str
    hours: str
    volume_unit: VolumeUnit = "unknown"
    last_trade_date: str = ""
    """Of a future, as IB said last: ``20241220``."""

    @classmethod
    def of(cls, instrument: Instrument, volume_unit: VolumeUnit = "unknown") -> Pinned:
        return cls(
            con_id=instrument.con_id,
            symbol=instrument.symbol,
            ib_symbol=instrument.ib_symbol,
            sec_type=instrument.sec_type,
            exchange=instrument.exchange,
            primary_exchange=instrument.primary_exchange,
            currency=instrument.currency,
            expiry=instrument.expiry,
            what_to_show=instrument.what_to_show,
            hours=str(instrument.hours),
            volume_unit=volume_unit if instrument.has_volume else "none",
            last_trade_date=instrument.last_trade_date,
        )

    @property
    def after_expiry(self) -> Window | None:
        """When a future trades no more, if IB said when: from the month after its last trade date on, so that the bar of that
        month is expected, and a week at least, because closed exchanges move the date."""
        try:
            last = datetime.strptime(self.last_trade_date, "%Y%m%d").replace(tzinfo=UTC)
        except ValueError:
            return None
        next_month = (last.replace(day=1) + timedelta(days=32)).replace(day=1)
        return Window(max(next_month, last + timedelta(days=8)), datetime(2100, 1, 1, tzinfo=UTC))


class HistoryStart(_Model):
    """The first bar IB has, and how that is known ("head timestamp", "proven by an empty year before")."""

    open: Instant
    known_by: str


class Span(_Model):
    """A half-open window as it stands in JSON."""

    start: Instant
    end: Instant

    @property
    def window(self) -> Window:
        return Window(self.start, self.end)


class Evidence(_Model):
    """One request by which IB showed that there is nothing: when it was asked, for what, and what came back."""

    asked_at: Instant
    duration: str
    end: Instant
    code: int = 0
    text: str = ""


class ProvenEmpty(Span):
    """A range with ``opens`` expected opens, all of them proven to have no bar."""

    opens: int
    evidence: tuple[Evidence, ...] = ()


class PartitionMark(_Model):
    """Rows of one partition and the CRC-32 of their bytes in the CSV."""

    rows: int
    crc32: str


class FileMark(_Model):
    """Size and time of change of the CSV as last written by us: anything else means that somebody edited it."""

    size: int
    mtime_ns: int


class Sidecar(_Model):
    """Everything the sidecar holds; the defaults are those of a missing one."""

    version: Literal[1] = 1
    series: str = ""
    updated_at: Instant | None = None
    instrument: Pinned | None = None
    source: Source | None = None
    history_start: HistoryStart | None = None
    sparse: bool = False
    """IB leaves out bars without trades: only unusual holes of this series are worth a second request."""
    answered: tuple[Span, ...] = ()
    """Disjoint, sorted windows in which IB gave a verified answer, with or without bars."""
    proven_empty: tuple[ProvenEmpty, ...] = ()
    unfinished_from: Instant | None = None
    """The first bar that a load which continued the file owes. Newer bars may be held: tail begins here."""
    unfinished_until: Instant | None = None
    """The end of the last bar that a load of older bars owes. Older bars may be held: backfill ends here."""
    file: FileMark | None = None
    partitions: dict[str, PartitionMark] = {}

    @property
    def answered_windows(self) -> tuple[Window, ...]:
        return tuple(span.window for span in self.answered)

    @property
    def empty_windows(self) -> tuple[Window, ...]:
        """Where bars that are not held are known not to exist: the proven ranges, and of a sparse series all that IB answered
        (what a verified answer lacks is known without a range of its own), and what lies after the expiry of a future. In no
        order; they may overlap.

        An edited partition loses its answered windows (`store/settle.py`), so deleted rows are still missed.
        """
        proven = tuple(item.window for item in self.proven_empty)
        if self.sparse:
            proven += self.answered_windows
        after = self.instrument.after_expiry if self.instrument else None
        return proven if after is None else (*proven, after)

    @property
    def rows(self) -> int:
        """Rows of the whole CSV."""
        return sum(mark.rows for mark in self.partitions.values())


# ---------------------------------------------------------------------------------------------------- JSON


class UnreadableSidecar(Exception):
    """The text is no sidecar. The store decides whether that is an error or the moment to build it anew."""


def parse_sidecar(text: str, name: str) -> Sidecar:
    """The sidecar in ``text``; ``name`` is its file's, for messages.

    Raises:
        UnreadableSidecar: not JSON, or not a sidecar.
        StoreError: written by a newer version of this program; it is left alone.
    """
    try:
        return Sidecar.model_validate_json(text)  # three times as fast as the way below, which says what is wrong
    except ValidationError:
        pass
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise UnreadableSidecar(f"it is not JSON ({failure})") from failure
    if not isinstance(data, dict):
        raise UnreadableSidecar("it is not a JSON object")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{name} was written by a newer version of ktrdr (its format is {version}, this program knows {VERSION})",
            advice="Update ktrdr, or move that file away: its bars stay, what was known about gaps is asked again.",
        )
    try:
        return Sidecar.model_validate(data)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreadableSidecar(f"{where}: {first['msg']}") from failure


def render_sidecar(sidecar: Sidecar) -> bytes:
    """JSON for people: sorted keys, one line for each window, range and partition."""
    data = sidecar.model_dump(mode="json", exclude={"partitions"})
    values = {key: _render_value(value) for key, value in data.items()}
    values["partitions"] = _render_marks(sidecar.partitions)
    lines = [f"  {json.dumps(key)}: {values[key]}" for key in sorted(values)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


TAIL_BYTES = 1024
"""In the last of a sidecar's bytes stands what is unfinished: keys are sorted, and what grows comes before."""

_UNFINISHED_FROM = re.compile(rb'^  "unfinished_from": (?:null|"([^"]+)"),$', re.MULTILINE)


def peek_unfinished_from(tail: bytes) -> datetime | None:
    """`Sidecar.unfinished_from` by the last `TAIL_BYTES` of a sidecar, without reading megabytes of windows.

    Raises:
        ValueError: it does not stand there, as in a file that somebody wrote otherwise: parse the whole.
    """
    found = _UNFINISHED_FROM.search(tail)
    if found is None:
        raise ValueError("no unfinished_from at the end of the sidecar")
    return datetime.fromisoformat(found[1].decode()) if found[1] else None


_ENCODER = json.JSONEncoder(sort_keys=True)


def _render_marks(marks: Mapping[str, PartitionMark]) -> str:
    """By hand: twenty years of minutes have five thousand of them, written twice a request."""
    lines = [
        f'    {json.dumps(key)}: {{"crc32": {json.dumps(mark.crc32)}, "rows": {mark.rows}}}'
        for key, mark in sorted(marks.items())
    ]
    return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"


def _render_value(value: Any) -> str:
    if isinstance(value, dict) and value:
        inner = [f'    "{key}": {_ENCODER.encode(value[key])}' for key in sorted(value)]
        return "{\n" + ",\n".join(inner) + "\n  }"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {_ENCODER.encode(item)}" for item in value) + "\n  ]"
    return json.dumps(value)


# ---------------------------------------------------------------------------------------------------- identity


def pin(sidecar: Sidecar, series: Series, source: Source, volume_unit: VolumeUnit | None) -> Sidecar:
    """``sidecar`` with ``series`` and ``source`` pinned: the first write decides, later ones fill in what was unknown.

    Raises:
        StoreError: another conId, kind, currency, expiry, hours or what-to-show than the file holds, or a simulator's bars
            beside real ones. The message says what the file holds and what was offered.
    """
    offered = Pinned.of(series.instrument, volume_unit or "unknown")
    held = sidecar.instrument
    if held is not None:
        differing = [
            f"{label} {getattr(held, name)} (offered: {getattr(offered, name)})"
            for name, label in _IDENTITY.items()
            if getattr(held, name) != getattr(offered, name)
            and not (name in ("con_id", "expiry") and not (getattr(held, name) and getattr(offered, name)))
        ]
        if differing:
            raise StoreError(
                f"the file holds {', '.join(differing)}",
                doing=f"writing bars of {series}",
                advice=f"A file never mixes these: move {series.name}.csv and {series.name}.meta.json away, or give the "
                "other one its own symbol in the universe file.",
            )
        unit = offered.volume_unit if offered.volume_unit != "unknown" else held.volume_unit
        offered = held.model_copy(
            update={
                "con_id": held.con_id or offered.con_id,
                "expiry": held.expiry or offered.expiry,
                "volume_unit": unit,
                "last_trade_date": offered.last_trade_date or held.last_trade_date,
            }
        )
    if sidecar.source is not None and (sidecar.source == "simulator") != (source == "simulator"):
        kinds = {"simulator": "simulated bars"}
        raise StoreError(
            f"the file holds {kinds.get(sidecar.source, 'real bars')} (source: {sidecar.source}), and "
            f"{kinds.get(source, 'real bars')} were offered (source: {source})",
            doing=f"writing bars of {series}",
            advice="Simulated and real bars never share a file: set KTRDR_DATA_DIR to another directory for one of them.",
        )
    return sidecar.model_copy(update={"series": str(series), "instrument": offered, "source": sidecar.source or source})


_IDENTITY = {
    "symbol": "symbol",
    "con_id": "conId",
    "sec_type": "kind",
    "currency": "currency",
    "expiry": "expiry",
    "what_to_show": "what to show",
    "hours": "hours",
}


# ---------------------------------------------------------------------------------------------------- knowledge


def add_answered(spans: Sequence[Span], window: Window, until: datetime) -> tuple[Span, ...]:
    """``spans`` with ``window``, cut at ``until`` and to whole seconds inwards, merged into disjoint sorted windows."""
    start = datetime.fromtimestamp(math.ceil(window.start.timestamp()), UTC)
    end = datetime.fromtimestamp(math.floor(min(window.end, until).timestamp()), UTC)
    if start >= end:
        return tuple(spans)
    merged: list[Span] = []
    for span in sorted([*spans, Span(start=start, end=end)], key=lambda s: (s.start, s.end)):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(start=merged[-1].start, end=max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return tuple(merged)


def subtract_windows(spans: Sequence[Span], windows: Iterable[Window]) -> tuple[Span, ...]:
    """``spans`` without any instant of ``windows``."""
    cuts = sorted(windows)
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
            kept.append(Span(start=start, end=span.end))
    return tuple(kept)


def add_proven_empty(ranges: Sequence[ProvenEmpty], new: Iterable[ProvenEmpty]) -> tuple[ProvenEmpty, ...]:
    """``ranges`` with ``new`` ones, sorted by start: a range that a new one covers is replaced, its evidence kept with the new; a
    new one that an old one covers adds nothing. ``ranges`` are sorted and none covers another, as this function leaves them."""
    kept = list(ranges)
    starts = [r.start for r in kept]
    for fresh in new:
        # Ranges that cover no other are sorted by end as well, so those in question stand side by side.
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
    """``ranges`` without those in which bars have turned up (``opens_s`` sorted)."""
    kept = []
    position = 0
    for item in sorted(ranges, key=lambda r: r.start):
        while position < len(opens_s) and opens_s[position] < item.window.start_s:
            position += 1
        if position == len(opens_s) or opens_s[position] >= item.window.end_s:
            kept.append(item)
    return tuple(kept)


def partition_windows(timeframe: Timeframe, keys: Iterable[str]) -> tuple[Window, ...]:
    """The windows of the partitions called ``keys``; a key that somebody typed has none."""
    windows = []
    for key in keys:
        try:
            windows.append(partition_from_key(timeframe, key).window)
        except InputError:
            continue
    return tuple(windows)


def withdraw_partitions(
    sidecar: Sidecar, timeframe: Timeframe, found: Mapping[str, PartitionMark]
) -> tuple[Sidecar, tuple[str, ...]]:
    """``sidecar`` corrected to the partitions ``found`` in the CSV, and the keys of those that had been changed.

    Where a recorded partition is gone or has other bytes, rows may have been lost: its answered windows are withdrawn, so
    that its missing opens are asked for again. Partitions that were not recorded take nothing away.
    """
    changed = tuple(key for key, mark in sorted(sidecar.partitions.items()) if found.get(key) != mark)
    answered = subtract_windows(sidecar.answered, partition_windows(timeframe, changed))
    return sidecar.model_copy(update={"answered": answered, "partitions": dict(found)}), changed
