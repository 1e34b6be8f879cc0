"""The process that a ledger entry or a client id belongs to, and whether it still runs.

A pid alone is not enough: pids are reused, and containers have pids of their own. Nothing here sends signals.
psutil would do as well, for one more dependency with binaries; only one number of one file is needed.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Owner:
    """A process. ``host`` distinguishes machines, boots and pid namespaces; ``started`` distinguishes two processes with one pid,
    and is empty where the system does not show it."""

    host: str
    pid: int
    started: str

    def is_alive(self) -> bool | None:
        """True or False for a process of this host; None for one of another host, where it is unknown."""
        if self.host != _host():
            return None
        if self.pid == os.getpid():
            return self.started == _started(self.pid)
        if not _exists(self.pid):
            return False
        return not self.started or _started(self.pid) == self.started


def current_owner() -> Owner:
    """This process."""
    pid = os.getpid()
    return Owner(_host(), pid, _started(pid))


def _host() -> str:
    return _host_of(os.getpid())


@lru_cache(maxsize=1)
def _host_of(_pid: int) -> str:
    """Read once per process: a fork may lead into another namespace, nothing else changes it."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
    return f"{boot}/{namespace}"


def _started(pid: int) -> str:
    """Clock ticks from boot to the start of ``pid``; empty where unknown, as for a zombie."""
    try:
        # The second field is the command in parentheses and may contain anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    is_zombie = fields[0] in "ZX"
    return "" if is_zombie else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
