"""The time for the pacing ledger: the wall clock, and the boot clock, which cannot be set.

`Reading.age_of` computes an entry's age from two readings, across clock steps and reboots. Nothing here sleeps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stamp:
    """When something happened, as written into the ledger. ``boot_id`` is empty where a machine has no such clock."""

    wall_s: float
    boot_s: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class Reading(Stamp):
    """Both clocks at one instant. ``wall_s`` is seconds since 1970 UTC, ``boot_s`` seconds since the machine started, sleep
    included, ``boot_id`` names that start."""

    def age_of(self, stamp: Stamp) -> float:
        """Seconds since ``stamp``, at least; negative if it lies in the future of every clock that can be trusted.

        In the same boot the boot clock alone counts: it cannot be set, so it is right when the wall clock was set back an
        hour (which would otherwise stop everything for that hour) or forward two (which would forget everything).
        Of a stamp from another boot only two things are known: the wall clock, which may have been set meanwhile, and that the
        machine has been up for ``boot_s`` since. The smaller, more cautious one counts.
        """
        if self.boot_id and stamp.boot_id == self.boot_id:
            return self.boot_s - stamp.boot_s
        wall_age_s = self.wall_s - stamp.wall_s
        return min(wall_age_s, self.boot_s) if self.boot_id else wall_age_s


class Clock(Protocol):
    """Where time comes from. `SystemClock` is the real one; tests bring their own."""

    def now_s(self) -> float:
        """The wall clock: seconds since 1970 UTC."""

    def read(self) -> Reading:
        """Both clocks."""


@cache
def _boot_id() -> str:
    """Linux' name for this start of the machine, shared by its containers; empty elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class SystemClock:
    """The machine's clocks. Outside Linux there is no boot clock that all processes share: the wall clock alone counts there,
    and setting it forward by hand can make requests too fast for ten minutes."""

    def now_s(self) -> float:
        return time.time()

    def read(self) -> Reading:
        boot_id = _boot_id()
        # CLOCK_BOOTTIME, unlike the monotonic clock, runs on while a laptop sleeps.
        boot_s = time.clock_gettime(time.CLOCK_BOOTTIME) if boot_id else 0.0
        return Reading(time.time(), boot_s, boot_id)
