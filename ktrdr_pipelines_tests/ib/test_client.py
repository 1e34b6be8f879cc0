"""The connection: every way it can fail to come about, every way an answer can go wrong, and that nothing stays behind."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from ktrdr_pipelines.domain.instruments import Instrument, forex, stock
from ktrdr_pipelines.errors import (
    BugError,
    DataError,
    GatewayUnreachable,
    KtrdrError,
    PacingError,
    PermanentError,
    RequestTimeout,
    TransientError,
)
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.codes import Outage, RequestLost
from ktrdr_pipelines.ib.wire.decoding import (
    RawBars,
    check_samples_message,
    read_error,
)
from ktrdr_pipelines.ib.wire.diagnostics import describe_open_ports
from ktrdr_pipelines.ib.wire.loop_thread import LoopThread
from ktrdr_pipelines.ib.wire.session import ClientIdInUse, HungUp
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY
from ktrdr_pipelines_tests.ib.scripted_gateway import (
    BAR,
    CANCEL_HEAD,
    CANCEL_HISTORY,
    DETAILS,
    HEAD,
    HISTORY,
    READY,
    START,
    TIME,
    Fields,
    ScriptedGateway,
    bars,
    error,
)

AAPL = stock("AAPL")
END = datetime(2024, 3, 1, 21, tzinfo=UTC)
NOON = datetime(2024, 3, 4, 17, tzinfo=UTC)
NO_DATA = "Historical Market Data Service error message:HMDS query returned no data: AAPL@SMART Trades"


def make_client(port: int, **options: Any) -> GatewayClient:
    quick = {"connect_timeout_s": 5.0, "request_timeout_s": 5.0, "probe_timeout_s": 3.0}
    return GatewayClient(
        "127.0.0.1", port, 7, **{"ports": {}, "now": lambda: NOON, "library": LIBRARY, **quick, **options}
    )


def ask_bars(client: GatewayClient, instrument: Instrument = AAPL, **options: Any) -> RawBars:
    wanted = {"end": END, "duration": "1 D", "bar_size": "1 hour", "intraday": True, "doing": "loading AAPL 1h"}
    return client.historical_bars(instrument, **{**wanted, **options})


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.01)


def live_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("ib-gateway", "asyncio_"))}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    """After every test of this file no thread of a connection is alive."""
    before = live_threads()
    yield
    wait_until(lambda: not live_threads() - before, f"left behind: {live_threads() - before}")


# -- connecting -----------------------------------------------------------------------------------------------------------


def test_connecting_sends_only_the_handshake_and_the_probe() -> None:
    """No account, position or order request goes out: start, and the question for the time."""
    with ScriptedGateway() as gateway, make_client(gateway.port) as client:
        assert client.account == "DU1234567"
        assert [fields[0] for fields in gateway.received] == [START, TIME]
        assert gateway.received_of(START)[0][2] == "7"


@pytest.mark.parametrize(
    ("ready", "account"),
    [
        (((9, 1, 1), (15, 1, "U7654321")), "U7654321"),
        (((15, 1, "DF111,DU222,DU333,"), (9, 1, 50)), "DF111"),
        ((error(-1, 2104, "Market data farm connection is OK:usfarm"), (15, 1, ",U1, U2"), (9, 1, 1)), "U1"),
        ((error(-1, 321, "The API interface is currently in Read-Only mode."), *READY), "DU1234567"),
        ((error(-1, 99999, "an unknown notice"), *READY), "DU1234567"),
    ],
)
def test_greetings_of_other_gateways_are_understood(ready: tuple[Fields, ...], account: str) -> None:
    """Order of the greeting, several accounts, stray commas and early notices do not matter."""
    with ScriptedGateway(ready=ready) as gateway, make_client(gateway.port) as client:
        assert client.account == account
        assert client.is_connected


@pytest.mark.parametrize("version", [157, 163, 165, 176, 187])
def test_bars_arrive_from_every_server_version(version: int) -> None:
    """A gateway of another version answers the same request with the same bars."""
    answers = {HISTORY: lambda fields: [bars(fields[1], BAR)]}
    with (
        ScriptedGateway(answers, hello=(version, "20240301 12:00:00 EST")) as gateway,
        make_client(gateway.port) as client,
    ):
        assert ask_bars(client).opens_s.tolist() == [1709303400]


@pytest.mark.slow
def test_a_slow_gateway_is_waited_for() -> None:
    """A gateway that takes its time to greet is no failure while it stays within the time-out."""
    late = threading.Event()
    with ScriptedGateway(hello_after=late) as gateway:
        threading.Timer(0.5, late.set).start()
        with make_client(gateway.port) as client:
            assert client.is_connected


def test_client_id_in_use_is_known_at_once() -> None:
    """326 raises ClientIdInUse long before the connect time-out, which is all the library offers, socket open or closed."""
    refusal = error(-1, 326, "Unable to connect as the client id is already in use")
    for ready in ((refusal,), (refusal, ("close",))):
        with ScriptedGateway(ready=ready) as gateway:
            begun = time.monotonic()
            with pytest.raises(ClientIdInUse, match="client id 7") as caught:
                make_client(gateway.port, connect_timeout_s=15.0).connect()
            assert caught.value.code == 326
            assert time.monotonic() - begun < 2
            wait_until(lambda gateway=gateway: not gateway.open_sockets, "the socket stays open")


def test_refused_connection_names_the_ports_that_answer(unused_port: int) -> None:
    """Nobody at the port: IB_PORT is named, and which of the usual ports something answers at."""
    with ScriptedGateway() as other:
        ports = {unused_port: "TWS live", other.port: "IB Gateway paper"}
        with pytest.raises(GatewayUnreachable) as caught:
            make_client(unused_port, ports=ports).connect()
    assert "connection refused" in str(caught.value)
    assert f"{other.port} (IB Gateway paper): set IB_PORT" in str(caught.value)
    assert f"ktrdr simulator --port {unused_port}" in str(caught.value)


def test_that_no_usual_port_answers_is_reported_too(unused_port: int) -> None:
    """Where nothing answers at all, the sentence has that."""
    assert describe_open_ports("127.0.0.1", skip=1, ports={unused_port: "TWS"}).startswith("None of IB's usual ports")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "bad..host", "x" * 80])
def test_unknown_host_names_the_setting(host: str) -> None:
    """A host that no resolver knows, or that cannot be one, points at IB_HOST."""
    client = make_client(4002)
    client.host = host
    with pytest.raises(GatewayUnreachable, match="IB_HOST"):
        client.connect()


@pytest.mark.slow
def test_a_silent_server_ends_by_the_connect_time_out() -> None:
    """Something that accepts and sends nothing is given up after the time-out, and the advice names dialog and port."""
    with (
        ScriptedGateway(hello=None) as gateway,
        pytest.raises(GatewayUnreachable, match=r"does not greet as a gateway within 0\.4 s.*dialog.*IB_PORT"),
    ):
        make_client(gateway.port, connect_timeout_s=0.4).connect()


@pytest.mark.slow
def test_a_greeting_that_stops_half_way_is_reported_as_far_as_it_came() -> None:
    """Version but no account list (a gateway before its login), with the last notice it gave."""
    ready = (error(-1, 2110, "Connectivity between TWS and server is broken"), (9, 1, 1))
    with (
        ScriptedGateway(ready=ready) as gateway,
        pytest.raises(GatewayUnreachable, match=r"server version 176.*2110 Connectivity"),
    ):
        make_client(gateway.port, connect_timeout_s=0.4).connect()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"hello": None, "raw_hello": b"HTTP/1.1 400 Bad Request\r\nConnection: keep-alive\r\n\r\n"},
            "not as a gateway",
        ),
        ({"closes": True}, "closed the connection"),
        ({"hello": (76, "20100101 12:00:00 EST")}, "server version 76"),
        ({"ready": (("close",),)}, "closed the connection"),
        ({"ready": (error(-1, 504, "Not connected"),)}, "refused: Not connected"),
    ],
)
def test_what_is_no_usable_gateway_is_known_at_once(options: dict[str, Any], words: str) -> None:
    """A web server, a forwarded port with nothing behind it, an ancient gateway: known within moments, not after the time-out."""
    with ScriptedGateway(**options) as gateway:
        begun = time.monotonic()
        with pytest.raises(GatewayUnreachable, match=words):
            make_client(gateway.port, connect_timeout_s=15.0).connect()
        assert time.monotonic() - begun < 3
        wait_until(lambda: not gateway.open_sockets, "the socket stays open")


@pytest.mark.slow
def test_a_gateway_that_greets_and_hangs_is_found_by_the_probe() -> None:
    """Connected is not alive: a gateway that does not answer the time request is unreachable, and the socket is closed."""
    with ScriptedGateway({TIME: lambda _: ()}) as gateway:
        with pytest.raises(GatewayUnreachable, match="does not answer the time request"):
            make_client(gateway.port, probe_timeout_s=0.3).connect()
        wait_until(lambda: not gateway.open_sockets, "the socket stays open")


def test_closing_twice_connecting_twice_and_asking_after_the_end() -> None:
    """close is harmless when repeated; a second connect is refused; a closed connection fails as a connection does."""
    with ScriptedGateway() as gateway:
        client = make_client(gateway.port)
        client.close()
        with client, pytest.raises(RuntimeError, match="already connected"):
            client.connect()
        client.close()
        with pytest.raises(TransientError, match="connection is closed"):
            ask_bars(client)
        with pytest.raises(GatewayUnreachable):
            client.probe()
        assert client.account == ""
        client.connect()
        assert client.is_connected
        client.close()
        wait_until(lambda: not gateway.open_sockets, "the socket stays open")


def test_an_exception_in_the_middle_leaves_nothing() -> None:
    """The block's exit closes socket and thread, whatever the block raised."""
    with ScriptedGateway() as gateway:
        with pytest.raises(ZeroDivisionError), make_client(gateway.port) as client:
            _ = 1 / (client.client_id - 7)
        wait_until(lambda: not gateway.open_sockets, "the socket stays open")


