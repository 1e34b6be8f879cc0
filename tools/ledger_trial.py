"""10,000 requests of eight processes on one ledger, sixty of them killed and sixty stopped, judged by the simulator's judge.

    python tools/ledger_trial.py [GRANTS] [INCIDENTS] [SEED]

The trial of `ktrdr_pipelines_tests/ib/pacing/ledger_trial.py` at full size: 28 hours of pacing in minutes. What matters is
not the time it takes but the counts. Ends with 1 if a pacing rule was broken, budget was left lying, or the waiting order
was not kept.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ktrdr_pipelines_tests.ib.pacing.ledger_trial import Trial


def main(grants: int = 10_000, incidents: int = 60, seed: int = 1) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Trial(Path(folder), grants=grants, incidents=incidents, seed=seed).run()
    units = sum(weight for _, weight in result.sent)
    print(f"{len(result.sent)} requests, {units} units, in {time.monotonic() - began:.0f} s")
    print(f"{result.killed} processes killed, {result.stopped} stopped, {result.stalls} of them inside a transaction")
    print(f"{len(result.violations)} violations, {result.expired} grants expired unsent")
    print(f"units in each ten minutes: {dict(sorted(Counter(result.windows).items(), reverse=True))}")
    print(f"overtaken by later wishes: {dict(sorted(Counter(result.overtaken).items()))}")
    for at_s, rule in result.violations:
        print(f"  violation at {at_s - result.sent[0][0]:.3f} s: {rule}")
    return int(bool(result.violations) or not result.is_budget_used or not result.is_fair)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
