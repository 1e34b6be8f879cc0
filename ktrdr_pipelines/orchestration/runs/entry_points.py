"""What an entry point (a command, a notebook) lends to a run that it executes in its own process: its connection and listeners.

Dagster rebuilds resources from their configuration for every run, so an open connection or a progress display cannot
travel in them; they travel in a context variable of the thread that executes the run. A run that Dagster starts finds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.loading.report import Event, LoadReport


@dataclass
class EntryPoint:
    """``history``: a connection that the lender closes. ``on_event``, ``on_wait``: called with progress as it happens.
    ``reports``: filled with the report of each series of the run."""

    history: IBHistory | None = None
    on_event: Callable[[Series, Event], None] = lambda _series, _event: None
    on_wait: Callable[[Waiting], None] = lambda _waiting: None
    reports: list[LoadReport] = field(default_factory=list)


_entry_point: ContextVar[EntryPoint | None] = ContextVar("ktrdr_entry_point", default=None)


def current_entry_point() -> EntryPoint | None:
    """The entry point that executes a run in this thread; None for a run that Dagster started."""
    return _entry_point.get()


@contextmanager
def lend(entry_point: EntryPoint) -> Iterator[EntryPoint]:
    """Runs executed in this thread inside the block use ``entry_point``."""
    token = _entry_point.set(entry_point)
    try:
        yield entry_point
    finally:
        _entry_point.reset(token)
