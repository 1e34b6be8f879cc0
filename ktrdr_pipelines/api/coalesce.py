"""Questions that cost a connection or seconds of a processor: few at a time, and one answer for all who ask the same at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from ktrdr_pipelines.errors import TransientError

T = TypeVar("T")

RETRY_AFTER_S = 10


class QueueFull(TransientError):
    """So many questions or loads wait that another one is not accepted."""

    family = "busy"


class Turnstile:
    """Runs blocking questions in threads, ``width`` at a time; at most ``waiting`` more wait."""

    def __init__(self, width: int, waiting: int) -> None:
        self._places = asyncio.Semaphore(width)
        self._left = width + waiting
        self._going: dict[object, asyncio.Task[Any]] = {}

    async def run(self, ask: Callable[[], T]) -> T:
        """The answer of ``ask``.

        Raises:
            QueueFull: too many wait already.
        """
        if self._left <= 0:
            raise QueueFull("too many such questions at once", advice=f"Ask again in {RETRY_AFTER_S} s.")
        self._left -= 1
        try:
            async with self._places:
                return await run_in_threadpool(ask)
        finally:
            self._left += 1

    async def share(self, key: object, ask: Callable[[], T]) -> T:
        """As `run`; callers with the same ``key`` share one answer while it is on its way."""
        task = self._going.get(key)
        if task is None:
            task = asyncio.ensure_future(self.run(ask))
            self._going[key] = task
            task.add_done_callback(lambda _: self._going.pop(key, None))
        answer: T = await asyncio.shield(task)
        return answer
