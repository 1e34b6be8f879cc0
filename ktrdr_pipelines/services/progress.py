"""Progress of a load for a user at a terminal: requests done of planned, bars, waiting until when. On stderr.

rich draws; without a terminal (a pipe, CI) lines are printed instead of a progress bar.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.loading.report import Event, Failure, Fetched, Planned

LONG_WAIT_S = 30


class Progress:
    """Shows events as they happen; silent when not ``enabled``. Use as a context manager."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._bars = 0
        self._seen_s = time.monotonic()
        """When something was last shown, or happened."""

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"),
                       TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self._bar = RichProgress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show_event(self, series: Series, event: Event) -> None:
        """One event of a load."""
        self._seen_s = time.monotonic()
        if isinstance(event, Planned):
            self._bars = 0
            if self._bar is not None:
                self._task = self._bar.add_task(str(series), total=len(event.requests), note="")
            elif event.requests:
                self._print(f"{series}: {len(event.requests)} request{'s' * (len(event.requests) != 1)} planned")
        elif isinstance(event, Fetched):
            self._bars += event.rows
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=event.done, note=f"{self._bars:,} bars")
            elif event.done == event.planned or event.done % 10 == 0:
                self._print(f"{series}: {event.done} of {event.planned} requests, {self._bars:,} bars")
        elif isinstance(event, Failure) and self._bar is not None:
            self._print(f"{series}: {event.window} failed: {event.error.observed}")

    def show_wait(self, waiting: Waiting) -> None:
        """Why nothing seems to happen for a while."""
        until = f" until {waiting.until:%H:%M:%S} UTC" if waiting.until else ""
        text = f"waiting{until} ({waiting.reason})"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, note=text)
        elif self._enabled:
            self._print(text)
        elif waiting.seconds + time.monotonic() - self._seen_s >= LONG_WAIT_S:
            self._seen_s = time.monotonic()
            show_notice(text)  # even when quiet: minutes of silence look like a hang

    def _print(self, text: str) -> None:
        if self._enabled:
            self._console.print(text, markup=False, soft_wrap=True)


def show_notice(text: str) -> None:
    """A notice on stderr, dimmed."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)