def test_closing_from_another_thread_ends_a_waiting_request() -> None:
    """A request that waits while the connection is closed fails at once as a lost connection."""
    with ScriptedGateway() as gateway, make_client(gateway.port) as client:
        threading.Thread(
            target=lambda: (wait_until(lambda: bool(gateway.received_of(HISTORY)), ""), client.close())
        ).start()
        with pytest.raises(TransientError, match="was lost"):
            ask_bars(client)


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """As where Python was started in a terminal; a script's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_cancels_the_request_on_the_wire() -> None:
    """An interrupted wait ends at once and takes its request back; the connection is still good."""

    def interrupt() -> None:
        wait_until(lambda: bool(gateway.received_of(HISTORY)), "nothing was asked")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with ScriptedGateway() as gateway, make_client(gateway.port, request_timeout_s=30.0) as client:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            ask_bars(client)
        wait_until(lambda: bool(gateway.received_of(CANCEL_HISTORY)), "not cancelled")
        client.probe()


def test_a_library_that_cannot_be_set_up_leaves_no_thread() -> None:
    """What fails before the loop runs is raised where the connection was asked for; the fixture looks for the thread."""

    def fail() -> None:
        raise ImportError("no such library")

    with pytest.raises(ImportError, match="no such library"):
        LoopThread("ib-gateway-test", fail)


@pytest.mark.slow
def test_two_hundred_connections_leave_nothing_behind() -> None:
    """Good ones, refused ids, hang-ups, web servers, unanswered probes, broken answers: no thread and no descriptor more than
    after the first of each."""
    refusal = error(-1, 326, "Unable to connect as the client id is already in use")
    plans: list[dict[str, Any]] = [
        {"answers": {HISTORY: lambda fields: [bars(fields[1], BAR)]}},
        {"ready": (refusal, ("close",))},
        {"ready": (("close",),)},
        {"hello": None, "raw_hello": b"HTTP/1.1 400 Bad Request"},
        {"answers": {TIME: lambda _: [error(-1, 504, "Not connected")]}},
        {"answers": {HISTORY: lambda _: [("close",)]}},
        {"answers": {HISTORY: lambda fields: [(17, fields[1], "broken")]}},
    ]
    with ExitStack() as running:
        gateways = [running.enter_context(ScriptedGateway(**plan)) for plan in plans]

        def cycle(gateway: ScriptedGateway) -> None:
            with suppress(KtrdrError), make_client(gateway.port) as client:
                ask_bars(client)

        def count() -> tuple[int, int]:
            wait_until(lambda: not any(gateway.open_sockets for gateway in gateways), "sockets stay open")
            wait_until(lambda: not live_threads(), "threads stay alive")
            return len(list(Path("/proc/self/fd").iterdir())), len(live_threads())

        for gateway in gateways:
            cycle(gateway)
        before = count()
        for i in range(200):
            cycle(gateways[i % len(gateways)])
        assert count() == before


# -- what goes out --------------------------------------------------------------------------------------------------------


def test_bars_are_asked_in_epoch_seconds_with_an_end_in_utc() -> None:
    """formatDate 2 and yyyymmdd-HH:MM:SS, whatever zone the end is given in; no end is IB's empty string."""
    answers = {HISTORY: lambda fields: [bars(fields[1], BAR)]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port) as client:
        ask_bars(client, end=datetime(2024, 3, 1, 16, tzinfo=timezone(timedelta(hours=-5))))
        ask_bars(client, end=None)
        ask_bars(client, end=END + timedelta(microseconds=1))
        with pytest.raises(ValueError, match="no time zone"):
            ask_bars(client, end=datetime(2024, 3, 1, 16))  # noqa: DTZ001 - what must not pass
    sent = gateway.received_of(HISTORY)
    assert [fields[15] for fields in sent] == ["20240301-21:00:00", "", "20240301-21:00:01"]
    # bar size, duration, regular hours, what to show, format of dates, keep up to date
    assert [fields[16:22] for fields in sent] == [["1 hour", "1 D", "1", "TRADES", "2", "0"]] * 3


