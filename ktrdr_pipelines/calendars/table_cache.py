"""Session tables kept on disk between processes, in the user's cache folder.

The New York table takes half a second to compute and 4 ms to read. A kept table counts only for the same calendar, hours,
calendar libraries, time zone data and text of `session_tables.py`: a checksum of them is in the name of its file. A damaged file
is computed again; without a folder that can be written every process computes. The folder may be deleted at any time.
"""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
import zoneinfo
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import platformdirs

from ktrdr_pipelines.calendars import session_tables
from ktrdr_pipelines.calendars.exchanges import ROUND_THE_CLOCK
from ktrdr_pipelines.calendars.session_tables import SessionTable, build_table

log = logging.getLogger(__name__)

_ARRAYS = tuple(field.name for field in fields(SessionTable) if field.name != "sessions_per_week")
_LIBRARIES = ("pandas_market_calendars", "exchange_calendars", "pandas", "numpy")
_ZONE_FILES = ("tzdata.zi", "+VERSION", "zone1970.tab", "zone.tab")
"""Files in a folder of time zone data that change with each release of it."""


def find_table(calendar: str, *, extended: bool, folder: Path | None = None) -> SessionTable:
    """The table of `build_table`, from ``folder`` (default: the user's cache folder) if it is there, else computed and kept."""
    if calendar == ROUND_THE_CLOCK:  # computed faster than read
        return build_table(calendar, extended=extended)
    folder = folder or platformdirs.user_cache_path("ktrdr-pipelines") / "calendars"
    name = "".join(c if c.isalnum() else "_" for c in calendar)
    path = folder / f"{name}_{zlib.crc32(calendar.encode()):08x}_{'all' if extended else 'regular'}_{_sources()}.npz"
    table = _read(path)
    if table is None:
        table = build_table(calendar, extended=extended)
        _keep(path, table)
    return table


@lru_cache(maxsize=1)
def _sources() -> str:
    """A checksum of everything that a table is computed from, besides its calendar."""
    parts = [f"{name} {version(name)}" for name in (*_LIBRARIES, "tzdata")]
    for folder in zoneinfo.TZPATH:
        for name in _ZONE_FILES:
            try:
                found = Path(folder, name).stat()
            except OSError:
                continue
            parts.append(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}")
    code = Path(session_tables.__file__).read_bytes()
    return f"{zlib.crc32(code):08x}{zlib.crc32(repr(parts).encode()):08x}"


def _read(path: Path) -> SessionTable | None:
    """The table in ``path``; None if there is none, or it is damaged. Every array has a checksum in the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in _ARRAYS}
            per_week = int(kept["sessions_per_week"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.info("the kept calendar %s cannot be read and is computed again: %.200s", path.name, error)
        return None
    sessions, segments = len(arrays["dates"]), len(arrays["starts"])
    lengths = {name: sessions if name in ("dates", "opens", "closes") else segments for name in _ARRAYS}
    if any(a.dtype != np.int64 or a.shape != (lengths[name],) for name, a in arrays.items()):
        return None
    return SessionTable(**arrays, sessions_per_week=per_week)


def _keep(path: Path, table: SessionTable) -> None:
    """Write ``table`` in one step, so that another process reads all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **{f.name: getattr(table, f.name) for f in fields(table)})
        temporary.replace(path)
    except OSError as error:
        log.info("the calendar %s is not kept for the next process: %s", path.name, error)
