"""What a gateway can be asked: bars, contracts, schedules, the start of history. One method for each question.

Calls from any thread block until the answer, an error of `errors.py`, or the time-out. The connection and the life of a request
are in `ib/wire/session.py`. Pacing and retries are not here: see `history.py`. How answers are read: `ib/wire/decoding.py`.
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
from ktrdr_pipelines.ib.codes import Hold
from ktrdr_pipelines.ib.contracts import ContractInfo, NoContractTold
from ktrdr_pipelines.ib.trading_schedule import read_schedule
from ktrdr_pipelines.ib.wire.decoding import RawBars, columns_from_bars, read_contract, read_head, read_sample
from ktrdr_pipelines.ib.wire.session import (
    BARS,
    CONTRACT,
    CONTRACT_END,
    HEAD,
    SAMPLES,
    SCHEDULE,
    Conversation,
    NoData,
)

log = logging.getLogger(__name__)

Sending = Callable[[], AbstractContextManager[None]]
"""Opened around the write of a history request (`ledger.Grant.sending`)."""


@dataclass
class GatewayClient(Conversation):
    """A connection to the gateway at ``host``:``port``. Use as a context manager, or call `close` on every path."""

    # -- requests ---------------------------------------------------------------------------------------------------

    def contract_details(self, instrument: Instrument, timeout_s: float = 30.0) -> list[ContractInfo]:
        """Every contract that fits ``instrument``; an empty list when IB knows none (200).

        Raises:
            NoContractTold: neither a contract nor a word.
            RequestTimeout, TransientError, PermanentError: see `codes.py`.
        """
        contract = self._contract(instrument)
        doing = f"asking for the contract of {instrument.symbol}"

        def send(req_id: int) -> None:
            self._ib.client.reqContractDetails(req_id, contract)

        try:
            details = self._request(doing, send, lambda _: None, timeout_s, contract, (CONTRACT, CONTRACT_END))
        except KtrdrError as error:
            # "Ambiguous" is a 200 too, and no "there is none".
            if error.code == 200 and not error.retry_helps and "ambiguous" not in error.observed.lower():
                return []
            raise
        if not details:
            raise NoContractTold(
                "IB ended its answer without a contract and without a word that there is none",
                doing=doing,
                advice="Try again.",
            )
        return [read_contract(each, doing) for each in details]

    def matching_symbols(self, pattern: str, timeout_s: float = 10.0) -> list[ContractInfo]:
        """What IB offers for a symbol or name that may be misspelt: its best guesses, at most sixteen or so.

        Raises:
            RequestTimeout, TransientError, PermanentError: see `codes.py`.
        """
        doing = f"asking for symbols like {pattern}"

        def send(req_id: int) -> None:
            self._ib.client.reqMatchingSymbols(req_id, pattern)

        found = self._request(doing, send, lambda _: None, timeout_s, self._lib.Contract(), (SAMPLES,))
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
        second are rounded up. ``sending`` is entered around the very write; if it refuses, nothing is sent.

        Returns the bars of the answer, or no bars and ``no_data_text`` when IB said that the window is empty.

        Raises:
            RequestTimeout: no answer in time; cancelled on the wire. Never an empty result.
            DataError: an answer that cannot be read, or bars without a usable stamp.
            KtrdrError: whatever else IB answered, by `codes.py`.
        """
        contract = self._contract(instrument)
        # The dash form is UTC by definition; without a zone the gateway would assume its own (docs/ib_facts.md, 3).
        end_text = "" if end is None else _round_up(require_utc(end, "end")).strftime("%Y%m%d-%H:%M:%S")

        def send(req_id: int) -> None:
            with sending():
                self._ib.client.reqHistoricalData(
                    req_id,
                    contract,
                    end_text,
                    duration,
                    bar_size,
                    instrument.what_to_show,
                    instrument.use_rth,
                    2,
                    False,
                    [],
                )

        def cancel(req_id: int) -> None:
            self._ib.client.cancelHistoricalData(req_id)

        try:
            bars = self._request(doing, send, cancel, self.request_timeout_s, contract, (BARS,))
        except NoData as empty:
            return RawBars.nothing(str(empty))
        if not bars:
            if self.down.kinds & {Hold.HISTORY, Hold.LINK}:
                raise TransientError(
                    f"no bars came while this is down: {self.down.describe()}",
                    doing=doing,
                    advice="An answer of a broken farm proves nothing.",
                )
            return RawBars.nothing("")
        try:
            return columns_from_bars(bars, intraday=intraday)
        except KtrdrError as error:
            raise error.while_doing(doing) from None

    def schedule(
        self, instrument: Instrument, *, end: datetime, duration: str, doing: str, sending: Sending
    ) -> list[Session]:
        """IB's own sessions of ``instrument`` (SCHEDULE) up to ``end`` (aware), oldest first.

        Raises:
            DataError: an answer that cannot be read. KtrdrError: whatever else IB answered, by `codes.py`.
        """
        contract = self._contract(instrument)
        end_text = _round_up(require_utc(end, "end")).strftime("%Y%m%d-%H:%M:%S")

        def send(req_id: int) -> None:
            with sending():
                self._ib.client.reqHistoricalData(
                    req_id, contract, end_text, duration, "1 day", "SCHEDULE", instrument.use_rth, 2, False, []
                )

        def cancel(req_id: int) -> None:
            self._ib.client.cancelHistoricalData(req_id)

        answer = self._request(doing, send, cancel, self.request_timeout_s, contract, (SCHEDULE,))
        rows = [(row.startDateTime, row.endDateTime, row.refDate) for row in answer.sessions]
        try:
            return read_schedule(answer.timeZone, rows)
        except KtrdrError as error:
            raise error.while_doing(doing) from None

    def head_timestamp(
        self, instrument: Instrument, timeout_s: float = 30.0, sending: Sending = nullcontext
    ) -> datetime | None:
        """When IB believes that the instrument's history starts: a hint, too early or too late at times.

        None when IB knows none for this contract. Cancelled after use: uncancelled ones pile up and hang (docs/ib_facts.md, 5).
        A hint is waited for no longer than bars are.
        """
        contract = self._contract(instrument)

        def send(req_id: int) -> None:
            with sending():
                self._ib.client.reqHeadTimeStamp(req_id, contract, instrument.what_to_show, instrument.use_rth, 2)

        def cancel(req_id: int) -> None:
            self._ib.client.cancelHeadTimeStamp(req_id)

        doing = f"asking for the start of history of {instrument.symbol}"
        try:
            patience_s = min(timeout_s, self.request_timeout_s)
            return read_head(self._request(doing, send, cancel, patience_s, contract, (HEAD,), always_cancel=True))
        except PermanentError:
            return None  # "no head time stamp" is no statement about bars: the caller goes without the hint
        except (ValueError, OverflowError) as error:
            log.warning("%s: IB's answer is no time (%.200s); going on without it", doing, error)
            return None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _contract(self, instrument: Instrument) -> Any:
        contract = self._lib.Contract(
            conId=instrument.con_id,
            symbol=instrument.ib_symbol,
            secType=instrument.sec_type,
            exchange=instrument.exchange,
            currency=instrument.currency,
        )
        # Once IB pinned a conId, the primary exchange is implied; sent before, it tells twins apart.
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