def test_a_contract_goes_out_by_its_id_or_with_its_primary_exchange() -> None:
    """Before it is pinned the primary exchange distinguishes twins; a future asks for expired contracts too."""
    answers = {HISTORY: lambda fields: [bars(fields[1], BAR)]}
    future = Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES", expiry="202412")
    pinned = Instrument("AAPL", "STK", "SMART", "USD", primary_exchange="NASDAQ", con_id=265598)
    with ScriptedGateway(answers) as gateway, make_client(gateway.port) as client:
        for instrument in (stock("AAPL", primary_exchange="NASDAQ"), pinned, future):
            ask_bars(client, instrument)
    loose, tight, es = gateway.received_of(HISTORY)
    assert (loose[2], loose[10]) == ("0", "NASDAQ")
    assert (tight[2], tight[10]) == ("265598", "")
    assert (es[5], es[14]) == ("202412", "1")


# -- what comes back ------------------------------------------------------------------------------------------------------


def test_bars_of_the_simulator_arrive(start_gateway: Callable[..., Any]) -> None:
    """Intraday stamps are the opens in UTC; daily ones the session's date at midnight."""
    gateway = start_gateway()
    with make_client(gateway.port) as client:
        hourly = ask_bars(client)
        daily = ask_bars(client, bar_size="1 day", duration="5 D", intraday=False)
        euro = ask_bars(client, forex("EURUSD"))
    assert hourly.opens_s[0] == datetime(2024, 3, 1, 14, 30, tzinfo=UTC).timestamp()
    assert len(hourly) == 7
    assert daily.opens_s[-1] == datetime(2024, 3, 1, tzinfo=UTC).timestamp()
    assert set(euro.volume) == {-1.0}
    assert gateway.requests[0].end == "20240301-21:00:00"


