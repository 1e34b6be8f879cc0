"""Requests to a gateway: bars, contracts, schedules, the start of history. One method per request.

Calls from any thread block until the answer, an error of `errors.py`, or the time-out. The connection, and a request from sending
to end: `ib/wire/session.py`. The reading of answers: `ib/wire/decoding.py`. No pacing and no retries here: see `history.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ktrdr_pipelines.calendars import Session
from ktrdr_pipelines.domain.instruments import Instrument, is_future_code
from ktrdr_pipelines.domain.time import require_utc
from ktrdr_pipelines.errors import KtrdrError, PermanentError, TransientError
from ktrdr_pipelines.ib.codes import Outage
from ktrdr_pipelines.ib.contracts import ContractInfo, EmptyContractAnswer
from ktrdr_pipelines.ib.trading_schedule import read_schedule
from ktrdr_pipelines.ib.wire.answers import BARS, CONTRACT, CONTRACT_END, HEAD, SAMPLES, SCHEDULE
from ktrdr_pipelines.ib.wire.decoding import RawBars, columns_from_bars, read_contract, read_head, read_sample
from ktrdr_pipelines.ib.wire.dispatcher import NoData
from ktrdr_pipelines.ib.wire.session import GatewaySession

log = logging.getLogger(__name__)

Sending = Callable[[], AbstractContextManager[None]]
"""Entered around the write of a history request (`ledger.Grant.sending`)."""


@dataclass
class GatewayClient(GatewaySession):
    """A connection to the gateway at ``host``:``port``. Use as a context manager, or call `close` on every path."""

    def contract_details(self, instrument: Instrument, timeout_s: float = 30.0) -> list[ContractInfo]:
        """Every contract that fits ``instrument``; an empty list when IB knows none (200).

        Raises:
            EmptyContractAnswer: an answer without a contract and without an error.
            RequestTimeout, TransientError, PermanentError: see `codes.py`.
        """
        doing = f"asking for the contract of {instrument.symbol}"

        def send(req_id: int) -> None:
            self._requests.reqContractDetails(req_id, self._contract(instrument))

        try:
            details = self._request(doing, send, None, timeout_s, (CONTRACT, CONTRACT_END))
        except KtrdrError as error:
            # "Ambiguous" is a 200 too, and does not mean that there is none.
            if error.code == 200 and not error.is_transient and "ambiguous" not in error.observed.lower():
                return []
            raise
        if not details:
            raise EmptyContractAnswer(
                "IB's answer ended without a contract and without the error for an unknown one",
                doing=doing,
                advice="Try again.",
            )
        return [read_contract(each, doing) for each in details]

    def matching_symbols(self, pattern: str, timeout_s: float = 10.0) -> list[ContractInfo]:
        """IB's best guesses at a symbol or name that may be misspelt, at most sixteen or so.

        Raises:
            RequestTimeout, TransientError, PermanentError: see `codes.py`.
        """

        def send(req_id: int) -> None:
            self._requests.reqMatchingSymbols(req_id, pattern)

        found = self._request(f"asking for symbols like {pattern}", send, None, timeout_s, (SAMPLES,))
        return [read_sample(each) for each in found]

    def historical_bars(
        self,
        instrument: Instrument,
        *,
        end: datetime | None,
        duration: str,
        bar_size: str,
        intraday: bool,
        doing: str,
        sending: Sending = nullcontext,
    ) -> RawBars:
        """One historical-data request, exactly as given. ``end`` is aware, None means now (IB's empty string); fractions of a
        second are rounded up. ``sending`` is entered around the write alone; if it raises, nothing is sent.

        Returns the bars of the answer, or no bars and ``no_data_text`` when IB answered that the window is empty.

        Raises:
            RequestTimeout: no answer in time; cancelled on the wire. Never an empty result.
            DataError: an answer that cannot be read, or bars without a usable stamp.
            KtrdrError: whatever else IB answered, by `codes.py`.
        """
        try:
            bars = self._ask_history(
                instrument, end, duration, bar_size, instrument.what_to_show, doing, sending, answered_by=BARS
            )
        except NoData as empty:
            return RawBars.nothing(str(empty))
        if not bars:
            if self.outages.kinds & {Outage.HISTORY, Outage.LINK}:
                raise TransientError(
                    f"no bars in the answer, during an outage ({self.outages.describe()})",
                    doing=doing,
                    advice="An answer during an outage is no evidence that there is no data.",
                )
            return RawBars.nothing("")
        try:
            return columns_from_bars(bars, self.library_parts.parse_time, intraday=intraday)
        except KtrdrError as error:
            raise error.while_doing(doing) from None

    def schedule(
        self, instrument: Instrument, *, end: datetime, duration: str, doing: str, sending: Sending
    ) -> list[Session]:
        """IB's own sessions of ``instrument`` (SCHEDULE) up to ``end`` (aware), oldest first.

        Raises:
            DataError: an answer that cannot be read. KtrdrError: whatever else IB answered, by `codes.py`.
        """
        zone, rows = self._ask_history(
            instrument, end, duration, "1 day", "SCHEDULE", doing, sending, answered_by=SCHEDULE
        )
        try:
            return read_schedule(zone, rows)
        except KtrdrError as error:
            raise error.while_doing(doing) from None

    def head_timestamp(
        self, instrument: Instrument, timeout_s: float = 30.0, sending: Sending = nullcontext
    ) -> datetime | None:
        """IB's start of the instrument's history: a hint, at times too early or too late (docs/ib_facts.md, 5).

        None when IB has none for this contract. Cancelled after use: uncancelled ones pile up and hang. Its time-out is at most
        that of bars.
        """
        doing = f"asking for the start of history of {instrument.symbol}"

        def send(req_id: int) -> None:
            with sending():
                self._requests.reqHeadTimeStamp(
                    req_id, self._contract(instrument), instrument.what_to_show, instrument.use_rth, 2
                )

        def cancel(req_id: int) -> None:
            self._requests.cancelHeadTimeStamp(req_id)

        try:
            patience_s = min(timeout_s, self.request_timeout_s)
            text = self._request(doing, send, cancel, patience_s, (HEAD,), always_cancel=True)
            return read_head(text, self.library_parts.parse_time)
        except PermanentError:
            return None  # "no head time stamp" is no statement about bars: the caller goes on without the hint
        except (ValueError, LookupError, OverflowError, OSError) as error:
            log.warning("%s: IB's answer is not a time (%.200s); going on without it", doing, error)
            return None

    def _ask_history(
        self,
        instrument: Instrument,
        end: datetime | None,
        duration: str,
        bar_size: str,
        what_to_show: str,
        doing: str,
        sending: Sending,
        *,
        answered_by: int,
    ) -> Any:
        # The dash form is UTC by definition; without a zone the gateway would assume its own (docs/ib_facts.md, 3).
        end_text = "" if end is None else _round_up(require_utc(end, "end")).strftime("%Y%m%d-%H:%M:%S")

        def send(req_id: int) -> None:
            contract, rth = self._contract(instrument), instrument.use_rth
            with sending():
                self._requests.reqHistoricalData(
                    req_id, contract, end_text, duration, bar_size, what_to_show, rth, 2, False, []
                )

        def cancel(req_id: int) -> None:
            self._requests.cancelHistoricalData(req_id)

        return self._request(doing, send, cancel, self.request_timeout_s, (answered_by,))

    def _contract(self, instrument: Instrument) -> Any:
        contract = self.library_parts.contract(
            conId=instrument.con_id,
            symbol=instrument.ib_symbol,
            secType=instrument.sec_type,
            exchange=instrument.exchange,
            currency=instrument.currency,
        )
        # Once IB pinned a conId, the primary exchange is implied; sent before, it distinguishes twins.
        if not instrument.con_id:
            contract.primaryExchange = instrument.primary_exchange
        if instrument.sec_type == "FUT":
            contract.lastTradeDateOrContractMonth = instrument.expiry
            contract.includeExpired = True
            if not instrument.con_id and not instrument.expiry and is_future_code(instrument.symbol):
                contract.localSymbol = instrument.symbol
        return contract


def _round_up(instant: datetime) -> datetime:
    return instant if not instant.microsecond else instant.replace(microsecond=0) + timedelta(seconds=1)
