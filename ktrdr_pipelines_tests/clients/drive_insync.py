"""Drives ib_insync or ib_async (first argument) against a gateway and prints what it saw as JSON.

Runs as a script in that library's own environment: imports nothing of the project. The task comes on standard input, see
`test_clients.py`, which judges the result. The two libraries have one interface.
"""

import asyncio
import datetime as dt
import importlib
import json
import sys
import time

lib = importlib.import_module(sys.argv[1])


def as_contract(fields):
    return lib.Contract(**fields)


def as_stamp(value):
    """Epoch seconds of an aware time, text of a naive one, YYYYMMDD of a date."""
    if isinstance(value, dt.datetime):
        return int(value.timestamp()) if value.tzinfo else value.strftime("naive %Y%m%d %H:%M:%S")
    return value.strftime("%Y%m%d")


def as_rows(bars):
    return [[as_stamp(b.date), b.open, b.high, b.low, b.close, b.volume, b.average, b.barCount] for b in bars]


async def attempt(awaitable, timeout_s=10):
    """The result, or {"code", "text"} of the error that the gateway answered."""
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except lib.wrapper.RequestError as error:
        return {"code": error.code, "text": error.message}


async def ask_history(ib, case):
    bars = await attempt(
        ib.reqHistoricalDataAsync(
            as_contract(case["contract"]), case["end"], case["duration"], case["size"], case["what"], case["rth"],
            formatDate=case["format"], timeout=0,
        )
    )  # fmt: skip
    return bars if isinstance(bars, dict) else as_rows(bars)


async def drive(task):
    ib = lib.IB()
    ib.RaiseRequestErrors = True
    notices = []
    ib.errorEvent += lambda req_id, code, text, contract: notices.append([req_id, code, text])
    out = {}
    started = time.monotonic()
    await ib.connectAsync("127.0.0.1", task["port"], clientId=7)
    out["connect_s"] = time.monotonic() - started
    out["server_version"] = ib.client.serverVersion()
    out["accounts"] = ib.managedAccounts()
    out["time"] = as_stamp(await ib.reqCurrentTimeAsync())
    details = await attempt(ib.reqContractDetailsAsync(as_contract(task["stock"])))
    out["details"] = [
        [
            d.contract.conId,
            d.contract.symbol,
            d.contract.primaryExchange,
            d.longName,
            d.timeZoneId,
            d.minTick,
            d.stockType,
        ]
        for d in details
    ]
    out["liquid_hours"] = details[0].liquidHours
    out["ambiguous"] = sorted(
        d.contract.conId for d in await ib.reqContractDetailsAsync(as_contract(task["ambiguous"]))
    )
    out["unknown"] = await attempt(ib.reqContractDetailsAsync(as_contract(task["unknown"])))
    out["symbols"] = [d.contract.symbol for d in await ib.reqMatchingSymbolsAsync("GOOG")]
    head = await attempt(ib.reqHeadTimeStampAsync(as_contract(task["stock"]), "TRADES", True, 2))
    out["head"] = as_stamp(head)
    out["history"] = [await ask_history(ib, case) for case in task["history"]]
    schedule = await attempt(ib.reqHistoricalScheduleAsync(as_contract(task["stock"]), 3))
    out["schedule"] = [[s.startDateTime, s.endDateTime, s.refDate] for s in schedule.sessions]

    last_id = ib.client.getReqId()
    silent = asyncio.ensure_future(
        ib.reqHistoricalDataAsync(as_contract(task["silent"]), "", "1 D", "1 hour", "TRADES", True, timeout=0)
    )
    await asyncio.sleep(0)  # lets the request go out first
    ib.client.cancelHistoricalData(last_id + 1)
    out["cancelled"] = await attempt(silent)

    out["farms"] = sorted(code for req_id, code, _ in notices if req_id == -1)
    second = lib.IB()
    refused = []
    second.errorEvent += lambda req_id, code, text, contract: refused.append([req_id, code, text])
    try:
        await second.connectAsync("127.0.0.1", task["port"], clientId=7, timeout=1)
        out["busy"] = "connected"
    except (TimeoutError, ConnectionError):
        out["busy"] = refused

    judged = lib.IB()
    judged.RaiseRequestErrors = True
    await judged.connectAsync("127.0.0.1", task["judged_port"], clientId=1, readonly=True)
    out["first_of_two"] = len(await ask_history(judged, task["history"][0]))
    out["pacing"] = await ask_history(judged, task["history"][0])
    judged.disconnect()
    ib.disconnect()
    return out


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(json.load(sys.stdin)))))