def test_no_data_comes_with_ibs_text() -> None:
    """162 with "query returned no data" is an answer without bars; so is an answer that counts zero bars."""
    replies = iter([lambda i: error(i, 162, NO_DATA), lambda i: bars(i)])
    with (
        ScriptedGateway({HISTORY: lambda fields: [next(replies)(fields[1])]}) as gateway,
        make_client(gateway.port) as client,
    ):
        assert ask_bars(client).no_data_text == NO_DATA
        nothing = ask_bars(client)
    assert len(nothing) == 0
    assert nothing.no_data_text == ""  # no bars and no text: no evidence


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (162, "Historical Market Data Service error message:Historical data request pacing violation", PacingError),
        (162, "Historischer Marktdatendienst: die Abfrage ergab keine Daten", TransientError),
        (162, "\\u5386\\u53f2\\u5e02\\u573a\\u6570\\u636e\\u670d\\u52a1", TransientError),
        (162, "", TransientError),
        (162, "API historical data query cancelled: 2", TransientError),
        (162, "No market data permissions for NYSE STK", PermanentError),
        (162, "Trading TWS session is connected from a different IP address", TransientError),
        (162, "Historical Market Data Service error message:invalid step: 3 Z", BugError),
        (200, "No security definition has been found for the request", PermanentError),
        (321, "Error validating request.-'bP' : cause - duration", BugError),
        (354, "Requested market data is not subscribed.", PermanentError),
        (366, "No historical data query found for ticker id:2", TransientError),
        (420, "Invalid Real-time Query: pacing violation", PacingError),
        (504, "Not connected", GatewayUnreachable),
        (10197, "No market data during competing live session", TransientError),
        (77777, "something new", TransientError),
    ],
)
def test_an_error_ends_its_request_by_the_table(code: int, text: str, kind: type[KtrdrError]) -> None:
    """The right class with IB's code; never an empty answer; with and without the field for rejected orders."""
    ways = iter(
        [
            lambda i: (4, 2, i, code, text),
            lambda i: (4, 2, i, code, text, "", "1709303400000"),
            lambda i: (4, 2, i, code, text, ""),
        ]
    )
    with (
        ScriptedGateway({HISTORY: lambda fields: [next(ways)(fields[1])]}) as gateway,
        make_client(gateway.port) as client,
    ):
        for _ in range(3):
            with pytest.raises(KtrdrError) as caught:
                ask_bars(client)
            assert type(caught.value) is kind
            assert caught.value.code == code
            assert caught.value.doing == "loading AAPL 1h"
    assert gateway.received_of(CANCEL_HISTORY) == []


