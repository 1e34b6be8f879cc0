"""One connection to a gateway: the only importer of ib_insync.

A thread of its own with its own event loop owns the connection, and the library is imported inside that thread: in
others it finds no event loop, or the wrong one (dagster_facts.md, 7). Calls from any thread block until the answer, an
error of `errors.py`, or the time-out. Pacing and retries are not here: see `history.py`. How answers are read:
`answers.py`. What a code means: `codes.py`, which alone decides whether a message ends a request.

Only the API handshake is made, none of the account, position and order requests that the library's `IB.connect` sends:
a loader needs none of them, and each is one more thing to wait for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from ktrdr_pipelines.errors import (
    GatewayUnreachable,
    KtrdrError,
    PermanentError,
    RequestTimeout,
    TransientError,
)
from ktrdr_pipelines.ib.answers import RawBars, check_bars_message, columns_from_bars, read_error, report_unreadable
from ktrdr_pipelines.ib.codes import Hold, Outcome, classify
from ktrdr_pipelines.ib.contracts import ContractInfo
from ktrdr_pipelines.ib.handshake import shake_hands
from ktrdr_pipelines.ib.loop_thread import LoopThread
from ktrdr_pipelines.ib.unreachable import WELL_KNOWN_PORTS, NotAGatewayError, explain_unreachable
from ktrdr_pipelines.series import Instrument, require_utc

log = logging.getLogger(__name__)

CLIENT_ID_IN_USE = 326
_ERROR, _CONTRACT, _BARS, _HEAD = 4, 10, 17, 88

T = TypeVar("T")


class ClientIdInUse(TransientError):
    """Another program holds this client id (326). The caller takes the next one of its range."""


@dataclass
class GatewayClient:
    """A connection to the gateway at ``host``:``port``. Use as a context manager, or call `close` on every path."""

    host: str
    port: int
    client_id: int
    connect_timeout_s: float = 15.0
    request_timeout_s: float = 120.0
    probe_timeout_s: float = 10.0
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    ports: Mapping[int, str] = field(default_factory=lambda: WELL_KNOWN_PORTS)
    """Ports to try, and what usually listens there, when ``port`` leads to no gateway."""
    notices: list[str] = field(default_factory=list)
    """Messages of the gateway that ended no request (farms, links, warnings), newest last; at most the last hundred."""

    def __post_init__(self) -> None:
        self.holds: frozenset[Hold] = frozenset()
        """What the gateway says is down at the moment; then "no data" is not believed."""
        self.clock_lag_s = 0.0
        """How many seconds the gateway's time was behind this machine's at the last probe; 0 if it was not."""
        self._thread: LoopThread | None = None
        self._ib: Any = None
        self._lib: Any = None
        self._id_in_use = False
        self._refusal = ""
        self._open: dict[int, bool] = {}  # unanswered requests: does "no data" count as an answer?
        self._heard: list[str] = []

    # -- life cycle -------------------------------------------------------------------------------------------------

    def __enter__(self) -> GatewayClient:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_connected(self) -> bool:
        """What the library believes. It can be wrong on a dead connection: `probe` asks the gateway."""
        return self._ib is not None and bool(self._ib.isConnected())

    @property
    def account(self) -> str:
        """First managed account, as the gateway announced it; empty before `connect`."""
        accounts = self._ib.client.getAccounts() if self.is_connected else []
        return str(accounts[0]).strip() if accounts else ""

    def connect(self) -> None:
        """Connect and prove that the gateway answers.

        Raises:
            ClientIdInUse: another program holds the client id.
            GatewayUnreachable: nothing there, or not a gateway; says which well-known port does answer.
        """
        if self._thread is not None:
            raise RuntimeError("already connected")
        self._id_in_use, self._refusal, self.holds = False, "", frozenset()
        self._thread = LoopThread(f"ib-gateway-{self.port}", self._load_library)
        try:
            self._shake_hands()
            self.probe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after a failure."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(self._hang_up)

    async def _hang_up(self) -> None:
        connection = self._ib.client.conn
        if not connection.isConnected():
            return
        transport = connection.transport
        self._ib.client.disconnect()
        # Let it say goodbye, so that the gateway frees the client id; but not for ever to a peer that does not read.
        for _ in range(20):
            if not connection.isConnected():
                return
            await asyncio.sleep(0.01)
        transport.abort()
        await asyncio.sleep(0)

    def probe(self) -> datetime:
        """Ask the gateway for its time: a connection may look alive and be dead (laptop sleep, silent hang).

        Sets `clock_lag_s`. The answer is in whole seconds, so that a lag below one second does not show.

        Raises:
            GatewayUnreachable: no answer within ``probe_timeout_s``.
        """

        async def ask() -> Any:
            return await asyncio.wait_for(self._ib.reqCurrentTimeAsync(), self.probe_timeout_s)

        asked_at = self.now()
        try:
            answer: datetime = self._call(ask(), self.probe_timeout_s + 5)
        except (TimeoutError, ConnectionError) as error:
            raise GatewayUnreachable(
                f"{self.host}:{self.port} is connected but does not tell the time ({type(error).__name__})",
                advice="Restart TWS or the gateway, or look whether it shows a dialog.",
            ) from None
        is_behind = asked_at - answer > timedelta(seconds=1)
        self.clock_lag_s = (self.now() - answer).total_seconds() if is_behind else 0.0
        return answer

    # -- requests ---------------------------------------------------------------------------------------------------

    def contract_details(self, instrument: Instrument, timeout_s: float = 30.0) -> list[ContractInfo]:
        """Every contract that fits ``instrument``; an empty list when IB knows none (200).

        Raises:
            RequestTimeout, TransientError, PermanentError: see `codes.py`.
        """
        contract = self._contract(instrument)
        doing = f"asking for the contract of {instrument.symbol}"

        def send(req_id: int) -> None:
            self._ib.client.reqContractDetails(req_id, contract)

        try:
            details = self._request(doing, send, lambda _: None, timeout_s, contract)
        except KtrdrError as error:
            # "Ambiguous" is a 200 too, and no "there is none".
            if error.code == 200 and not error.retry_helps and "ambiguous" not in error.observed.lower():
                return []
            raise
        return [
            ContractInfo(
                con_id=int(d.contract.conId),
                symbol=d.contract.symbol,
                sec_type=d.contract.secType,
                exchange=d.contract.exchange,
                currency=d.contract.currency,
                primary_exchange=d.contract.primaryExchange,
                local_symbol=d.contract.localSymbol,
                trading_class=d.contract.tradingClass,
                expiry=d.contract.lastTradeDateOrContractMonth,
                contract_month=d.contractMonth,
                multiplier=d.contract.multiplier,
                long_name=d.longName,
                time_zone=d.timeZoneId,
                valid_exchanges=d.validExchanges,
            )
            for d in details
        ]

    def historical_bars(
        self,
        instrument: Instrument,
        *,
        end: datetime | None,
        duration: str,
        bar_size: str,
        intraday: bool,
        doing: str,
        on_sent: Callable[[], None] = lambda: None,
    ) -> RawBars:
        """One historical-data request, exactly as given. ``end`` is aware, None means now (IB's empty string); fractions of a
        second are rounded up. ``on_sent`` is called right before the request is written; if it raises, nothing is sent.

        Returns the bars of the answer, or no bars and ``no_data_text`` when IB said that the window is empty.

        Raises:
            RequestTimeout: no answer in time; cancelled on the wire. Never an empty result.
            DataError: an answer that cannot be read, or bars without a usable stamp.
            KtrdrError: whatever else IB answered, by `codes.py`.
        """
        contract = self._contract(instrument)
        # The dash form is UTC by definition; without a zone the gateway would assume its own (ib_facts.md, 3).
        end_text = "" if end is None else _round_up(require_utc(end, "end")).strftime("%Y%m%d-%H:%M:%S")

        def send(req_id: int) -> None:
            on_sent()
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
            bars = self._request(doing, send, cancel, self.request_timeout_s, contract, proves_empty=True)
        except _NoData as empty:
            return RawBars.nothing(str(empty))
        if not bars:
            if self.holds & {Hold.HISTORY, Hold.LINK}:
                raise TransientError(
                    f"no bars came while this is down: {', '.join(sorted(self.holds))}",
                    doing=doing,
                    advice="An answer of a broken farm proves nothing.",
                )
            return RawBars.nothing("")
        try:
            return columns_from_bars(bars, intraday=intraday)
        except KtrdrError as error:
            raise error.while_doing(doing) from None

    def head_timestamp(
        self, instrument: Instrument, timeout_s: float = 30.0, on_sent: Callable[[], None] = lambda: None
    ) -> datetime | None:
        """When IB believes that the instrument's history starts: a hint, too early or too late at times.

        None when IB knows none for this contract. Cancelled after use: uncancelled ones pile up and hang (ib_facts.md, 5).
        """
        contract = self._contract(instrument)

        def send(req_id: int) -> None:
            on_sent()
            self._ib.client.reqHeadTimeStamp(req_id, contract, instrument.what_to_show, instrument.use_rth, 2)

        def cancel(req_id: int) -> None:
            self._ib.client.cancelHeadTimeStamp(req_id)

        doing = f"asking for the start of history of {instrument.symbol}"
        try:
            stamp = self._request(doing, send, cancel, timeout_s, contract, always_cancel=True)
        except PermanentError:
            return None  # "no head time stamp" is no statement about bars: the caller goes without the hint
        except ValueError as error:
            log.warning("%s: IB's answer is no time (%s); going on without it", doing, error)
            return None
        if not isinstance(stamp, datetime):
            day: date = stamp
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        # formatDate 2 is epoch seconds; a gateway that answers in text means UTC for this request.
        return stamp.replace(tzinfo=UTC) if stamp.tzinfo is None else stamp.astimezone(UTC)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _load_library(self) -> None:
        import ib_insync  # here and nowhere else: it looks for this thread's event loop

        # What the library logs as an error reaches the caller as an exception; twice would confuse.
        logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
        self._lib = ib_insync
        self._ib = ib_insync.IB()  # type: ignore[no-untyped-call]
        readers = self._ib.client.decoder.handlers
        readers[_ERROR] = self._read_error
        for message in (_CONTRACT, _BARS, _HEAD):
            readers[message] = self._guard(message, readers[message])

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._thread is None:
            work.close()
            raise ConnectionError("the connection is closed")
        return self._thread.call(work, timeout_s)

    def _shake_hands(self) -> None:
        self._ib.wrapper.clientId = self.client_id
        work = shake_hands(
            self._ib.client, self.host, self.port, self.client_id, self.connect_timeout_s, lambda: self._refusal
        )
        try:
            self._call(work, self.connect_timeout_s * 2 + 5)
        except (OSError, ValueError, NotAGatewayError) as error:
            if self._id_in_use:
                raise ClientIdInUse(
                    f"client id {self.client_id} is in use at {self.host}:{self.port}",
                    advice="Choose another, or leave the choice to the program.",
                    code=CLIENT_ID_IN_USE,
                ) from None
            if isinstance(error, NotAGatewayError) and self.notices:
                error = NotAGatewayError(f"{error}; it said: {'; '.join(self.notices[-3:])}")
            raise explain_unreachable(error, self.host, self.port, self.ports) from None

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
        return contract

    # -- messages of the gateway, on the owner's loop ---------------------------------------------------------------

    def _read_error(self, fields: Sequence[str]) -> None:
        req_id, code, text = read_error(fields)
        is_open = req_id in self._open
        outcome = classify(code, text, now=self.now(), during_history=self._open.get(req_id, False), held=self.holds)
        self.holds = (self.holds | outcome.holds) - outcome.releases
        self._id_in_use = self._id_in_use or code == CLIENT_ID_IN_USE
        if is_open and _ends_request(outcome):
            self._fail(req_id, _to_failure(outcome))
            return
        if is_open or req_id <= 0:
            log.info("the gateway says %d: %s", code, text)
            self._heard.append(f"{code} {text}")
            self.notices.append(f"{code} {text}")
            del self.notices[:-100], self._heard[:-100]
        if outcome.reconnect:
            self._refusal = f"{text} ({code})"

    def _guard(self, message: int, read: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        """``read``, but an answer that cannot be read fails its request instead of leaving it to its time-out."""

        def reading(fields: list[str]) -> None:
            has_version = message == _CONTRACT and self._ib.client.serverVersion() < 164
            req_id = fields[2 if has_version else 1]
            if not req_id.isdigit() or int(req_id) not in self._open:
                return  # late, of a request that was given up
            try:
                if message == _BARS:
                    check_bars_message(fields)
                read(fields)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the request has no answer
                self._fail(int(req_id), report_unreadable(error, fields))

        return reading

    def _fail(self, req_id: int, error: Exception) -> None:
        ended = self._ib.wrapper._futures.get(req_id)
        if ended is not None and not ended.done():
            ended.set_exception(error)

    def _request(
        self,
        doing: str,
        send: Callable[[int], None],
        cancel: Callable[[int], None],
        timeout_s: float,
        contract: Any,
        *,
        always_cancel: bool = False,
        proves_empty: bool = False,
    ) -> Any:
        """Send one request and wait for its end: the library's result, or an exception. Only where ``proves_empty`` (bars)
        does "no data" count as an answer."""

        async def run() -> Any:
            client, wrapper = self._ib.client, self._ib.wrapper
            req_id = client.getReqId()  # ConnectionError if there is none
            ended = wrapper.startReq(req_id, contract)
            self._open[req_id] = proves_empty
            self._heard = []
            try:
                send(req_id)
                result = await asyncio.wait_for(ended, timeout_s)
                if always_cancel and client.isReady():
                    cancel(req_id)
                return result
            except (TimeoutError, asyncio.CancelledError) as error:
                if client.isReady():
                    cancel(req_id)
                if isinstance(error, asyncio.CancelledError):
                    raise
                said = f"; meanwhile the gateway said: {'; '.join(self._heard[-3:])}" if self._heard else ""
                raise RequestTimeout(
                    f"no answer within {timeout_s:g} s; the request was cancelled{said}", doing=doing
                ) from None
            finally:
                # Forget the request, so that a late answer fills no list and nothing grows.
                for table in (self._open, wrapper._futures, wrapper._results, wrapper._reqId2Contract):
                    table.pop(req_id, None)

        try:
            return self._call(run(), timeout_s + 10)
        except TimeoutError:
            raise RequestTimeout(f"no answer within {timeout_s:g} s, and the connection hangs", doing=doing) from None
        except ConnectionError as error:
            raise TransientError(
                f"the connection to {self.host}:{self.port} was lost ({error})",
                doing=doing,
                advice="It is made again for the next try.",
            ) from None
        except KtrdrError as error:
            raise error.while_doing(doing) from None


def _round_up(instant: datetime) -> datetime:
    return instant if not instant.microsecond else instant.replace(microsecond=0) + timedelta(seconds=1)


class _NoData(Exception):
    """IB said in so many words that the window holds no data."""


def _ends_request(outcome: Outcome) -> bool:
    # Warnings leave the request running and its bars follow, whatever else is known of them: 2100 to 2199, and 10167 (delayed
    # data instead of live). 2174 complains of an end without a zone; ours never lacks one.
    return outcome.ends_request and not 2100 <= outcome.code < 2200 and outcome.code != 10167


def _to_failure(outcome: Outcome) -> Exception:
    if outcome.proven_empty:
        return _NoData(outcome.text)
    failure = outcome.to_error()
    failure.pauses_login = outcome.pauses_login
    return failure
