"""The simulated gateway proven by clients nobody here wrote: ib_insync, ib_async and IBKR's ibapi, over the socket.

Each library runs in a process of its own, ib_async and ibapi also in an environment of their own (``make clients``, from the
locks beside this file). What they report is compared with the market's own bars.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.market import BAR_SIZES, ContractQuery, find_listings
from ktrdr_pipelines.simulator.request_reach import DurationRule, find_start, parse_duration, parse_end
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket

HERE = Path(__file__).parent
NOW = datetime(2024, 3, 5, 19, 40, 30, tzinfo=UTC)
"""A Tuesday, 14:40:30 in New York: a bar of every size is forming."""

AAPL = {"symbol": "AAPL", "secType": "STK", "exchange": "SMART", "currency": "USD"}
IBM = {"symbol": "IBM", "secType": "STK", "exchange": "SMART", "currency": "USD"}
BRK = {"symbol": "BRK B", "secType": "STK", "exchange": "SMART", "currency": "USD"}
EURUSD = {"symbol": "EUR", "secType": "CASH", "exchange": "IDEALPRO", "currency": "USD"}
USDJPY = {"symbol": "USD", "secType": "CASH", "exchange": "IDEALPRO", "currency": "JPY"}
ES = {"symbol": "ES", "secType": "FUT", "exchange": "CME", "currency": "USD", "lastTradeDateOrContractMonth": "202406"}


def _case(contract, end, duration, size, what="TRADES", rth=True, fmt=2):
    return {
        "contract": contract, "end": end, "duration": duration, "size": size, "what": what, "rth": rth, "format": fmt,
    }  # fmt: skip


CASES = [
    _case(AAPL, "20240301-21:00:00", "5 D", "1 hour"),
    _case(AAPL, "20240301-21:00:00", "5 D", "1 hour", fmt=1),
    _case(AAPL, "", "1 D", "1 min", rth=False),
    _case(AAPL, "", "1800 S", "1 secs"),
    _case(AAPL, "20240304 12:00:00 America/New_York", "7200 S", "5 secs", rth=False),
    _case(AAPL, "20240304-18:00:00", "1 D", "30 secs", "MIDPOINT"),
    _case(AAPL, "20240301-21:00:00", "1 W", "5 mins", "BID"),
    _case(AAPL, "20240301-21:00:00", "1 Y", "1 day"),
    _case(AAPL, "", "2 Y", "1W"),
    _case(AAPL, "", "2 Y", "1 month", fmt=1),
    _case(AAPL, "", "1 M", "1 day", "ADJUSTED_LAST"),
    _case(BRK, "20231124-23:00:00", "1 W", "1 hour"),
    _case(EURUSD, "20240313-12:00:00", "1 W", "1 hour", "MIDPOINT", rth=False),
    _case(EURUSD, "20240301-12:00:00", "1 M", "8 hours", "BID_ASK", rth=False),
    _case(EURUSD, "20240301-12:00:00", "1 M", "1 day", "ASK", rth=False, fmt=1),
    _case(USDJPY, "", "1 D", "15 mins", "MIDPOINT", rth=False, fmt=1),
    _case(ES, "", "2 D", "30 mins", rth=False),
]
REFUSED = [
    (_case(EURUSD, "", "1 D", "1 hour"), 162, "No historical market data for EUR/CASH@IDEALPRO Last 3600"),
    (_case(AAPL, "19800101-00:00:00", "1 D", "1 hour"), 162, "HMDS query returned no data: AAPL@SMART Trades"),
    (_case(AAPL, "", "1 D", "1 secs"), 162, "invalid step: 1"),
    (_case(AAPL, "20240301-21:00:00", "1 M", "1 day", "ADJUSTED_LAST"), 321, "not supported with adjusted last"),
    (_case(AAPL, "", "400 D", "1 day"), 321, "longer than 365 days must be made in years"),
    (_case(AAPL, "", "8 H", "1 hour"), 321, "Error validating request.-'bP' : cause - Invalid duration/step"),
    (_case(AAPL, "", "1 D", "7 mins"), 321, "bar size setting is invalid. Legal ones are: 1 secs, 5 secs"),
    (_case(AAPL, "tomorrow", "1 D", "1 hour"), 10314, "yyyymmdd hh:mm:ss xx/xxxx"),
    (_case({**AAPL, "symbol": "NOPE"}, "", "1 D", "1 hour"), 200, "No security definition has been found"),
    (_case({**AAPL, "symbol": "AMBG"}, "", "1 D", "1 hour"), 200, "ambiguous"),
]
# ib_async takes 321 for a warning and would wait for ever (`docs/dependencies.md`).
NOT_ENDED_BY = {"ib_async": (321,)}

ENVIRONMENTS = Path(__file__).parents[2] / ".venvs"
LIBRARIES = {
    "ib_insync": (sys.executable, "drive_insync.py"),
    "ib_async": (str(ENVIRONMENTS / "ib_async" / "bin" / "python"), "drive_insync.py"),
    "ibapi": (str(ENVIRONMENTS / "ibapi" / "bin" / "python"), "drive_ibapi.py"),
}


def refused_of(library):
    return [row for row in REFUSED if row[1] not in NOT_ENDED_BY.get(library, ())]


@cache
def drive(library):
    """What ``library`` reported, once per test run."""
    python, script = LIBRARIES[library]
    if not Path(python).exists():
        pytest.fail(f"the environment of {library} is missing: run `make clients`")
    market = SyntheticMarket()
    frozen = {"clock": NOW.timestamp, "pace_clock": time.monotonic}
    faults = [FaultRule("silent", symbol="IBM")]
    with (
        run_in_thread(market, judge=None, faults=faults, **frozen) as gateway,
        run_in_thread(market, judge=True, **frozen) as judged,
    ):
        task = {
            "port": gateway.port,
            "judged_port": judged.port,
            "stock": AAPL,
            "ambiguous": {**AAPL, "symbol": "AMBG"},
            "unknown": {**AAPL, "symbol": "NOPE"},
            "silent": IBM,
            "history": [*CASES, *(case for case, _, _ in refused_of(library))],
        }
        done = subprocess.run(
            [python, str(HERE / script), library],
            input=json.dumps(task), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads(done.stdout)
        report["gateway_requests"] = len(gateway.requests)
    return report


def expect_rows(case):
    """The rows that the market holds for a case, stamps as epoch seconds or YYYYMMDD."""
    market, names = SyntheticMarket(), case["contract"]
    (listing,) = find_listings(
        market,
        ContractQuery(
            symbol=names["symbol"],
            sec_type=names["secType"],
            currency=names["currency"],
            expiry=names.get("lastTradeDateOrContractMonth", ""),
        ),
        NOW.timestamp(),
    )
    end_s, _ = parse_end(case["end"], int(NOW.timestamp()), "America/New_York")
    duration, sessions = parse_duration(case["duration"]), market.sessions(listing)
    start_s = find_start(duration, end_s, sessions, regular=case["rth"], rule=DurationRule.SESSIONS)
    bars = market.bars(listing, BAR_SIZES[case["size"]], start_s, end_s, what=case["what"], regular=case["rth"])
    stamps = [datetime.fromtimestamp(s, UTC).strftime("%Y%m%d") if bars.dated else s for s in bars.stamp.tolist()]
    columns = (bars.open, bars.high, bars.low, bars.close, bars.volume, bars.average, bars.count)
    return [list(row) for row in zip(stamps, *(column.tolist() for column in columns), strict=True)]


def normalise(rows):
    """ibapi hands on raw text: epoch seconds, dates, or the gateway's wall clock."""
    return [[_stamp(row[0]), *row[1:]] for row in rows]


