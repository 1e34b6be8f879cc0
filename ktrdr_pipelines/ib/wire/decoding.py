"""Reads the gateway's answers: bars as columns, contracts, error messages; and checks that a message is as long as it claims.

Pure: fields and the library's objects in, columns and errors out. Bars are read from their fields, everything else from the
objects that the library's decoder makes. The library skips a message that it cannot read, and the
request behind it waits for its time-out; and it trusts the count in front of bars. Here both are errors at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.ib.contracts import ContractInfo

BAR_FIELDS = 8
"""Date, open, high, low, close, volume, average, count (both libraries' decoders, server versions 157 to 178)."""
BARS_AT = 5
"""Fields of a bars message before its bars: message id, request id, start, end, number of bars."""

MAX_CONTRACTS = 2000
"""Contracts in one answer; the longest real ones (all futures of a product, expired ones too) have some hundreds."""
MAX_CONTRACT_FIELDS = 2000

SESSIONS_AT, SESSION_FIELDS = 6, 3
"""A schedule: message id, request id, start, end, zone, number of sessions; then start, end and date of each."""

_NOTHING_WRITTEN = "Nothing was written."
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_LONGEST_TEXT = 2000
# float() and int() also take "1_000", blanks and the digits of every script; strptime takes a date that is a digit short.
_NO_NUMBER = re.compile(r"[^0-9A-Za-z+\-.]")
_DATE = re.compile(r"\d{1,12}|\d{8}(?:-| {1,2})\d\d:\d\d:\d\d(?: \S+)?", re.ASCII)


@dataclass(frozen=True)
class RawBars:
    """Bars of one answer as IB sent them: unsorted, uncut, unchecked. Columns of equal length.

    ``opens_s``: seconds since 1970-01-01 UTC; the session date's midnight for daily and longer bars. ``volume`` is -1
    where IB has none.
    """

    opens_s: npt.NDArray[np.int64]
    open: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    close: npt.NDArray[np.float64]
    volume: npt.NDArray[np.float64]
    no_data_text: str = ""
    """IB's text when it answered that there is no data in the window (then there are no bars)."""

    @classmethod
    def nothing(cls, text: str) -> RawBars:
        """No bars, and IB's text about it."""
        empty = np.empty(0)
        return cls(np.empty(0, dtype=np.int64), empty, empty, empty, empty, empty, text)

    def __len__(self) -> int:
        return len(self.opens_s)


@dataclass(frozen=True)
class SentBars:
    """The bars of one message: values as columns, stamps as IB's texts. What a stamp means depends on the request."""

    stamps: Sequence[str]
    open: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    close: npt.NDArray[np.float64]
    volume: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.stamps)


def read_bars_message(fields: Sequence[str]) -> SentBars:
    """The bars of a message that has as many as it announces, and nothing behind them.

    Read here, column by column, and not by the library's decoder, which makes an object of each bar.

    Raises:
        ValueError: bars are missing or too many, or a field is no number. Newer protocols (from 196) leave out start and end:
            the second field of their first bar would be taken for the count, and an open of 0 for "no bars".
    """
    announced = fields[BARS_AT - 1]
    if not (announced.isascii() and announced.isdigit() and len(announced) < 10):
        raise ValueError(f"{announced!r} bars announced")
    count = int(announced)
    end = BARS_AT + BAR_FIELDS * count
    if len(fields) < end or any(fields[end:]):
        raise ValueError(f"{count} bars announced, {(len(fields) - BARS_AT) / BAR_FIELDS:g} sent")
    stamps, *columns = (fields[at:end:BAR_FIELDS] for at in range(BARS_AT, BARS_AT + BAR_FIELDS))
    for column in columns:
        if strange := _NO_NUMBER.search("".join(column)):
            raise ValueError(f"{strange.group()!r} in a number of a bar")
    if not _are_epochs(stamps):
        for stamp in stamps:
            if not _DATE.fullmatch(stamp):
                raise ValueError(f"{stamp!r} is no date of a bar")
    *prices, volume, average, trades = columns
    max(map(float, average), default=0)  # not kept, but a sign of shifted columns where they are no numbers
    max(map(int, trades), default=0)
    return SentBars(stamps, *(np.fromiter(map(float, each), np.float64, count) for each in (*prices, volume)))


