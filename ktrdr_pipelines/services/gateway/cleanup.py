"""Disconnects this program's processes from the gateway, and ends the Dagster runs of dead processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from ktrdr_pipelines.ib.client_ids import LeasedId, in_use
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
from ktrdr_pipelines.services.gateway.question import quick_address
from ktrdr_pipelines.settings import Settings

CLEANUP_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Cleanup:
    """The result of ``ib cleanup``."""

    disconnected: tuple[LeasedId, ...]
    """Client ids that other processes gave back after they were interrupted, as by Ctrl-C."""
    still_in_use: tuple[LeasedId, ...]
    """Client ids of processes that did not end in time, belong to another user, or run on another machine."""
    runs_ended: tuple[str, ...] = field(default=())
    """Ids of Dagster runs of dead processes, now failed, their pool slots freed."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "disconnected": [leased.as_dict() for leased in self.disconnected],
            "still_in_use": [leased.as_dict() for leased in self.still_in_use],
            "runs_ended": list(self.runs_ended),
        }


def cleanup(settings: Settings) -> Cleanup:
    """Interrupt every other process of this program that is connected to the gateway, as by Ctrl-C: it keeps what it loaded and
    gives its client id back. Then end the runs of dead processes. Other programs stay connected.
    """
    leases_dir = quick_address(settings).leases_dir
    before = in_use(leases_dir)
    others = [leased for leased in before if leased.pid != os.getpid()]  # this process disconnects by itself
    for pid in {leased.pid for leased in others if leased.is_here}:
        try:
            os.kill(pid, signal.SIGINT)
        except (ProcessLookupError, PermissionError):
            continue
    deadline = time.monotonic() + CLEANUP_PATIENCE_S
    after = in_use(leases_dir)
    while time.monotonic() < deadline and any(leased in others and leased.is_here for leased in after):
        time.sleep(0.1)
        after = in_use(leases_dir)
    with open_instance(settings) as instance:
        ended = reap_dead_runs(instance)
    return Cleanup(
        disconnected=tuple(leased for leased in others if leased not in after),
        still_in_use=tuple(leased for leased in before if leased in after),
        runs_ended=tuple(ended),
    )