def test_escaped_texts_are_shown_in_letters() -> None:
    """What is not ASCII arrives as escapes and is read back."""
    assert read_error(["4", "2", "3", "162", "Marktdaten f\\u00fcr"]) == (3, 162, "Marktdaten für")


@pytest.mark.parametrize("code", [165, 2104, 2106, 2150, 2176, 10167])
def test_warnings_with_a_request_id_do_not_end_it(code: int) -> None:
    """A warning about a request leaves it running, and its bars arrive."""
    answers = {HISTORY: lambda fields: [error(fields[1], code, "a warning"), bars(fields[1], BAR)]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port) as client:
        assert len(ask_bars(client)) == 1
        assert client.notices[-1] == f"{code} a warning"


def test_an_end_that_was_read_without_its_zone_is_no_answer() -> None:
    """After 2174 bars follow that may be shifted by hours: they are dropped, the request is cancelled, and it is our bug."""
    answers = {HISTORY: lambda fields: [error(fields[1], 2174, "no time zone"), bars(fields[1], BAR)]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port) as client:
        with pytest.raises(BugError, match="2174"):
            ask_bars(client)
        wait_until(lambda: bool(gateway.received_of(CANCEL_HISTORY)), "the request was not cancelled")


@pytest.mark.slow
@pytest.mark.parametrize("codes", [(1100, 1102), (1100,), (2105,), (165,)])
def test_a_lost_link_ends_as_a_time_out_never_as_empty(codes: tuple[int, ...]) -> None:
    """A request that nothing comes for times out, with the last notices, and is cancelled on the wire."""
    answers = {HISTORY: lambda _: [error(-1, code, f"notice {code}") for code in codes]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port, request_timeout_s=0.3) as client:
        with pytest.raises(RequestTimeout, match=rf"no answer within 0\.3 s.*{codes[-1]} notice"):
            ask_bars(client)
        wait_until(lambda: bool(gateway.received_of(CANCEL_HISTORY)), "the request was not cancelled")
    assert gateway.received_of(CANCEL_HISTORY)[0][2] == gateway.received_of(HISTORY)[0][1]


def test_requests_that_the_link_lost_fail_at_once_and_are_cancelled() -> None:
    """After 1101 open requests are lost: no wait for the time-out, whatever kind of request; an answer that still comes belongs
    to no request."""
    lost = [error(-1, 1100, "lost"), error(-1, 1101, "Connectivity restored - data lost")]
    answers = {
        HISTORY: lambda fields: [*lost, bars(fields[1], BAR)],
        HEAD: lambda _: lost,
        DETAILS: lambda _: lost,
    }
    with ScriptedGateway(answers) as gateway, make_client(gateway.port, request_timeout_s=60.0) as client:
        for ask in (ask_bars, lambda c: c.head_timestamp(AAPL, 60.0), lambda c: c.contract_details(AAPL, 60.0)):
            with pytest.raises(RequestLost, match="1101"):
                ask(client)
        wait_until(
            lambda: bool(gateway.received_of(CANCEL_HISTORY) and gateway.received_of(CANCEL_HEAD)), "not cancelled"
        )
        client.probe()
        assert client.is_connected
        assert not client.outages.kinds


