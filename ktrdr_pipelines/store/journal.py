"""The journal of a sidecar: what changed since the sidecar was written as a whole, one line for each write.

A sidecar grows with its series (one line for each partition), so writing it anew with each answer would cost more than the bars.
The journal is `AAPL_1m.meta.journal`, beside the sidecar; `sidecar_cache.py` reads both and decides when to merge them. Pure.

Each line is the CRC-32 of what follows (eight hexadecimal digits), a space, and JSON. The first line names the sidecar that the
journal belongs to; beside any other one it means nothing. Reading stops at the first line that is cut off or damaged: what
follows is lost, which costs requests, never bars.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ktrdr_pipelines.store.sidecar import PartitionMark, ProvenEmpty, Sidecar, Span

_MAPPED = "partitions"
_LISTED: Mapping[str, type[Span]] = {"answered": Span, "proven_empty": ProvenEmpty}
"""Fields that grow with the series. Of lists the journal has the items removed and added, of partitions the changed ones, of
other fields the new value."""


@dataclass(frozen=True, slots=True)
class Journaled:
    """What a journal adds to its sidecar."""

    sidecar: Sidecar
    size: int
    """Where its valid lines end, in bytes. The next line belongs there."""


def name_base(content: bytes) -> bytes:
    """The first line of the journal of a sidecar with this ``content``."""
    return _render_line({"sidecar": {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}})


def render_change(before: Sidecar, after: Sidecar) -> bytes:
    """The line that makes ``after`` of ``before``."""
    change: dict[str, Any] = {}
    scalars = set(Sidecar.model_fields) - {_MAPPED, *_LISTED}
    changed = {name for name in scalars if getattr(before, name) != getattr(after, name)}
    change |= after.model_dump(mode="json", include=changed)
    for name in _LISTED:
        removed, added = _compare(getattr(before, name), getattr(after, name))
        if removed or added:
            change[name] = {"removed": [_dump(item) for item in removed], "added": [_dump(item) for item in added]}
    marks = {
        key: _dump(mark) for key, mark in after.partitions.items() if not _is_same(before.partitions.get(key), mark)
    }
    gone: dict[str, Any] = dict.fromkeys(before.partitions.keys() - after.partitions.keys())
    if marks or gone:
        change[_MAPPED] = marks | gone
    return _render_line(change)


def apply_journal(sidecar: Sidecar, base: bytes, journal: bytes) -> Journaled:
    """``sidecar``, whose file has the content ``base``, with the changes of ``journal``."""
    lines = _read_lines(journal)
    first = name_base(base)
    if not journal.startswith(first):
        return Journaled(sidecar, 0)
    next(lines)
    size = len(first)
    fields: dict[str, Any] = {}
    lists = {name: dict.fromkeys(getattr(sidecar, name)) for name in _LISTED}
    partitions = dict(sidecar.partitions)
    for change, length in lines:
        try:
            for name, kind in _LISTED.items():
                _change_list(lists[name], kind, change.pop(name, {}))
            _change_marks(partitions, change.pop(_MAPPED, {}))
        except (ValidationError, KeyError, TypeError, AttributeError):
            break
        fields |= change
        size += length
    update: dict[str, Any] = {name: tuple(sorted(items, key=lambda item: item.start)) for name, items in lists.items()}
    known = Sidecar.model_validate(sidecar.model_dump(mode="json", exclude={_MAPPED, *_LISTED}) | fields)
    return Journaled(known.model_copy(update=update | {_MAPPED: partitions}), size)


def _render_line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read_lines(journal: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The valid lines and their lengths."""
    for line in journal.splitlines(keepends=True):
        crc, _, text = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            return
        yield json.loads(text), len(line)


def _compare(before: Sequence[Span], after: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """The items removed and added. Most items of both are the same objects, which is all that has to be looked at."""
    old, new = {id(item) for item in before}, {id(item) for item in after}
    removed = {item: None for item in before if id(item) not in new}
    added = {item: None for item in after if id(item) not in old}
    return [item for item in removed if item not in added], [item for item in added if item not in removed]


def _is_same(before: PartitionMark | None, after: PartitionMark) -> bool:
    return before is after or before == after  # most are the same object, and pydantic compares field by field


def _dump(item: Span | PartitionMark) -> dict[str, Any]:
    return item.model_dump(mode="json")


def _change_list(items: dict[Any, None], kind: type[Span], change: Mapping[str, Iterable[Any]]) -> None:
    for removed in change.get("removed", ()):
        items.pop(kind.model_validate(removed), None)
    for added in change.get("added", ()):
        items[kind.model_validate(added)] = None


def _change_marks(partitions: dict[str, PartitionMark], change: Mapping[str, Any]) -> None:
    for key, mark in change.items():
        if mark is None:
            partitions.pop(key, None)
        else:
            partitions[key] = PartitionMark.model_validate(mark)
