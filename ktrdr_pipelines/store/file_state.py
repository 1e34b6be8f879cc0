"""The state of a file: what shows that it was written or edited. A value."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileState:
    """One version of a file: a write or an edit changes at least one of these."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)