@pytest.mark.parametrize(("code", "kind"), [(326, RequestLost), (504, GatewayUnreachable), (1300, GatewayUnreachable)])
def test_a_connection_that_is_taken_away_fails_its_requests_at_once(code: int, kind: type[KtrdrError]) -> None:
    """Not after the time-out, although the socket stays open; and the connection does not pass for one any more."""
    answers = {HISTORY: lambda _: [error(-1, code, "farewell")]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port, request_timeout_s=60.0) as client:
        with pytest.raises(kind, match=str(code)):
            ask_bars(client)
        assert not client.is_connected


def test_a_client_id_refused_after_the_greeting_is_known_at_once() -> None:
    """326 instead of the time, socket open, closed, or closed without it: not taken for a gateway that hangs."""
    refusal = error(-1, 326, "Unable to connect as the client id is already in use")
    begun = time.monotonic()
    for answers in ([refusal], [refusal, ("close",)]):
        with ScriptedGateway({TIME: lambda _, answers=answers: answers}) as gateway, pytest.raises(ClientIdInUse):
            make_client(gateway.port, probe_timeout_s=60.0).connect()
    for options in ({"ready": (("close",),)}, {"answers": {TIME: lambda _: [("close",)]}}):
        with ScriptedGateway(**options) as gateway, pytest.raises(HungUp):
            make_client(gateway.port, probe_timeout_s=60.0).connect()
    assert time.monotonic() - begun < 30  # well before the probe's time-out


def test_no_data_is_not_believed_if_something_was_down_meanwhile() -> None:
    """The farm broke and came back while the request was open: "nothing there" may have been its answer from before."""
    flap = [error(-1, 2105, "broken:ushmds"), error(-1, 2106, "OK:ushmds")]
    replies = iter([flap, []])
    answers = {HISTORY: lambda fields: [*next(replies), error(fields[1], 162, NO_DATA)]}
    with ScriptedGateway(answers) as gateway, make_client(gateway.port) as client:
        with pytest.raises(TransientError, match="answered during an outage"):
            ask_bars(client)
        assert not client.outages.kinds
        assert ask_bars(client).no_data_text == NO_DATA


@pytest.mark.parametrize("reply", [lambda i: error(i, 162, NO_DATA), lambda i: bars(i)])
def test_no_data_is_not_believed_while_the_farm_is_down(reply: Callable[[str], Fields]) -> None:
    """After 2105 "nothing there" is a failure that may be tried again; after 2106 it is an answer."""
    with ScriptedGateway({HISTORY: lambda fields: [reply(fields[1])]}) as gateway, make_client(gateway.port) as client:
        gateway.send(*error(-1, 2105, "HMDS data farm connection is broken:ushmds"))
        wait_until(lambda: Outage.HISTORY in client.outages.kinds, "2105 did not arrive")
        with pytest.raises(TransientError):
            ask_bars(client)
        gateway.send(*error(-1, 2106, "HMDS data farm connection is OK:ushmds"))
        wait_until(lambda: not client.outages.kinds, "2106 did not arrive")
        assert len(ask_bars(client)) == 0


@pytest.mark.slow
def test_late_bars_never_reach_a_later_request(start_gateway: Callable[..., Any]) -> None:
    """A request that timed out is cancelled on the wire, and its bars, arriving then, belong to no request."""
    gateway = start_gateway([FaultRule("late", nth=(1,))])
    with make_client(gateway.port, request_timeout_s=0.3) as client:
        with pytest.raises(RequestTimeout):
            ask_bars(client, duration="5 D")
        wait_until(lambda: gateway.requests[-1].kind == "cancel", "not cancelled")
        client.request_timeout_s = 5.0
        assert len(ask_bars(client)) == 7
        assert client.open_requests == {}  # nothing grows with every failure


def test_bars_of_another_request_are_not_taken() -> None:
    """Bars and errors that name another request, before and after the right ones, change nothing."""
    other = ("1709303400", "9", "9", "9", "9", "9", "9", "9")

    def answer(fields: list[str]) -> list[Fields]:
        right, wrong = fields[1], int(fields[1]) + 1000
        return [bars(wrong, other), error(wrong, 162, NO_DATA), bars(right, BAR), error(right, 162, NO_DATA)]

    with ScriptedGateway({HISTORY: answer}) as gateway, make_client(gateway.port) as client:
        assert ask_bars(client).close.tolist() == [2.0]
        assert ask_bars(client).close.tolist() == [2.0]


