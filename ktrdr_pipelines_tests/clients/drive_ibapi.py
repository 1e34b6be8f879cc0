"""Drives IBKR's own ibapi against a gateway and prints what it saw as JSON.

Runs as a script in that library's own environment: imports nothing of the project. The task comes on standard input, see
`test_clients.py`, which judges the result.
"""

import json
import queue
import sys
import threading
import time

from ibapi.client import EClient
from ibapi.contract import Contract
from ibapi.wrapper import EWrapper


class App(EWrapper, EClient):
    """Puts every answer into one queue."""

    def __init__(self):
        EClient.__init__(self, self)
        self.events = queue.Queue()
        self.notices = []

    def error(self, reqId, errorCode, errorString):  # noqa: N803 - ibapi calls it so
        if reqId == -1:
            self.notices.append([reqId, errorCode, errorString])
        self.events.put(("error", reqId, {"code": errorCode, "text": errorString}))

    def nextValidId(self, orderId):  # noqa: N802, N803
        self.events.put(("ready", 0, orderId))

    def managedAccounts(self, accountsList):  # noqa: N802, N803
        self.events.put(("accounts", 0, accountsList))

    def currentTime(self, time):  # noqa: N802
        self.events.put(("time", 0, time))

    def contractDetails(self, reqId, contractDetails):  # noqa: N802, N803
        self.events.put(("details", reqId, contractDetails))

    def contractDetailsEnd(self, reqId):  # noqa: N802, N803
        self.events.put(("end", reqId, None))

    def symbolSamples(self, reqId, contractDescriptions):  # noqa: N802, N803
        self.events.put(("symbols", reqId, [d.contract.symbol for d in contractDescriptions]))

    def headTimestamp(self, reqId, headTimestamp):  # noqa: N802, N803
        self.events.put(("head", reqId, headTimestamp))

    def historicalData(self, reqId, bar):  # noqa: N802, N803
        row = [bar.date, bar.open, bar.high, bar.low, bar.close, bar.volume, bar.average, bar.barCount]
        self.events.put(("bar", reqId, row))

    def historicalDataEnd(self, reqId, start, end):  # noqa: N802, N803
        self.events.put(("end", reqId, None))

    def collect(self, req_id, *last, timeout_s=10):
        """Values of events of one request up to one of the kinds ``last`` or an error, which is returned alone."""
        values = []
        deadline = time.monotonic() + timeout_s
        while True:
            kind, of, value = self.events.get(timeout=max(0.01, deadline - time.monotonic()))
            if of != req_id:
                continue
            if kind == "error" and not 2100 <= value["code"] < 2200:
                return value
            if kind in last:
                return values + ([value] if kind != "end" else [])
            if kind != "error":
                values.append(value)


def as_contract(fields):
    contract = Contract()
    for name, value in fields.items():
        setattr(contract, name, value)
    return contract


def connect(port, client_id):
    app = App()
    app.connect("127.0.0.1", port, client_id)
    threading.Thread(target=app.run, daemon=True).start()
    return app


def ask_history(app, req_id, case):
    app.reqHistoricalData(
        req_id, as_contract(case["contract"]), case["end"], case["duration"], case["size"], case["what"],
        int(case["rth"]), case["format"], False, [],
    )  # fmt: skip
    return app.collect(req_id, "end")


def drive(task):
    out = {}
    started = time.monotonic()
    app = connect(task["port"], 7)
    out["accounts"] = app.collect(0, "accounts")
    app.collect(0, "ready")
    out["connect_s"] = time.monotonic() - started
    out["server_version"] = app.serverVersion()
    app.reqCurrentTime()
    out["time"] = app.collect(0, "time")[-1]
    app.reqContractDetails(1, as_contract(task["stock"]))
    details = app.collect(1, "end")
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
    app.reqContractDetails(2, as_contract(task["ambiguous"]))
    out["ambiguous"] = sorted(d.contract.conId for d in app.collect(2, "end"))
    app.reqContractDetails(3, as_contract(task["unknown"]))
    out["unknown"] = app.collect(3, "end")
    app.reqMatchingSymbols(4, "GOOG")
    out["symbols"] = app.collect(4, "symbols")[-1]
    app.reqHeadTimeStamp(5, as_contract(task["stock"]), "TRADES", 1, 2)
    out["head"] = int(app.collect(5, "head")[-1])
    app.cancelHeadTimeStamp(5)
    out["history"] = [ask_history(app, 100 + i, case) for i, case in enumerate(task["history"])]

    app.reqHistoricalData(6, as_contract(task["silent"]), "", "1 D", "1 hour", "TRADES", 1, 2, False, [])
    app.cancelHistoricalData(6)
    out["cancelled"] = app.collect(6, "end")

    out["farms"] = sorted(code for _, code, _ in app.notices)
    second = connect(task["port"], 7)
    out["busy"] = [second.collect(-1, "never")]
    while out["busy"][0]["code"] != 326:
        out["busy"] = [second.collect(-1, "never")]
    out["busy"] = [[-1, out["busy"][0]["code"], out["busy"][0]["text"]]]

    judged = connect(task["judged_port"], 1)
    judged.collect(0, "ready")
    out["first_of_two"] = len(ask_history(judged, 1, task["history"][0]))
    out["pacing"] = ask_history(judged, 2, task["history"][0])
    judged.disconnect()
    app.disconnect()
    return out


if __name__ == "__main__":
    print(json.dumps(drive(json.load(sys.stdin))))
