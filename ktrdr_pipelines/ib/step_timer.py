"""Shows what a call does when it takes long, for a call that blocks its only thread: no driver looks at it meanwhile."""

from __future__ import annotations

import threading

from ktrdr_pipelines.domain.calls import QUIET_S, OnWait, Waiting


class StepTimer:
    """``on_wait`` is called, in a thread of its own, for a step that goes on after `QUIET_S`. `close` on every path."""

    def __init__(self, on_wait: OnWait) -> None:
        self._on_wait = on_wait
        self._timer: threading.Timer | None = None

    def begin(self, what: str, seconds: float) -> None:
        """The next step begins, and the one before it is over."""
        self.close()
        waiting = Waiting.for_seconds(what, seconds)
        self._timer = threading.Timer(QUIET_S, self._on_wait, (waiting,))
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """The last step is over."""
        if self._timer is not None:
            self._timer.cancel()