def columns_from_bars(bars: SentBars, parse_time: Callable[[str], date], *, intraday: bool) -> RawBars:
    """Bars with their stamps as instants. ``parse_time``: the library's reading of a stamp that is not epoch seconds.

    Raises:
        DataError: a stamp that is no time or has no zone, an intraday bar with a date only, a daily bar with a time of day:
            guessing would shift the file.
    """
    if intraday and _are_epochs(bars.stamps):
        opens = np.fromiter(map(int, bars.stamps), np.int64, len(bars))
    else:
        opens = np.empty(len(bars), dtype=np.int64)
        for i, text in enumerate(bars.stamps):
            try:
                opens[i] = _open_of(parse_time(text), intraday)
            except (ValueError, LookupError, OverflowError, OSError) as error:
                raise DataError(
                    clean_text(f"IB sent a bar stamped {text!r:.60}: {error!s:.200}"), advice=_NOTHING_WRITTEN
                ) from None
    return RawBars(opens, bars.open, bars.high, bars.low, bars.close, bars.volume)


def _are_epochs(stamps: Sequence[str]) -> bool:
    """True if all stamps are epoch seconds, as this program asks for them: neither a date nor beyond the year 5000."""
    together = "".join(stamps)
    return together.isascii() and together.isdigit() and set(map(len, stamps)) <= {9, 10, 11}


def _open_of(stamp: date, intraday: bool) -> int:
    """The bar open of a stamp in epoch seconds. Raises ValueError where it would have to be guessed."""
    if not isinstance(stamp, datetime):
        if intraday:
            raise ValueError("a date without a time of day")
        return int(datetime(stamp.year, stamp.month, stamp.day, tzinfo=UTC).timestamp())
    if stamp.tzinfo is None:
        raise ValueError("a time without a zone")
    seconds = stamp.timestamp()
    if seconds != int(seconds) or (not intraday and int(seconds) % 86400):
        raise ValueError("no open of a bar")
    return int(seconds)


def check_schedule_message(fields: Sequence[str]) -> None:
    """Check that a schedule has as many sessions as it announces, and nothing behind them.

    Raises:
        ValueError: sessions are missing or too many.
    """
    announced, rows = fields[SESSIONS_AT - 1], fields[SESSIONS_AT:]
    if not (announced.isascii() and announced.isdigit() and len(announced) < 10):
        raise ValueError(f"{announced!r} sessions announced")
    count = int(announced)
    if len(rows) < SESSION_FIELDS * count or any(rows[SESSION_FIELDS * count :]):
        raise ValueError(f"{count} sessions announced, {len(rows) / SESSION_FIELDS:g} sent")


def check_samples_message(fields: Sequence[str], version: int) -> None:
    """Check that an answer with matching symbols has as many as it announces, and nothing behind them.

    Raises:
        ValueError: symbols are missing or too many, or one has no number for a conId.
    """
    _, _, announced, *rest = fields
    if not (announced.isascii() and announced.isdigit() and len(announced) < 5):
        raise ValueError(f"{announced!r} symbols announced")
    for _ in range(int(announced)):
        if len(rest) < 6 or not _is_count(rest[0]) or not _is_count(rest[5]):
            raise ValueError(f"{announced} symbols announced, fewer sent")
        # Kinds of derivatives; from 176 on a description and an issuer.
        length = 6 + int(rest[5]) + (2 if version >= 176 else 0)
        if len(rest) < length:
            raise ValueError(f"{announced} symbols announced, fewer sent")
        rest = rest[length:]
    if any(rest):
        raise ValueError(f"{announced} symbols announced, more sent")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def check_contract_message(fields: Sequence[str], before: int) -> None:
    """Check that a contract has a sane size and is not one too many, when ``before`` came in the same answer.

    Raises:
        ValueError: it is not.
    """
    if before >= MAX_CONTRACTS:
        raise ValueError(f"more than {MAX_CONTRACTS} contracts")
    if len(fields) > MAX_CONTRACT_FIELDS or sum(map(len, fields)) > 1 << 16:
        raise ValueError("a contract longer than any")


