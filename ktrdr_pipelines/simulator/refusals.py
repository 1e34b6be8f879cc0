"""What the gateway answers when it refuses a history request: IB's codes and wordings in one place.

Sources: `docs/ib_facts.md`, 1, 6 and 8; wordings as quoted in public issue threads of ib_insync, ib_async, rust-ibapi and
ezibpy; codes from IBKR's message-code pages. Where no wording is public the sentence is ours and the code IB's.
"""

from __future__ import annotations

from dataclasses import dataclass

SERVICE = "Historical Market Data Service error message:"


@dataclass(frozen=True)
class Refusal:
    """An error message to send in place of data, or a notice beside it."""

    code: int
    text: str


class RequestRefusedError(Exception):
    """A request that gets ``refusal`` for an answer; ``detail`` is for the log. Never leaves this package."""

    def __init__(self, refusal: Refusal, detail: str = "") -> None:
        super().__init__(f"{refusal.code} {refusal.text}")
        self.refusal = refusal
        self.detail = detail


def _invalid(check: str, cause: str) -> Refusal:
    return Refusal(321, f"Error validating request.-'{check}' : cause - {cause}")


UNKNOWN_CONTRACT = Refusal(200, "No security definition has been found for the request")
PACING = Refusal(162, f"{SERVICE}Historical data request pacing violation")
MORE_THAN_A_YEAR = _invalid("bH", "Historical data requests for durations longer than 365 days must be made in years.")
BAD_BAR_SIZE = _invalid(
    "bK",
    "Historical data bar size setting is invalid. Legal ones are: 1 secs, 5 secs, 10 secs, 15 secs, 30 secs, 1 min, 2 mins, "
    "3 mins, 5 mins, 10 mins, 15 mins, 20 mins, 30 mins, 1 hour, 2 hours, 3 hours, 4 hours, 8 hours, 1 day, 1W, 1M",
)
BAD_END = Refusal(
    10314,
    "End Date/Time: The date, time, or time-zone entered is invalid. The correct format is yyyymmdd hh:mm:ss xx/xxxx where "
    "yyyymmdd and xx/xxxx are optional. E.g.: 20031126 15:59:00 US/Eastern  Note that there is a space between the date and "
    "time, and between the time and time-zone.  If no date is specified, current date is assumed. If no time-zone is "
    "specified, local time-zone is assumed(deprecated).  You can also provide yyyymmddd-hh:mm:ss time is in UTC. Note that "
    "there is a dash between the date and time in UTC notation.",
)
IMPLIED_ZONE = Refusal(
    2174,
    "Warning: You submitted request with date-time attributes without explicit time zone. Please switch to use "
    "yyyymmdd-hh:mm:ss in UTC or use instrument time zone, like US/Eastern. Implied time zone functionality will be removed "
    "in the next API release",
)
END_WITH_CONTINUOUS = Refusal(10339, "Setting end date/time for continuous future security type is not allowed.")
END_WITH_ADJUSTED = _invalid("bI", "End date/time is not supported with adjusted last")
BAD_WHAT = _invalid("bI", "Please enter a valid what to show")
BAD_FORMAT_DATE = "Date formatting selection of {} rejected"
READ_ONLY = _invalid("bW", "The API interface is currently in Read-Only mode.")
TOO_MANY_OPEN = Refusal(
    322, "Error processing request.-'wd' : cause - Only 50 simultaneous API historical data requests allowed."
)
TOO_LONG = Refusal(162, f"{SERVICE}the answer would be longer than a message can be")
BUSY_CLIENT_ID = Refusal(326, "Unable to connect as the client id is already in use.  Retry with a unique client id.")
FARM_NOTICES = (
    Refusal(2104, "Market data farm connection is OK:usfarm"),
    Refusal(2106, "HMDS data farm connection is OK:ushmds"),
    Refusal(2158, "Sec-def data farm connection is OK:secdefil"),
)
"""What a gateway tells every new client. -1 is their request id."""


QUERY_NOTICE = Refusal(165, "Historical Market Data Service query message:HMDS server connection was successful")


def refuse_duration(duration: str) -> Refusal:
    """``8 H``, ``1D`` and the like: only an integer, a space and S, D, W, M or Y is a duration."""
    return _invalid("bP", f"Invalid duration/step '{duration}'. An integer, a space and one of S D W M Y are expected")


def refuse_format_date(value: str) -> Refusal:
    return _invalid("bT", BAD_FORMAT_DATE.format(value))


def refuse_step(seconds: int) -> Refusal:
    """The bar size does not go with the duration."""
    return Refusal(162, f"{SERVICE}invalid step: {seconds}")


def refuse_ambiguous(symbol: str) -> Refusal:
    return Refusal(
        200,
        f"The contract description specified for {symbol} is ambiguous; you must specify the multiplier or trading class.",
    )


def report_no_data(symbol: str, exchange: str, what: str) -> Refusal:
    return Refusal(162, f"{SERVICE}HMDS query returned no data: {symbol}@{exchange} {what.title()}")


def refuse_trades(symbol: str, sec_type: str, exchange: str, step: str) -> Refusal:
    """TRADES of an instrument that has none. ``step`` as IB writes it: seconds, or ``1d``."""
    return Refusal(162, f"{SERVICE}No historical market data for {symbol}/{sec_type}@{exchange} Last {step}")


def confirm_cancel(req_id: int) -> Refusal:
    return Refusal(162, f"{SERVICE}API historical data query cancelled: {req_id}")


def report_unknown_query(req_id: int) -> Refusal:
    return Refusal(366, f"No historical data query found for ticker id:{req_id}")


def report_rate(received: int) -> Refusal:
    return Refusal(100, f"Max rate of messages per second has been exceeded:max=50 rec={received} (1)")


def report_unreadable(message_id: str, detail: str) -> Refusal:
    return Refusal(320, f"Error reading request. Message id {message_id}. {detail}")
