"""What a script with the client library alone does: the rival of the loads in `bench_jobs.py`, in a process of its own.

``walk``: the loop of the library's documentation, from the end of the window back to its start, each request ending at the
first bar of the last answer. ``at_once``: given requests, all sent together. Both keep what came in one CSV, in order.
Prints how many requests it made and how many bars lie in the window. No pacing, no checks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import ib_insync


def as_instant(moment: date | datetime) -> datetime:
    if isinstance(moment, datetime):
        return moment.astimezone(UTC)
    return datetime(moment.year, moment.month, moment.day, tzinfo=UTC)


async def ask(ib: ib_insync.IB, contract: Any, options: argparse.Namespace, end: Any, duration: str) -> Any:
    return await ib.reqHistoricalDataAsync(
        contract, end, duration, options.bar_size, options.what, useRTH=options.what == "TRADES", formatDate=2,
        timeout=0,
    )  # fmt: skip


async def walk(ib: ib_insync.IB, contract: Any, options: argparse.Namespace) -> list[Any]:
    answers: list[Any] = []
    end: Any = options.end
    while bars := await ask(ib, contract, options, end, options.duration):
        answers.append(bars)
        end = bars[0].date
        if as_instant(end) <= options.start:
            break
    return answers[::-1]


async def at_once(ib: ib_insync.IB, contract: Any, options: argparse.Namespace) -> list[Any]:
    return await asyncio.gather(*(ask(ib, contract, options, end, duration) for end, duration in options.requests))


async def load(options: argparse.Namespace) -> None:
    ib = ib_insync.IB()
    await ib.connectAsync("127.0.0.1", options.port, clientId=77)
    is_pair = options.what == "MIDPOINT"
    contracts = [
        ib_insync.Forex(symbol) if is_pair else ib_insync.Stock(symbol, "SMART", "USD")
        for symbol in options.symbol.split(",")
    ]
    await ib.qualifyContractsAsync(*contracts)
    way = at_once if options.requests else walk
    loaded = await asyncio.gather(*(way(ib, contract, options) for contract in contracts))
    ib.disconnect()
    counted = 0
    for contract, answers in zip(contracts, loaded, strict=True):
        bars = {bar.date: bar for answer in answers for bar in answer}
        wanted = [bars[at] for at in sorted(bars) if options.start <= as_instant(at) < options.end]
        ib_insync.util.df(wanted).to_csv(options.folder / f"{contract.symbol}.csv", index=False)
        counted += len(wanted)
    print(json.dumps({"requests": sum(map(len, loaded)), "bars": counted}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("symbol", "bar-size", "duration"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--what", default="TRADES")
    parser.add_argument("--start", type=datetime.fromisoformat, required=True)
    parser.add_argument("--end", type=datetime.fromisoformat, required=True)
    parser.add_argument("--requests", type=json.loads, default=[], help="JSON list of [end, duration]; none: walk")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.start, options.end = options.start.replace(tzinfo=UTC), options.end.replace(tzinfo=UTC)
    logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
    asyncio.get_event_loop_policy().get_event_loop().run_until_complete(load(options))


if __name__ == "__main__":
    sys.exit(main())
