"""Scripted faults of the whole gateway: a restart, a hang, a lost link, a broken history farm, a wrong clock.

A rule of `faults.py` starts one with the request that it matches, or with a client that connects. This module defines what each
is and what happens to requests that arrive while it lasts. Sockets and timers are in `server.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ktrdr_pipelines.simulator.refusals import Refusal

DELAYED, LOST, EMPTY = "delayed", "lost", "empty"
MEANWHILE = (DELAYED, LOST, EMPTY)
"""What happens to history requests during an outage: answered at its end, never, or at once with a false "no data"."""

_LINK_LOST = Refusal(1100, "Connectivity between IBKR and Trader Workstation has been lost.")
_FARM_BROKEN = Refusal(2105, "HMDS data farm connection is broken:ushmds")
_BACK = {
    1101: "Connectivity between IBKR and Trader Workstation has been restored - data lost.",
    1102: "Connectivity between IBKR and Trader Workstation has been restored - data maintained. All data farms are "
    "connected: usfarm; ushmds; secdefil.",
    2106: "HMDS data farm connection is OK:ushmds",
    2107: "HMDS data farm connection is inactive but should be available upon demand.ushmds",
}


@dataclass(frozen=True)
class Disturbance:
    """One disturbance, starting ``delay_s`` after its trigger and lasting ``seconds``.

    ``begin`` and ``end`` are the notices to every client; ``meanwhile`` is one of `MEANWHILE`, or empty where requests are not
    affected (clock) or cannot arrive (restart, hang).
    """

    kind: str
    seconds: float
    delay_s: float = 0.0
    begin: Refusal | None = None
    end: Refusal | None = None
    meanwhile: str = ""

    @property
    def is_outage(self) -> bool:
        """True if the gateway keeps running but does not answer history requests as usual."""
        return bool(self.meanwhile)


def make_disturbance(kind: str, *, seconds: float, delay_s: float, back: int, meanwhile: str) -> Disturbance:
    """A disturbance of one of `DISTURBANCES`; ``back`` is the code that ends an outage (0: 1102 or 2106).

    ``restart``: the port is closed and every connection dropped; the gateway listens again after ``seconds``. ``hang``: it
    stays connected and reads nothing. ``link_down``: 1100, then 1101 or 1102. ``farm_down``: 2105, then 2106 or 2107.
    ``stale_clock``: its time is ``seconds`` behind from then on, with no end.
    """
    if kind in ("link_down", "farm_down"):
        is_link = kind == "link_down"
        code = back or (1102 if is_link else 2106)
        end = Refusal(code, _BACK.get(code, ""))
        return Disturbance(kind, seconds, delay_s, _LINK_LOST if is_link else _FARM_BROKEN, end, meanwhile or DELAYED)
    return Disturbance(kind, seconds, delay_s)


DISTURBANCES = ("restart", "hang", "link_down", "farm_down", "stale_clock")
