"""What a door (a command, the API) lends to a run that it executes in its own process: its connection and its ears.

Dagster rebuilds resources from their configuration for every run, so an open connection or a progress display cannot
travel in them; they travel in a context variable of the thread that executes the run. Runs that nobody watches find the
default: no connection, nobody listening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.ib.history import IBHistory, Waiting
from ktrdr_pipelines.loading.report import Event, LoadReport


@dataclass
class Door:
    """``history``: a connection that the lender closes. ``on_event``, ``on_wait``: told of progress as it happens.
    ``reports``: filled with the report of each series of the run."""

    history: IBHistory | None = None
    on_event: Callable[[Series, Event], None] = lambda _series, _event: None
    on_wait: Callable[[Waiting], None] = lambda _waiting: None
    reports: list[LoadReport] = field(default_factory=list)


_door: ContextVar[Door | None] = ContextVar("ktrdr_door", default=None)


def current_door() -> Door:
    """The door of the run that executes in this thread."""
    return _door.get() or Door()


@contextmanager
def lend(door: Door) -> Iterator[Door]:
    """Runs executed in this thread inside the block use ``door``."""
    token = _door.set(door)
    try:
        yield door
    finally:
        _door.reset(token)
