"""A thread with an asyncio event loop of its own, for a library that needs one loop for its whole life.

Blocking callers pass it coroutines. Why not the caller's loop: Dagster and notebooks have loops of their own, and plain
threads have none (docs/dagster_facts.md, 7).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs ``set_up`` and then an event loop in a thread called ``name``. Call `stop` on every path.

    Raises whatever ``set_up`` raises, in the calling thread; then nothing is left running.
    """

    def __init__(self, name: str, set_up: Callable[[], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._failures: list[Exception] = []
        self._is_ready = threading.Event()
        self._set_up = set_up
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._is_ready.wait()
        if self._failures:
            self._thread.join()
            raise self._failures[0]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._set_up()
            self._is_ready.set()
            self._loop.run_forever()
        except Exception as error:  # noqa: BLE001 - raised again in the thread that started this one
            self._failures.append(error)
        finally:
            self._is_ready.set()
            self._loop.close()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``work`` on the loop and wait for it from this thread; cancelled if the wait ends otherwise (Ctrl-C).

        Raises:
            TimeoutError: not done within ``timeout_s``. ConnectionError: the loop was stopped meanwhile.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # closed
            work.close()
            raise ConnectionError("the connection was closed") from None
        try:
            return future.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise ConnectionError("the connection was closed") from None
        except BaseException:
            future.cancel()
            raise

    def cancel_all(self) -> None:
        """Cancel everything that `call` runs at the moment; each caller gets a ConnectionError."""

        async def cancel() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        with suppress(OSError, RuntimeError):
            self.call(cancel(), 1.0)

    def stop(self, farewell: Callable[[], Coroutine[Any, Any, None]], timeout_s: float = 5.0) -> None:
        """Run ``farewell``, cancel what is left, end the thread. Raises nothing: failures are logged."""

        async def shut() -> None:
            try:
                await farewell()
            finally:
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for task in others:
                    task.cancel()
                if others:
                    await asyncio.wait(others, timeout=1)

        try:
            self.call(shut(), timeout_s)
        except (OSError, RuntimeError) as error:
            logging.getLogger(__name__).warning("closing the connection to the gateway: %r", error)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)
