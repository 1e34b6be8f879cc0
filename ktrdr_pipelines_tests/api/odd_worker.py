"""A worker of the REST API that misbehaves: it tells each end twice, says nonsense of loads of NONSENSE, half of DIES, and half
of STUMBLES the first time.

Started by `test_worker.py` instead of `ktrdr_pipelines.api.worker`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

STUMBLED = Path(os.environ["DAGSTER_HOME"]) / "stumbled"


def tell(**values: object) -> None:
    """One line."""
    print(json.dumps(values), flush=True)


for line in sys.stdin:
    command = json.loads(line)
    run_id = command["run_id"]
    if command["symbol"] == "NONSENSE":
        tell(event="fetched", run_id=run_id, done=1)
    elif command["symbol"] == "STUMBLES" and not STUMBLED.exists():
        STUMBLED.touch()
        break
    elif command["symbol"] == "DIES":
        tell(event="planned", run_id=run_id, requests=2)
        break
    else:
        tell(
            event="done",
            run_id=run_id,
            result={"status": "success", "of": command["symbol"]},
            run_ids=[run_id],
            problem=None,
        )
        tell(event="refused", run_id=run_id, kind="transient", message="interrupted", advice="", code=None)