def test_a_connection_dropped_in_the_middle_of_an_answer_is_transient(start_gateway: Callable[..., Any]) -> None:
    """Half an answer is no answer."""
    gateway = start_gateway([FaultRule("drop_after", after_bytes=150)])
    with make_client(gateway.port) as client:
        with pytest.raises(TransientError, match="was lost"):
            ask_bars(client)
        assert not client.is_connected


@pytest.mark.parametrize(
    "answer",
    [
        lambda i: (17, i, "start", "end", 2, *BAR),
        lambda i: (17, i, "start", "end", 1, *BAR, *BAR),
        lambda i: (17, i, "start", "end", 0, *BAR),
        lambda i: (17, i, "start", "end", -1),
        lambda i: (17, i, 1, "1709303400", "0", "2", "0", "1", "5", "1", "1"),
        lambda i: (17, i, 0),
        lambda i: (17, i, "start", "end", 1, *BAR[:1], "", *BAR[2:]),
        lambda i: (17, i, "start", "end", 1, "20240301 09:30:00 No/Where", *BAR[1:]),
        lambda i: (17, i, "start", "end", 1, "20240301  09:30:00", *BAR[1:]),
        lambda i: (17, i, "start", "end", 1, "20240301", *BAR[1:]),
        lambda i: (17, i, "start", "end", 1, "", *BAR[1:]),
    ],
)
def test_an_answer_that_cannot_be_read_fails_at_once(answer: Callable[[str], Fields]) -> None:
    """Wrong counts, newer layouts, stamps without a zone: an error with the rows, not a time-out, not fewer bars."""
    with (
        ScriptedGateway({HISTORY: lambda fields: [answer(fields[1])]}) as gateway,
        make_client(gateway.port, request_timeout_s=60.0) as client,
    ):
        begun = time.monotonic()
        with pytest.raises(DataError) as caught:
            ask_bars(client)
        assert time.monotonic() - begun < 5
        assert caught.value.doing == "loading AAPL 1h"
        assert client.is_connected


# -- contracts and the start of history -----------------------------------------------------------------------------------


def test_contract_details_are_read(start_gateway: Callable[..., Any]) -> None:
    """The fields that choose and describe a contract; an unknown one is an empty list."""
    for version in (157, 163, 176):
        gateway = start_gateway(server_version=version)
        with make_client(gateway.port) as client:
            (found,) = client.contract_details(AAPL)
            assert (found.symbol, found.sec_type, found.currency) == ("AAPL", "STK", "USD")
            assert found.con_id > 0
            assert found.time_zone == "America/New_York"
            assert client.contract_details(stock("NOSUCH")) == []


@pytest.mark.parametrize(
    ("code", "text", "now", "kind"),
    [
        (200, "The contract description specified for X is ambiguous", NOON, PermanentError),
        (200, "No security definition", datetime(2024, 3, 5, 5, 0, tzinfo=UTC), TransientError),
        (321, "Error validating request", NOON, BugError),
        (162, NO_DATA, NOON, PermanentError),
    ],
)
def test_a_failed_look_up_is_no_unknown_contract(code: int, text: str, now: datetime, kind: type[KtrdrError]) -> None:
    """Only a plain 200 means that there is none: not "ambiguous", and not during the nightly reset."""
    with (
        ScriptedGateway({DETAILS: lambda fields: [error(fields[2], code, text)]}) as gateway,
        make_client(gateway.port, now=lambda: now) as client,
    ):
        with pytest.raises(kind) as caught:
            client.contract_details(AAPL)
        assert caught.value.code == code


def test_contract_details_that_cannot_be_read_fail_at_once() -> None:
    """A layout that is not understood is an error, not a time-out."""
    with (
        ScriptedGateway({DETAILS: lambda fields: [(10, fields[2], "AAPL")]}) as gateway,
        make_client(gateway.port) as client,
        pytest.raises(DataError, match="cannot be read"),
    ):
        client.contract_details(AAPL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("345479400", datetime(1980, 12, 12, 14, 30, tzinfo=UTC)),
        ("19801212-14:30:00", datetime(1980, 12, 12, 14, 30, tzinfo=UTC)),
        ("19801212 09:30:00 US/Eastern", datetime(1980, 12, 12, 14, 30, tzinfo=UTC)),
        ("19801212", datetime(1980, 12, 12, tzinfo=UTC)),
        ("-239327400", None),
        ("", None),
        ("soon", None),
    ],
)
def test_head_timestamps_are_hints_in_any_spelling(text: str, expected: datetime | None) -> None:
    """Epoch seconds, words or a date; what is no time is no hint and no failure. Always cancelled after use."""
    with (
        ScriptedGateway({HEAD: lambda fields: [(88, fields[1], text)]}) as gateway,
        make_client(gateway.port) as client,
    ):
        assert client.head_timestamp(AAPL) == expected
        if expected is not None:
            wait_until(lambda: bool(gateway.received_of(CANCEL_HEAD)), "not cancelled")
            assert gateway.received_of(CANCEL_HEAD)[0][1] == gateway.received_of(HEAD)[0][1]
    assert gateway.received_of(HEAD)[0][17] == "2"


