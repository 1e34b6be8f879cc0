"""A cache of IB's answers about symbols and the start of their history, in one small file.

An answer is valid for the account that got it: behind one address there may be the simulator today and IB tomorrow, and a conId
of one is another company's at the other.

A file that is missing, damaged or cannot be written costs requests, never an answer. Contracts are kept for a day (their trading
hours are those of the next days), "no such contract" for minutes, and not at all during the nightly reset, when valid
contracts are unknown (`codes.in_nightly_reset`). The requests, and when an answer counts as "none": `discovery.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from ktrdr_pipelines.domain.instruments import Instrument
from ktrdr_pipelines.ib.codes import in_nightly_reset
from ktrdr_pipelines.ib.contracts import ContractInfo

log = logging.getLogger(__name__)

FOUND_KEPT = timedelta(days=1)
NONE_KEPT = timedelta(minutes=10)
HEAD_KEPT = timedelta(days=7)
_MOST_ENTRIES = 2000
_LARGEST_FILE = 8 << 20


@dataclass(frozen=True, slots=True)
class Known:
    """One answer. ``instrument`` and ``contract`` are None where IB has none."""

    asked_at: datetime
    until: datetime
    instrument: Instrument | None = None
    contract: ContractInfo | None = None
    similar: tuple[str, ...] = ()
    """Where IB has none: similar symbols that it has, as text."""


@dataclass(frozen=True, slots=True)
class KnownHead:
    """IB's head timestamp; None where it has none."""

    until: datetime
    head: datetime | None = None


_KNOWN, _HEAD = TypeAdapter(Known), TypeAdapter(KnownHead)


@dataclass
class KnownSymbols:
    """The file at ``path``, as valid for ``account``. Read again at each use: other processes write it too."""

    path: Path
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    account: str = ""

    def find(self, key: str) -> Known | None:
        """The answer about ``key``, None when there is none or it has expired."""
        return self._entries("symbols", _KNOWN).get(self._mine(key))

    def list_found(self, sec_type: str = "") -> list[Known]:
        """Every contract found by any account and not expired, by symbol; only of ``sec_type`` if given."""
        found: dict[tuple[Instrument, int], Known] = {}
        for known in self._entries("symbols", _KNOWN).values():
            if known.instrument is not None and sec_type in ("", known.instrument.sec_type):
                found[known.instrument, known.instrument.con_id] = known  # continuous futures have no conId
        return sorted(found.values(), key=lambda k: k.instrument.symbol if k.instrument else "")

    def remember(
        self,
        key: str,
        instrument: Instrument | None,
        contract: ContractInfo | None,
        similar: tuple[str, ...] = (),
    ) -> None:
        """Keep IB's answer about ``key``; "none" only when it can be believed."""
        now = self.now()
        if instrument is None and in_nightly_reset(now):
            return
        known = Known(now, now + (FOUND_KEPT if instrument is not None else NONE_KEPT), instrument, contract, similar)
        self._put("symbols", self._mine(key), _KNOWN.dump_python(known, mode="json"))

    def find_head(self, instrument: Instrument) -> KnownHead | None:
        """The head timestamp of a pinned ``instrument``, None when IB has to be asked."""
        return self._entries("heads", _HEAD).get(self._mine(_head_key(instrument)))

    def remember_head(self, instrument: Instrument, head: datetime) -> None:
        """Keep a head timestamp. That there was none is not kept: there may be one the next time."""
        known = KnownHead(self.now() + HEAD_KEPT, head)
        self._put("heads", self._mine(_head_key(instrument)), _HEAD.dump_python(known, mode="json"))

    def _mine(self, key: str) -> str:
        return f"{self.account}: {key}"

    # -- the file -------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        try:
            if self.path.stat().st_size > _LARGEST_FILE:
                return {}
            raw = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return raw if isinstance(raw, dict) else {}

    def _entries(self, table: str, kind: TypeAdapter[Any]) -> dict[str, Any]:
        raw, now, found = self._read().get(table), self.now(), {}
        for key, value in raw.items() if isinstance(raw, dict) else ():
            try:
                entry = kind.validate_python(value, strict=False)
                is_fresh = now < entry.until and getattr(entry, "asked_at", now) <= now + timedelta(minutes=5)
            except (ValidationError, TypeError, ValueError):
                continue  # one bad entry does not affect the others
            except Exception as error:  # noqa: BLE001 - an instrument that its own checks refuse
                log.debug("%s: %s is left out: %s", self.path, key, error)
                continue
            if is_fresh:
                found[key] = entry
        return found

    def _put(self, table: str, key: str, value: object) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=5):
                tables: dict[str, Any] = {}
                for name, kind in (("symbols", _KNOWN), ("heads", _HEAD)):
                    tables[name] = {k: kind.dump_python(v, mode="json") for k, v in self._entries(name, kind).items()}
                tables[table].pop(key, None)  # the newest stand last
                tables[table][key] = value
                for entries in tables.values():
                    for oldest in list(entries)[:-_MOST_ENTRIES]:
                        del entries[oldest]
                temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
                with temporary.open("w", encoding="utf-8") as file:
                    json.dump(tables, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
        except (OSError, Timeout) as error:
            log.info("cannot write %s, symbols will be looked up again: %s", self.path, error)


def _head_key(instrument: Instrument) -> str:
    hours = "regular" if instrument.use_rth else "all"
    contract = instrument.con_id or f"{instrument.sec_type} {instrument.ib_symbol} {instrument.currency}"
    return f"{contract} {instrument.exchange} {instrument.what_to_show} {hours}"
