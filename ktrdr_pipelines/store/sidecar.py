"""The sidecar of a CSV: its model and its JSON.

Pinned instrument, source, start of history, answered windows, absent bars with evidence, rows and checksum of each partition.
Pure: `sidecar_cache.py` reads and writes the file. How claims change is in `sidecar_claims.py`, what is pinned in
`identity.py`. Losing a sidecar costs requests, never bars. See docs/design.md, 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, ValidationError

from ktrdr_pipelines.domain.instruments import Instrument
from ktrdr_pipelines.domain.time import Window, format_instant, require_utc
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.file_state import FileState

VERSION = 1
"""The format that this program writes. A higher number in a file means a newer program: it is left alone."""

Instant = Annotated[datetime, AfterValidator(require_utc), PlainSerializer(format_instant)]
Source = Literal["simulator", "paper", "live"]
VolumeUnit = Literal["shares", "lots", "none", "unknown"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Pinned(_Model):
    """The instrument at the first write of bars; ``con_id`` is 0 until known."""

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
    """Of a future, as IB last reported it: ``20241220``."""

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
        """When a future no longer trades, if its last trade date is known: from the month after that date on, so that the bar
        of that month is expected, and a week later at least, because closed exchanges move the date."""
        try:
            last = datetime.strptime(self.last_trade_date, "%Y%m%d").replace(tzinfo=UTC)
        except ValueError:
            return None
        next_month = (last.replace(day=1) + timedelta(days=32)).replace(day=1)
        return Window(max(next_month, last + timedelta(days=8)), datetime(2100, 1, 1, tzinfo=UTC))


class HistoryStart(_Model):
    """The first bar that IB has, and how that is known (``head timestamp``, or an answer without bars before it)."""

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
    """One request whose answer had no bar: when it was made, for what, and what came back."""

    asked_at: Instant
    duration: str
    end: Instant
    code: int = 0
    text: str = ""


class ProvenEmpty(Span):
    """A range of ``opens`` expected bars, all of them absent at IB."""

    opens: int
    evidence: tuple[Evidence, ...] = ()


class PartitionMark(_Model):
    """Rows of one partition and the CRC-32 of their bytes in the CSV."""

    rows: int
    crc32: str


class FileMark(_Model):
    """Size and time of change of the CSV at our last write: anything else is an edit. Without the inode, so that a copied
    directory still fits."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, state: FileState | None) -> FileMark | None:
        """The mark of a CSV in ``state``; None for no file and for an empty one."""
        return cls(size=state.size, mtime_ns=state.mtime_ns) if state and state.size else None


def _merge_spans(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Disjoint and sorted, however an editor left them."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(start=merged[-1].start, end=max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return tuple(merged)


class Sidecar(_Model):
    """The content of a sidecar; the defaults are those of a missing one."""

    version: Literal[1] = 1
    series: str = ""
    updated_at: Instant | None = None
    instrument: Pinned | None = None
    source: Source | None = None
    history_start: HistoryStart | None = None
    sparse: bool = False
    """IB leaves out bars without trades: only an unusual gap of this series is worth a probe."""
    answered: Annotated[tuple[Span, ...], AfterValidator(_merge_spans)] = ()
    """Disjoint, sorted windows in which IB gave a verified answer, with or without bars."""
    proven_empty: tuple[ProvenEmpty, ...] = ()
    unfinished_from: Instant | None = None
    """The first bar that is still missing after a load of newer bars. Newer ones may be held: tail begins here."""
    unfinished_until: Instant | None = None
    """The end of the last bar that is still missing after a load of older bars. Older ones may be held: backfill ends here."""
    file: FileMark | None = None
    partitions: dict[str, PartitionMark] = {}

    @property
    def answered_windows(self) -> tuple[Window, ...]:
        return tuple(span.window for span in self.answered)

    @property
    def empty_windows(self) -> tuple[Window, ...]:
        """Where expected bars that are not held are absent: the ranges with evidence, all answered windows of a sparse series
        (what a verified answer leaves out needs no range of its own), and the time after the expiry of a future. In no order;
        they may overlap.

        An edited partition loses its answered windows (`settle.py`), so deleted rows are missing again.
        """
        absent = tuple(item.window for item in self.proven_empty)
        if self.sparse:
            absent += self.answered_windows
        after = self.instrument.after_expiry if self.instrument else None
        return absent if after is None else (*absent, after)

    @property
    def rows(self) -> int:
        """Rows of the whole CSV."""
        return sum(mark.rows for mark in self.partitions.values())

    def is_written_for(self, state: FileState | None) -> bool:
        """True if the CSV in ``state`` is the one that this sidecar was last written for."""
        return self.file == FileMark.of(state)


# ---------------------------------------------------------------------------------------------------- JSON


class UnreadableSidecar(Exception):
    """The text is no sidecar. A reader reports that; a write builds a new one."""


def parse_sidecar(text: str, name: str) -> Sidecar:
    """The sidecar in ``text``; ``name`` is its file's, for messages.

    Raises:
        UnreadableSidecar: not JSON, or not a sidecar.
        StoreError: written by a newer version of this program; it is left alone.
    """
    try:
        return Sidecar.model_validate_json(text)  # three times as fast as the steps below, which find what is wrong
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
            f"{name} was written by a newer version of ktrdr (its format is {version}, this program reads {VERSION})",
            advice="Update ktrdr, or move that file away: the bars stay, and absent bars are requested again.",
        )
    try:
        return Sidecar.model_validate(data)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreadableSidecar(f"{where}: {first['msg']}") from failure


def render_sidecar(sidecar: Sidecar) -> bytes:
    """JSON that can be read by eye: sorted keys, one line for each window, range and partition."""
    data = sidecar.model_dump(mode="json", exclude={"partitions"})
    values = {key: _render_value(value) for key, value in data.items()}
    values["partitions"] = _render_marks(sidecar.partitions)
    lines = [f"  {json.dumps(key)}: {values[key]}" for key in sorted(values)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


_ENCODER = json.JSONEncoder(sort_keys=True)


def _render_marks(marks: Mapping[str, PartitionMark]) -> str:
    """By hand: twenty years of minutes have five thousand of them, written with each request."""
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