@pytest.mark.slow
def test_head_timestamp_without_an_answer_is_a_failure_and_a_refusal_is_no_hint() -> None:
    """No answer: RequestTimeout and a cancel. "No head time stamp": None. Pacing: raised."""
    replies = iter(
        [
            lambda i: [error(i, 162, "Historical Market Data Service error message:No head time stamp"), (88, i, "1")],
            lambda i: [error(i, 162, NO_DATA)],
            lambda i: [error(i, 162, "pacing violation")],
            lambda i: [],
        ]
    )
    with (
        ScriptedGateway({HEAD: lambda fields: next(replies)(fields[1])}) as gateway,
        make_client(gateway.port) as client,
    ):
        with pytest.raises(TransientError):
            client.head_timestamp(AAPL)
        assert client.head_timestamp(AAPL) is None
        with pytest.raises(PacingError):
            client.head_timestamp(AAPL)
        with pytest.raises(RequestTimeout):
            client.head_timestamp(AAPL, timeout_s=0.3)
        wait_until(lambda: bool(gateway.received_of(CANCEL_HEAD)), "not cancelled")


def test_what_may_not_be_sent_is_not_sent() -> None:
    """If ``sending`` refuses (the ledger takes its leave back), nothing goes out and nothing is cancelled."""

    def refuse() -> None:
        raise TransientError("the grant was not used in time")

    with ScriptedGateway() as gateway, make_client(gateway.port) as client:
        with pytest.raises(TransientError, match="grant was not used"):
            ask_bars(client, sending=refuse)
        client.probe()
        assert gateway.received_of(HISTORY) == gateway.received_of(CANCEL_HISTORY) == []


@pytest.mark.slow
def test_a_port_that_swallows_packets_is_given_up() -> None:
    """A port that neither accepts nor refuses is no gateway after the time-out, and is not reported to accept connections."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        try:
            for _ in range(8):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(address)
                fillers.append(filler)
            with pytest.raises(GatewayUnreachable, match="no gateway at"):
                make_client(address[1], connect_timeout_s=0.4).connect()
        finally:
            for filler in fillers:
                filler.close()


def sample(*fields: str) -> tuple[str, ...]:
    return ("79", "7", *fields)


@pytest.mark.parametrize(
    ("fields", "version", "words"),
    [
        (("1", "265598", "AAPL", "STK", "NASDAQ", "USD", "2", "CFD", "OPT", "APPLE INC", ""), 176, ""),
        (("1", "265598", "AAPL", "STK", "NASDAQ", "USD", "0"), 165, ""),
        (("0",), 176, ""),
        (("2", "265598", "AAPL", "STK", "NASDAQ", "USD", "0", "APPLE INC", ""), 176, "fewer sent"),
        (("1", "265598", "AAPL", "STK", "NASDAQ", "USD", "9", "CFD", "APPLE INC", ""), 176, "fewer sent"),
        (("1", "x", "AAPL", "STK", "NASDAQ", "USD", "0", "APPLE INC", ""), 176, "fewer sent"),
        (("1", "265598", "AAPL", "STK", "NASDAQ", "USD", "0", "APPLE INC", "", "more"), 176, "more sent"),
        (("99999",), 176, "announced"),
        (("-1",), 176, "announced"),
    ],
)
def test_an_answer_with_symbols_has_as_many_as_it_announces(fields: tuple[str, ...], version: int, words: str) -> None:
    """Missing ones, surplus ones and counts that are none are an error at once, in the layouts before and after 176."""
    if not words:
        check_samples_message(sample(*fields), version)
        return
    with pytest.raises(ValueError, match=words):
        check_samples_message(sample(*fields), version)
