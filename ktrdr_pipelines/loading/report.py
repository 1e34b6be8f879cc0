"""Events of a load while it runs, and the report at its end, with the specification's result fields.

Plain values, no behaviour beyond turning them into JSON. `machine.py` and `driver.py` make them; entry points and Dagster show
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Partition
from ktrdr_pipelines.domain.time import Window, format_instant
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.planning.coverage import Gap
from ktrdr_pipelines.planning.requests import Request


@dataclass(frozen=True)
class Planned:
    """The gaps that this load found, and the requests planned for them."""

    gaps: Sequence[Gap]
    requests: Sequence[Request]


@dataclass(frozen=True)
class Fetched:
    """One planned request is done: its ``rows`` new bars are in the file. ``done`` of ``planned`` requests."""

    request: Request
    rows: int
    done: int
    planned: int


@dataclass(frozen=True)
class Failure:
    """A window that could not be loaded, and the error."""

    window: Window
    error: KtrdrError


@dataclass(frozen=True)
class Completed:
    """Every expected bar of a partition, up to the last complete one, is held or absent at IB."""

    partition: Partition
    rows: int
    first_open: datetime | None
    last_open: datetime | None
    is_unfinished: bool
    """The partition's window has not ended yet."""
    proven_empty: int
    """Expected bars that are absent at IB."""
    unexpected: int
    """Held bars that the calendar does not expect; IB has them."""


@dataclass(frozen=True)
class Ended:
    """The load is over: its report is final."""


Event = Planned | Fetched | Failure | Completed | Ended


@dataclass
class LoadReport:
    """What a load has done so far. The fields from ``status`` to ``ib_requests_made`` are the specification's."""

    series: Series
    window: Window
    status: str = "success"
    """``success``, ``partial`` (some windows failed) or ``failed`` (nothing could be loaded)."""
    fetched_bars: int = 0
    """Bars that were not in the file before."""
    cached_before: bool = False
    merged_file: str = ""
    """The series' CSV; it does not exist before the first bar was loaded."""
    gaps_analyzed: int = 0
    segments_fetched: int = 0
    """Planned requests that succeeded."""
    ib_requests_made: int = 0
    """History requests sent, including retries, probes and head timestamps."""
    requests_planned: int = 0
    retries: int = 0
    pacing_wait_s: float = 0.0
    retry_wait_s: float = 0.0
    """Waits before retries, and during outages of the gateway, its link or a farm."""
    revised_bars: int = 0
    """Held bars for which IB now has other values; the new values are in the file."""
    proven_empty: int = 0
    unexpected_bars: int = 0
    """Bars that IB has where the calendar expects none; kept."""
    empty_sessions: int = 0
    """Whole sessions of the calendar, after the first held bar, whose bars are all absent at IB."""
    missing_bars: int = 0
    """Bars of the window that are expected and still neither held nor absent."""
    failures: list[Failure] = field(default_factory=list)
    completed: dict[str, Completed] = field(default_factory=dict)
    """By partition key, the last event of each."""
    notices: list[str] = field(default_factory=list)
    """For users, although nothing failed: an adopted file, a new sidecar, revised bars."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; times in ISO 8601 UTC."""
        return {
            "status": self.status,
            "fetched_bars": self.fetched_bars,
            "cached_before": self.cached_before,
            "merged_file": self.merged_file,
            "gaps_analyzed": self.gaps_analyzed,
            "segments_fetched": self.segments_fetched,
            "ib_requests_made": self.ib_requests_made,
            "symbol": self.series.instrument.symbol,
            "timeframe": self.series.timeframe.name,
            "start": format_instant(self.window.start),
            "end": format_instant(self.window.end),
            "requests_planned": self.requests_planned,
            "retries": self.retries,
            "pacing_wait_s": round(self.pacing_wait_s, 1),
            "retry_wait_s": round(self.retry_wait_s, 1),
            "revised_bars": self.revised_bars,
            "proven_empty": self.proven_empty,
            "unexpected_bars": self.unexpected_bars,
            "empty_sessions": self.empty_sessions,
            "missing_bars": self.missing_bars,
            "partitions_completed": sorted(self.completed),
            "failures": self.list_failures(),
            "notices": list(self.notices),
        }

    def list_failures(self) -> list[dict[str, str]]:
        """The failed windows as plain values."""
        return [{"window": str(f.window), "kind": f.error.family, "error": str(f.error)} for f in self.failures]
