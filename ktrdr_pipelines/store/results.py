"""Results of the store: the extent of a file, and what a write did. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.sidecar import FileMark, Sidecar

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Extent:
    """First and last bar open of a CSV, epoch seconds UTC; both are held."""

    first_open_s: int
    last_open_s: int

    @property
    def first(self) -> datetime:
        """The first open as an instant."""
        return datetime.fromtimestamp(self.first_open_s, UTC)

    @property
    def last(self) -> datetime:
        """The last open as an instant."""
        return datetime.fromtimestamp(self.last_open_s, UTC)


@dataclass(frozen=True, slots=True)
class Written:
    """What one write did. Counts are rows."""

    rows_added: int
    rows_revised: int
    path: Path
    revised_from: pd.DataFrame
    """Held bars that were replaced by other values, as they were; ``revised_to`` as they are now."""
    revised_to: pd.DataFrame
    prepared: Prepared
    found: FileMark | None
    """The CSV as the write found it."""
    sidecar: Sidecar
    """The sidecar after the write."""
