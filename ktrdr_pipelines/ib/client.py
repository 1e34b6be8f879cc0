"""One connection to a gateway: the only importer of ib_insync.

A thread of its own with its own event loop owns the connection, and the library is imported inside that thread: in
others it finds no event loop, or the wrong one (dagster_facts.md, 7). Calls from any thread block until the answer, an
error of `errors.py`, or the time-out. Pacing and retries are not here: see `history.py`. What a code means: `codes.py`.

Only the API handshake is made, none of the account, position and order requests that the library's `IB.connect` sends:
a loader needs none of them, and each is one more thing to wait for.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.errors import (
    DataError,
    GatewayUnreachable,
    KtrdrError,
    PermanentError,
    RequestTimeout,
    TransientError,
)
from ktrdr_pipelines.ib.codes import Hold, classify
from ktrdr_pipelines.ib.contracts import ContractInfo
from ktrdr_pipelines.series import Instrument

WELL_KNOWN_PORTS = {4001: "IB Gateway live", 4002: "IB Gateway paper", 7496: "TWS live", 7497: "TWS paper"}
CLIENT_ID_IN_USE = 326

T = TypeVar("T")


class ClientIdInUse(TransientError):
    """Another program holds this client id (326). The caller takes the next one of its range."""


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
    """IB's words when it said that there is no data in the window (then there are no bars)."""

    def __len__(self) -> int:
        return len(self.opens_s)


def columns_from_bars(bars: Sequence[Any], *, intraday: bool) -> RawBars:
    """Columns from the library's bar objects (``date``, ``open`` … ``volume``).

    Raises:
        DataError: a stamp without a zone, an intraday bar with a date only, a daily bar with a time of day: guessing
            would shift the file.
    """
    opens = np.empty(len(bars), dtype=np.int64)
    for i, bar in enumerate(bars):
        stamp = bar.date
        if isinstance(stamp, datetime):
            if stamp.tzinfo is None:
                raise DataError(f"IB sent a bar stamped {stamp} without a time zone", advice="Nothing was written.")
            seconds = stamp.timestamp()
            if seconds != int(seconds) or (not intraday and int(seconds) % 86400):
                raise DataError(f"IB sent a bar stamped {stamp}, which is no bar open", advice="Nothing was written.")
            opens[i] = int(seconds)
        elif isinstance(stamp, date) and not intraday:
            opens[i] = int(datetime(stamp.year, stamp.month, stamp.day, tzinfo=UTC).timestamp())
        else:
            raise DataError(f"IB sent an intraday bar stamped {stamp!r}", advice="Nothing was written.")

    def column(name: str) -> npt.NDArray[np.float64]:
        return np.fromiter((getattr(bar, name) for bar in bars), dtype=np.float64, count=len(bars))

    return RawBars(opens, column("open"), column("high"), column("low"), column("close"), column("volume"))


