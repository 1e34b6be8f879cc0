"""`make soak`: 130 requests in real time, through the program's own path to IB, judged by the simulated gateway; then classes.

Several processes load bars through `IBHistory`, sockets and one ledger, on the machine's clock, with nothing injected: the
trial of the pacing rules that no fast clock can replace. 60 requests fit into ten minutes, so the default takes about 20.
The gateway counts what reaches it by its own rules (`simulator/judge.py`). Ends with 1 if a rule was broken, an answer was
missing, or budget was left lying.

With `--classes MINUTES` another trial runs instead, on the ledger file alone: a process with six threads loads a backfill without
end, another one asks for the tails of twenty series every five minutes, a third for one tail at odd moments. Ends with 1 if a
tail waited for a minute from the third time on, a rule was broken, or the backfill left more than a tenth of its share unused.

    python tools/soak.py [--requests 130] [--loaders 3]
    python tools/soak.py --classes 40
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SYMBOLS = ("AAPL", "MSFT", "SPY", "GOOG", "AMZN", "NVDA", "IBM")
PAIR = "EURUSD"
TEN_MINUTES_S, BUDGET = 600.0, 60


def load(port: int, state: Path, numbers: range) -> None:
    """One process: ask for one day of bars per number, and print what it cost as one line of JSON."""
    from ktrdr_pipelines.domain.calls import Waiting
    from ktrdr_pipelines.domain.instruments import Instrument, Series, stock
    from ktrdr_pipelines.domain.time import Window
    from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration
    from ktrdr_pipelines.ib.endpoint import GatewayAddress
    from ktrdr_pipelines.ib.history import IBHistory
    from ktrdr_pipelines.planning.requests import Request

    def show(waiting: Waiting) -> None:
        print(f"  loader {numbers.start}: {waiting.reason}, {waiting.seconds:.0f} s", file=sys.stderr, flush=True)

    address = GatewayAddress(
        "127.0.0.1",
        port,
        connect_timeout_s=15,
        request_timeout_s=120,
        retry_waits_s=(15, 30, 60),
        library="ib_insync",
        state_dir=state,
    )
    bars = 0
    with IBHistory(address, on_wait=show) as history:
        for number in numbers:
            # Every tenth counts twice.
            what = Instrument(PAIR, "CASH", "IDEALPRO", "USD", ib_symbol="EUR", what_to_show="BID_ASK")
            instrument = what if number % 10 == 9 else stock(SYMBOLS[number % len(SYMBOLS)])
            end = datetime(2024, 3, 5, 22, tzinfo=UTC) + timedelta(weeks=number // len(SYMBOLS))
            request = Request(Window(end - timedelta(days=1), end), end, Duration(1, "D"))
            bars += len(history.fetch(Series(history.pin(instrument), TIMEFRAMES["1h"]), request))
        print(json.dumps({"sent": history.costs.requests, "bars": bars, "retries": history.costs.retries}))


def most_units(sent: list[tuple[float, int]], span_s: float) -> int:
    """The most units that any closed stretch of ``span_s`` contains."""
    return max(sum(units for at, units in sent if begin <= at <= begin + span_s) for begin, _ in sent)


def soak(requests: int, loaders: int) -> int:
    from ktrdr_pipelines.simulator.server import run_in_thread
    from ktrdr_pipelines.simulator.synthetic import SyntheticMarket

    arrived: list[tuple[float, int]] = []

    def note(record: Any) -> None:
        arrived.append((time.monotonic(), 2 if record.what == "BID_ASK" else 1))

    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        run_in_thread(SyntheticMarket(), judge=True, pace_clock=time.monotonic, on_record=note) as gateway,
    ):
        command = [
            sys.executable,
            __file__,
            "--requests",
            requests,
            "--loaders",
            loaders,
            "--port",
            gateway.port,
            "--state",
            folder,
        ]
        children = [
            subprocess.Popen([str(part) for part in (*command, "--load", number)], stdout=subprocess.PIPE, text=True)
            for number in range(loaders)
        ]
        try:
            reports = [json.loads(child.communicate()[0] or "{}") for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        violations = list(gateway.violations)
    took_s = time.monotonic() - began
    grants = sum(report.get("sent", 0) for report in reports)
    units = sum(weight for _, weight in arrived)
    first_s = arrived[0][0] if arrived else 0.0
    # The ledger keeps ten minutes and half a second, for what is on its way: the cuts lie in that half second.
    windows = [
        sum(weight for at, weight in arrived if number <= (at - first_s) / (TEN_MINUTES_S + 0.25) < number + 1)
        for number in range(-(-units // BUDGET))
    ]
    print(
        f"{grants} requests granted and sent, {len(arrived)} reached the gateway ({units} units) in {took_s / 60:.1f} min"
    )
    print(f"{len(violations)} violations judged, {sum(report.get('retries', 0) for report in reports)} retries")
    print(
        f"budget: {windows} units in each ten minutes, at most {most_units(arrived, TEN_MINUTES_S)} of {BUDGET} in any ten"
    )
    for at, rule in violations:
        print(f"  violation at {at - first_s:.3f} s: {rule}")
    wasted = [units for units in windows[:-1] if units < BUDGET - 1]  # one may be left beside a request that weighs two
    is_complete = grants == len(arrived) == requests and all(report.get("bars") for report in reports)
    return int(bool(violations) or bool(wasted) or not is_complete)


def send_class(name: str, state: Path, tails: int) -> None:
    """One process of the trial of classes: acquire and stamp without end, printing each request as one line of JSON."""
    from concurrent.futures import ThreadPoolExecutor

    from ktrdr_pipelines.domain.work_class import WorkClass
    from ktrdr_pipelines.ib.pacing.ledger import open_ledger
    from ktrdr_pipelines.ib.pacing.rules import Ask

    work = WorkClass.BACKFILL if name == "backfill" else WorkClass.TAIL
    ledger = open_ledger(state, "soak")
    waiting: set[str] = set()

    def send(contract: str, number: float) -> None:
        wanted_s = time.time()
        ask = Ask(f"{contract} {number}", contract)
        with ledger.acquire(ask, work=work) as grant:
            waiting.discard(contract)
            with grant.sending():
                line = {"at": time.time(), "wanted": wanted_s, "work": name, "contract": contract, "what": ask.identity}
                sys.stdout.write(json.dumps(line) + "\n")  # one write: threads share the pipe
                sys.stdout.flush()
            time.sleep(0.5)

    def send_without_end(thread: int) -> None:
        number = 0
        while True:
            number += 1
            send(f"backfill {thread} {number % 5}", number)

    with ThreadPoolExecutor(50) as threads:
        if name == "backfill":
            list(threads.map(send_without_end, range(6)))
        time.sleep(45 if name == "tail" else 130)
        while True:
            for number in range(tails if name == "tail" else 1):
                contract = f"{name} {number}"
                if contract not in waiting:  # as the sensor: a series in an unfinished run is left out
                    waiting.add(contract)
                    threads.submit(send, contract, time.time())
            time.sleep(300 if name == "tail" else 430)


def soak_classes(minutes: float, tails: int) -> int:
    from ktrdr_pipelines.simulator.judge import PacingJudge

    judge, sent = PacingJudge(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--state", folder, "--tails", str(tails), "--work"]
        # Not both: a single series beside twenty would make 62 units due in ten minutes, where a burst delayed the first tails.
        names = ("backfill", "tail") if tails else ("backfill", "single")
        children = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in names]
        time.sleep(minutes * 60)
        for child in children:
            child.kill()
            for line in child.communicate()[0].splitlines():
                sent.append(json.loads(line))
    sent.sort(key=lambda each: each["at"])
    first_s = sent[0]["at"]
    for each in sent:
        judge.judge(each["at"], each["contract"], each["what"])
    waits = {
        name: [
            each["at"] - each["wanted"] for each in sent if each["work"] == name and each["wanted"] >= first_s + since_s
        ]
        for name, since_s in (("tail", 630), ("single", 0 if not tails else 630))
    }
    for name, each_s in waits.items():
        print(f"{name}: {len(each_s)} requests, longest wait {max(each_s, default=0):.1f} s")
    backfill = [each["at"] for each in sent if each["work"] == "backfill"]
    higher = len(sent) - len(backfill)
    print(
        f"backfill: {len(backfill)} requests, tails {higher}, in {minutes:.0f} min; {len(judge.violations)} violations"
    )
    share = (minutes / 10 * BUDGET - higher) * 0.9 - BUDGET
    is_late = any(wait_s >= 60 for each_s in waits.values() for wait_s in each_s)
    return int(bool(judge.violations) or is_late or len(backfill) < share)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=130)
    parser.add_argument("--loaders", type=int, default=3, help="processes that share the ledger")
    parser.add_argument("--classes", type=float, metavar="MINUTES", help="the trial of the classes of work, this long")
    parser.add_argument("--tails", type=int, default=20, help="series whose tails are asked for every five minutes")
    parser.add_argument("--work", choices=("backfill", "tail", "single"), help=argparse.SUPPRESS)
    for hidden, kind in (("--load", int), ("--port", int), ("--state", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        send_class(options.work, options.state, options.tails)
        return 0
    if options.classes:
        return soak_classes(options.classes, options.tails)
    if options.load is not None:
        load(options.port, options.state, range(options.load, options.requests, options.loaders))
        return 0
    return soak(options.requests, options.loaders)


if __name__ == "__main__":
    sys.exit(main())