def read_contract(details: Any, doing: str) -> ContractInfo:
    """One contract from the library's object.

    Raises:
        DataError: it has no conId, which every further request needs.
    """
    contract = details.contract
    con_id = int(contract.conId)
    if not 0 < con_id < 1 << 63:
        raise DataError(f"IB described a contract without a conId ({con_id:.12g})", doing=doing)
    return ContractInfo(
        con_id=con_id,
        symbol=clean_text(contract.symbol),
        sec_type=clean_text(contract.secType),
        exchange=clean_text(contract.exchange),
        currency=clean_text(contract.currency),
        primary_exchange=clean_text(contract.primaryExchange),
        local_symbol=clean_text(contract.localSymbol),
        trading_class=clean_text(contract.tradingClass),
        expiry=clean_text(contract.lastTradeDateOrContractMonth),
        contract_month=clean_text(details.contractMonth),
        multiplier=clean_text(contract.multiplier),
        long_name=clean_text(details.longName),
        time_zone=clean_text(details.timeZoneId),
        valid_exchanges=clean_text(details.validExchanges),
        trading_hours=clean_text(details.tradingHours),
        liquid_hours=clean_text(details.liquidHours),
    )


def read_sample(found: Any) -> ContractInfo:
    """One matching symbol from the library's object; it has fewer fields than contract details."""
    contract = found.contract
    return ContractInfo(
        con_id=int(contract.conId),
        symbol=clean_text(contract.symbol),
        sec_type=clean_text(contract.secType),
        exchange="",
        currency=clean_text(contract.currency),
        # Indices and others come with the venue in front: "IND.CBOE".
        primary_exchange=clean_text(contract.primaryExchange),
        long_name=clean_text(getattr(contract, "description", "") or ""),
    )


def read_head(text: str, parse_time: Callable[[str], date]) -> datetime:
    """A head timestamp as an instant.

    Raises:
        ValueError, LookupError, OverflowError, OSError: no time, no known zone, outside the years 1 to 9999.
    """
    stamp = parse_time(text)
    if not isinstance(stamp, datetime):
        return datetime(stamp.year, stamp.month, stamp.day, tzinfo=UTC)
    # formatDate 2 asks for epoch seconds; a text without a zone is UTC for this request.
    return stamp.replace(tzinfo=UTC) if stamp.tzinfo is None else stamp.astimezone(UTC)


def read_error(fields: Sequence[str]) -> tuple[int, int, str]:
    """Request id (-1: of no request), code and text of an error message; further fields are ignored.

    The library insists on the field for rejected orders from server version 166 on, and drops a message without it.
    Texts that are not ASCII arrive as ``\\uXXXX`` (since 153) and are turned back into letters.

    Raises:
        ValueError: not an error message.
    """
    _, _, req_id, code, text, *_ = fields
    if len(req_id) > 20 or len(code) > 9:
        raise ValueError("an error of no known code")
    return int(req_id), int(code), clean_text(_ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), text[:20_000]))


def clean_text(text: str) -> str:
    """A gateway's text fit to be shown, logged and stored: of limited length, without control characters, and without lone
    surrogates (emoji arrive as two escapes), which no file takes."""
    whole = text[:_LONGEST_TEXT].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole if whole.isprintable() else "".join(c if c.isprintable() else " " for c in whole)


def report_unreadable(error: Exception, fields: Sequence[str]) -> DataError:
    """The error of a request whose answer cannot be read."""
    return DataError(
        clean_text(f"the gateway's answer cannot be read ({type(error).__name__}: {str(error)[:200]})"),
        rows=clean_text(" ".join(field[:40] for field in fields[:24])),
        advice=f"{_NOTHING_WRITTEN} Please report this with the gateway's version.",
    )