def _stamp(value):
    if isinstance(value, int) or len(value) == 8:
        return value
    if value.isdecimal():
        return int(value)
    local = datetime.strptime(value, "%Y%m%d  %H:%M:%S").replace(tzinfo=ZoneInfo("America/New_York"))
    return int(local.timestamp())


pytestmark = [pytest.mark.slow, pytest.mark.parametrize("library", list(LIBRARIES))]


def test_client_connects_with_its_defaults(library):
    """A client that connects with default arguments gets everything it asks for, well before its own time-outs."""
    report = drive(library)
    assert report["connect_s"] < 3
    assert report["accounts"] == ["SIM0000001"]
    assert report["server_version"] == {"ib_insync": 176, "ib_async": 178, "ibapi": 157}[library]
    assert report["farms"] == [2104, 2106, 2158]
    assert report["time"] == int(NOW.timestamp())


def test_client_reads_contract_details(library):
    """Every field of the contract details lands where the client expects it; unknown and ambiguous contracts are told."""
    report = drive(library)
    assert report["details"] == [[265000, "AAPL", "NASDAQ", "APPLE INC", "America/New_York", 0.01, "COMMON"]]
    assert report["liquid_hours"].startswith("20240305:0930-20240305:1600;20240306:0930-20240306:1600")
    assert report["ambiguous"] == [900001, 900002]
    assert report["unknown"] == {"code": 200, "text": "No security definition has been found for the request"}
    assert report["symbols"] == ["GOOG", "GOOGL"]


def test_client_reads_head_timestamp_and_schedule(library):
    """The head timestamp is the first regular open; the schedule holds real sessions."""
    report = drive(library)
    assert report["head"] == int(datetime(1999, 1, 4, 14, 30, tzinfo=UTC).timestamp())
    if library != "ibapi":  # ibapi 9.81 knows no schedules
        assert report["schedule"][-1] == ["20240305-09:30:00", "20240305-16:00:00", "20240305"]
        assert [row[2] for row in report["schedule"]] == ["20240301", "20240304", "20240305"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_client_reads_exactly_the_markets_bars(library, number):
    """What the client decoded is what the market holds: every stamp, price, volume, average and count."""
    got, wanted = normalise(drive(library)["history"][number]), expect_rows(CASES[number])
    assert len(wanted) > 0
    assert got == wanted


def test_client_is_told_why_a_request_is_refused(library):
    """Each kind of bad request ends with IB's code and wording, never with an empty answer."""
    answers = drive(library)["history"][len(CASES) :]
    expected = refused_of(library)
    assert len(answers) == len(expected)
    for (case, code, text), answer in zip(expected, answers, strict=True):
        assert (answer["code"], text in answer["text"]) == (code, True), (case, answer)


def test_client_sees_cancel_pacing_and_busy_id(library):
    """A cancelled query is 162 with IB's words, an identical request is a pacing violation, a taken client id is 326."""
    report = drive(library)
    assert report["cancelled"]["code"] == 162
    assert "API historical data query cancelled" in report["cancelled"]["text"]
    assert report["first_of_two"] == len(expect_rows(CASES[0]))
    assert report["pacing"] == {
        "code": 162,
        "text": "Historical Market Data Service error message:Historical data request pacing violation",
    }
    assert [row[:2] for row in report["busy"]] == [[-1, 326]]