@dataclass
class GatewayClient:
    """A connection to the gateway at ``host``:``port``. Use as a context manager, or call `close` on every path."""

    host: str
    port: int
    client_id: int
    connect_timeout_s: float = 15.0
    request_timeout_s: float = 120.0
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    notices: list[str] = field(default_factory=list)
    """Connection-wide messages of the gateway (farms, links), newest last; at most the last hundred."""

    def __post_init__(self) -> None:
        self.holds: frozenset[Hold] = frozenset()
        """What the gateway says is down at the moment; then "no data" is not believed."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ib: Any = None
        self._lib: Any = None
        self._id_in_use = False
        self._refusal = ""

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
        return str(accounts[0]) if accounts else ""

    def connect(self) -> None:
        """Connect and prove that the gateway answers.

        Raises:
            ClientIdInUse: another program holds the client id.
            GatewayUnreachable: nothing there, or not a gateway; says which well-known port does answer.
        """
        self._start_thread()
        try:
            self._call(self._connect(), self.connect_timeout_s * 2 + 5)
            self.probe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect and end the thread. Safe to call twice, and after a failure."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return

        async def shut() -> None:
            if self._ib is not None and self._ib.client.conn.isConnected():
                self._ib.client.disconnect()
                await asyncio.sleep(0)  # let the transport say goodbye, so that the gateway frees the client id
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        try:
            asyncio.run_coroutine_threadsafe(shut(), loop).result(5)
        except (TimeoutError, OSError, RuntimeError) as error:
            logging.getLogger(__name__).warning("closing the gateway connection: %r", error)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)

    def probe(self, timeout_s: float = 10.0) -> datetime:
        """Ask the gateway for its time: a connection may look alive and be dead (laptop sleep, silent hang).

        Raises:
            GatewayUnreachable: no answer within ``timeout_s``.
        """

        async def ask() -> Any:
            return await asyncio.wait_for(self._ib.reqCurrentTimeAsync(), timeout_s)

        try:
            answer: datetime = self._call(ask(), timeout_s + 5)
        except (TimeoutError, ConnectionError, AttributeError) as error:
            raise GatewayUnreachable(
                f"{self.host}:{self.port} is connected but does not tell the time ({type(error).__name__})",
                advice="Restart TWS or the gateway, or look whether it shows a dialog.",
            ) from None
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
            if error.code == 200 and not error.retry_helps:
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
        """One historical-data request, exactly as given. ``end`` is aware, None means now (IB's empty string).

        Returns the bars of the answer, or no bars and ``no_data_text`` when IB said that the window is empty.

        Raises:
            RequestTimeout: no answer in time; cancelled on the wire. Never an empty result.
            KtrdrError: whatever else IB answered, by `codes.py`.
        """
        contract = self._contract(instrument)
        # The dash form is UTC by definition; without a zone the gateway would assume its own (ib_facts.md, 3).
        end_text = "" if end is None else end.astimezone(UTC).strftime("%Y%m%d-%H:%M:%S")

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
            nothing = np.empty(0)
            return RawBars(np.empty(0, dtype=np.int64), nothing, nothing, nothing, nothing, nothing, str(empty))
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
        if not isinstance(stamp, datetime):
            raise DataError(f"IB answered {stamp!r}, which is no time", doing=doing)
        # formatDate 2 is epoch seconds; a gateway that answers in text means UTC for this request.
        return stamp.replace(tzinfo=UTC) if stamp.tzinfo is None else stamp.astimezone(UTC)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        if self._thread is not None:
            raise RuntimeError("already connected")
        ready = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            try:
                import ib_insync  # here and nowhere else: it looks for this thread's event loop

                # What the library logs as an error reaches the caller as an exception; twice would confuse.
                logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
                self._lib = ib_insync
                self._ib = ib_insync.IB()  # type: ignore[no-untyped-call]
                self._ib.RaiseRequestErrors = True
                self._ib.errorEvent += self._on_error
            except Exception as error:  # noqa: BLE001 - raised again in the thread that asked for the connection
                failure.append(error)
                return
            finally:
                self._loop = loop
                ready.set()
            try:
                loop.run_forever()
            finally:
                loop.close()

        self._thread = threading.Thread(target=run, name=f"ib-gateway-{self.port}", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``work`` on the owner's loop and wait for it from this thread."""
        if self._loop is None:
            work.close()
            raise GatewayUnreachable("the connection is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    async def _connect(self) -> None:
        self._id_in_use, self._refusal = False, ""
        self._ib.wrapper.clientId = self.client_id
        attempt = asyncio.ensure_future(
            self._ib.client.connectAsync(self.host, self.port, self.client_id, self.connect_timeout_s)
        )
        # 326 comes as a message and then silence until the time-out: watch for it instead of waiting.
        while not attempt.done() and not self._id_in_use:
            await asyncio.wait({attempt}, timeout=0.05)
        if self._id_in_use:
            attempt.cancel()
            await asyncio.wait({attempt})
            raise ClientIdInUse(
                f"client id {self.client_id} is in use at {self.host}:{self.port}", code=CLIENT_ID_IN_USE
            )
        try:
            await attempt
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise await asyncio.to_thread(self._explain_unreachable, error) from None

    def _explain_unreachable(self, error: BaseException) -> GatewayUnreachable:
        where = f"{self.host}:{self.port}"
        if isinstance(error, socket.gaierror):
            return GatewayUnreachable(
                f"host {self.host!r} is not known", advice="Check IB_HOST.", doing="connecting to IB"
            )
        if isinstance(error, TimeoutError):
            if self._refusal:
                seen = f"{where} refused: {self._refusal}"
            else:
                seen = (
                    f"{where} accepts connections but does not greet as a gateway within {self.connect_timeout_s:g} s"
                )
            advice = (
                "Look for a dialog asking to accept the connection, enable the API in its settings, or check IB_PORT. "
                + describe_open_ports(self.host, skip=self.port)
            )
        else:
            reason = "connection refused" if isinstance(error, ConnectionRefusedError) else str(error) or repr(error)
            seen = f"no gateway at {where} ({reason})"
            advice = (
                f"Start TWS or IB Gateway, or try the program with `ktrdr simulator --port {self.port}`. "
                + describe_open_ports(self.host, skip=self.port)
            )
        return GatewayUnreachable(seen, advice=advice, doing="connecting to IB")

    def _on_error(self, req_id: int, code: int, text: str, _contract: object) -> None:
        if code == CLIENT_ID_IN_USE:
            self._id_in_use = True
        if req_id == -1:
            outcome = classify(code, text, now=self.now())
            self.holds = (self.holds | outcome.holds) - outcome.releases
            self._refusal = f"{text} ({code})"
            self.notices.append(f"{code} {text}")
            del self.notices[:-100]

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
            if not client.isReady():
                raise ConnectionError("not connected")
            req_id = client.getReqId()
            ended = wrapper.startReq(req_id, contract)
            try:
                send(req_id)
                result = await asyncio.wait_for(ended, timeout_s)
                if always_cancel and client.isReady():
                    cancel(req_id)
                return result
            except TimeoutError:
                if client.isReady():
                    cancel(req_id)
                raise RequestTimeout(
                    f"no answer within {timeout_s:g} s; the request was cancelled", doing=doing
                ) from None
            finally:
                # Forget the request, so that a late answer fills no list and nothing grows.
                wrapper._futures.pop(req_id, None)
                wrapper._results.pop(req_id, None)
                wrapper._reqId2Contract.pop(req_id, None)

        try:
            return self._call(run(), timeout_s + 10)
        except RequestTimeout:
            raise
        except TimeoutError:
            raise RequestTimeout(f"no answer within {timeout_s:g} s, and the connection hangs", doing=doing) from None
        except ConnectionError as error:
            raise TransientError(
                f"the connection to {self.host}:{self.port} was lost ({error})",
                doing=doing,
                advice="It is made again for the next try.",
            ) from None
        except KtrdrError:
            raise
        except Exception as error:
            if not isinstance(error, self._lib.RequestError):
                raise
            outcome = classify(error.code, error.message, now=self.now(), during_history=proves_empty, held=self.holds)
            if outcome.proven_empty:
                raise _NoData(error.message) from None
            failure = outcome.to_error(doing)
            failure.pauses_login = outcome.pauses_login
            raise failure from None


class _NoData(Exception):
    """IB said in so many words that the window holds no data."""


def describe_open_ports(host: str, *, skip: int, timeout_s: float = 0.5) -> str:
    """A sentence saying which of IB's well-known ports answer at ``host``."""
    found = []
    for port, meaning in WELL_KNOWN_PORTS.items():
        if port != skip:
            with _try_port(host, port, timeout_s) as answers:
                if answers:
                    found.append(f"{port} ({meaning})")
    if not found:
        return f"None of IB's usual ports ({', '.join(map(str, WELL_KNOWN_PORTS))}) answers at {host}."
    return f"Something answers at {host} on {', '.join(found)}: set IB_PORT."


@contextmanager
def _try_port(host: str, port: int, timeout_s: float) -> Iterator[bool]:
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except OSError:
        yield False
        return
    with connection:
        yield True
