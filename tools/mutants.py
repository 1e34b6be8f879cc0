"""`make mutants`: does a test notice when the code of a core package changes? Prints the changes that none noticed.

mutmut makes the mutants (one small change each) and runs, for each, the tests that reach its function; packages, tests and what
is not mutated are in `pyproject.toml`, `[tool.mutmut]`. There are thousands of mutants and most cost a second or more, so a
sample is tried: drawn with a fixed seed, as many as fit into the given minutes by mutmut's own estimate. The same seed draws
the same mutants from the same code. Everything is done in `mutants/`, a copy of the project.

Exit code 0 also with survivors: whether one matters is for the reader to judge.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTMUT = Path(sys.executable).with_name("mutmut")
NO_MUTANT = "no mutant has this name"
BEGINS = "Running mutation testing"
SHARE_OF_ESTIMATE = 0.36
"""Measured over 33 mutants of `planning/`: what a mutant costs of its estimate, the time of all tests that reach it. Noticed ones
cost about a second, the others all of it."""
OVERHEAD_S = 1.0
"""What a mutant costs besides its tests: a fork, the collection."""
RESULT = re.compile(r"^(\S+) (\S+__mutmut_\d+)$", re.MULTILINE)
MEANING = {
    "🎉": "noticed",
    "⏰": "noticed",
    "🙁": "survived",
    "🤔": "suspicious",
    "🫥": "reached by no test",
    "?": "not tried",
}


def mutmut(*arguments: str, seconds: float | None = None) -> str:
    """What mutmut prints, run in the project's folder. After ``seconds`` of testing mutants it is interrupted, and prints what
    it has found until then."""
    # Without PYTHONPATH: mutmut puts the copy first on the path, and nothing else of the project may be there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(MUTMUT), *arguments]
    timer = None
    printed: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            printed.append(line)
            if seconds is not None and line.startswith(BEGINS):
                timer = threading.Timer(seconds, child.send_signal, [signal.SIGINT])
                timer.start()
    if timer is not None:
        timer.cancel()
    return "".join(printed)


def list_mutants() -> tuple[dict[str, float], list[str]]:
    """Seconds of tests by mutant, and the mutants that no test reaches."""
    # `mutmut print-time-estimates` would tell this, but forgets in 3.8.1 which tests reach what and measures the original.
    stats = json.loads((ROOT / "mutants" / "mutmut-stats.json").read_text())
    names = re.findall(r"^\s*(\S+__mutmut_\d+): ", mutmut("results", "--all", "true"), re.MULTILINE)
    tests = {name: stats["tests_by_mangled_function_name"].get(name.rpartition("__mutmut_")[0], ()) for name in names}
    timed = {
        name: sum(stats["duration_by_test"][test] for test in reached) for name, reached in tests.items() if reached
    }
    return timed, [name for name in names if name not in timed]


def draw(timed: dict[str, float], seconds: float, seed: int) -> list[str]:
    """Names drawn at random until their estimates fill ``seconds``."""
    names = sorted(timed)
    random.Random(seed).shuffle(names)
    drawn: list[str] = []
    for name in names:
        seconds -= timed[name] * SHARE_OF_ESTIMATE + OVERHEAD_S
        if seconds < 0:
            break
        drawn.append(name)
    return drawn


def function_of(name: str) -> str:
    """``ktrdr_pipelines.planning.modes.choose`` of a mutant's name."""
    return re.sub(r"__mutmut_\d+$", "", name).replace(".x_", ".").replace(".xǁ", ".").replace("ǁ", ".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="of testing mutants; the preparation takes more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a mutant's name, for example planning.modes")
    options = parser.parse_args()
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    print("Making the mutants, and learning which tests reach them ...", flush=True)
    prepared = mutmut("run", NO_MUTANT)
    timed, unreached = list_mutants()
    timed = {name: seconds for name, seconds in timed.items() if options.only in name}
    unreached = [name for name in unreached if options.only in name]
    if not timed:
        print(prepared[-4000:])
        return 1
    workers = os.cpu_count() or 2
    drawn = draw(timed, options.minutes * 60 * workers, options.seed)
    print(
        f"{len(timed) + len(unreached)} mutants; trying {len(drawn)} of the {len(timed)} that tests reach", flush=True
    )
    found = mutmut("run", "--max-children", str(workers), *drawn, seconds=options.minutes * 60 * 1.5)
    report = found.split("Mutant results")[-1]
    results = {name: MEANING.get(sign, sign) for sign, name in RESULT.findall(report) if name in timed}
    if not results:
        print(found[-4000:])
        return 1
    for name in sorted(name for name, result in results.items() if result != "noticed"):
        print(f"\n{results[name]}: {name}")
        print("\n".join(line for line in mutmut("show", name).splitlines() if line.startswith(("-", "+", "@"))))
    counts = ", ".join(f"{number} {result}" for result, number in Counter(results.values()).items())
    print(f"\n{counts}; {len(unreached)} mutants that no test of these packages reaches:")
    for function, number in sorted(Counter(function_of(name) for name in unreached).items()):
        print(f"  {function}  {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
