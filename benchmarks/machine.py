"""The machine that measures, for the document: hardware and versions; no names, no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = ("dagster", "pandas", "numpy", "pandera", "ib_insync", "pydantic", "SQLAlchemy")


def describe_machine() -> list[tuple[str, str]]:
    """Names and values, measured now."""
    pieces = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return [
        ("processor", f"{_read_first('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores"),
        ("memory", _memory()),
        ("disk", _disk()),
        ("system", f"{platform.system()} {platform.release().split('-')[0]}"),
        ("Python", platform.python_version()),
        ("packages", ", ".join(pieces)),
    ]


def commit_of(root: Path) -> str:
    """The commit of the working tree, with "and changes" when files differ from it; empty without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        code = ["git", "status", "--porcelain", "--", "ktrdr_pipelines", "benchmarks"]
        changed = subprocess.run(code, cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() + (" and changes" if changed.stdout.strip() else "")


def _read_first(path: str, key: str) -> str:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _memory() -> str:
    total = _read_first("/proc/meminfo", "MemTotal").split()
    return f"{int(total[0]) / 1024**2:.0f} GiB" if total else "unknown"


def _disk() -> str:
    """What the folder of temporary files offers: the file system, a write of 4 kB and fsync, and 64 MB in one go."""
    with tempfile.NamedTemporaryFile() as file:
        small = []
        for _ in range(20):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            small.append(time.perf_counter() - began)
        began = time.perf_counter()
        file.write(b"x" * 64_000_000)
        file.flush()
        os.fsync(file.fileno())
        large = time.perf_counter() - began
    kind = _file_system(Path(tempfile.gettempdir()))
    return f"{kind}4 kB and fsync {1e3 * statistics.median(small):.1f} ms, {64 / large:,.0f} MB/s"


def _file_system(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    over = [(len(point), kind) for point, kind in found if folder.resolve().is_relative_to(point)]
    return f"{max(over)[1]}, " if over else ""
