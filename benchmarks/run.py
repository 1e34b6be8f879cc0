"""`make bench`: run every benchmark in a process of its own, print and keep what it measures, and write `docs/benchmarks.md`.

    python benchmarks/run.py [NAME...]

A benchmark is a script whose name begins with ``bench_`` and that prints rows and points (`rows.py`), or anything else, which
is kept as it is. The newest result of each is in ``.bench/``, so that ``make bench BENCH=jobs`` renews one section of the
document. Ends with 1 if a script failed.
"""

from __future__ import annotations

import ast
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from document import Result, write_document
from machine import commit_of, describe_machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / ".bench"


class LoadAverage:
    """The machine's load average during a block, by a sample every five seconds."""

    def __enter__(self) -> LoadAverage:
        self._samples = [os.getloadavg()[0]]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(5):
            self._samples.append(os.getloadavg()[0])

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"{statistics.mean(self._samples):.1f} (at most {max(self._samples):.1f})"


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def title_of(script: Path) -> str:
    """The first line of the script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def run(name: str) -> Result:
    """Run one script and print its lines as they come."""
    script = HERE / f"bench_{name}.py"
    print(f"== {script.name}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began, lines = time.monotonic(), []
    with (
        LoadAverage() as load,
        subprocess.Popen(
            [sys.executable, script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    seconds = time.monotonic() - began
    return Result(name, title_of(script), commit_of(ROOT), now, seconds, str(load), child.returncode, lines)


def main(chosen: list[str]) -> int:
    if unknown := set(chosen) - set(names()):
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    RESULTS.mkdir(exist_ok=True)
    failed = False
    machine = describe_machine()
    for name in chosen or names():
        result = run(name)
        failed |= bool(result.exit_code)
        (RESULTS / f"{name}.json").write_text(json.dumps(result.as_dict(), indent=1))
        write_document(kept_results(), machine, ROOT / "docs")
    return int(failed)


def kept_results() -> list[Result]:
    """The newest result of each script that there is."""
    files = [RESULTS / f"{name}.json" for name in names()]
    return [Result.from_dict(json.loads(path.read_text())) for path in files if path.exists()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
