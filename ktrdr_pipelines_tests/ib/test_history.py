"""Asking as IB wants to be asked: retries on schedule, one budget, one lease, and a new connection when the old one is lost."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Instrument, Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration
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
from ktrdr_pipelines.ib.client_ids import ClientIds, in_use, lease_client_id
from ktrdr_pipelines.ib.endpoint import OUTAGE_PATIENCE_S
from ktrdr_pipelines.ib.history import GatewayAddress, IBHistory
from ktrdr_pipelines.ib.pacing.ledger import open_ledger
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.fakes import TIMEOUTS
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import HandClock
from ktrdr_pipelines_tests.ib.scripted_gateway import BAR, HISTORY, READY, TIME, ScriptedGateway, bars, error
from ktrdr_pipelines_tests.ib.scripted_gateway import START as START_API

SERIES = Series(stock("AAPL"), TIMEFRAMES["1h"])
START, END = datetime(2024, 3, 1, tzinfo=UTC), datetime(2024, 3, 1, 21, tzinfo=UTC)
REQUEST = Request(Window(START, END), END, Duration(1, "D"))


class FakeTime(HandClock):
    """Moved only by the injected sleep; remembers the sleeps longer than the ledger's own polls."""

    def __init__(self) -> None:
        super().__init__()
        self.long_sleeps: list[float] = []
        self.on_sleep: Callable[[float], None] = lambda _: None

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if seconds > 1:
            self.long_sleeps.append(seconds)
        self.on_sleep(seconds)


class Bench:
    """Makes histories that share a state directory and a fake clock; closes them with the test."""

    def __init__(self, where: Path, running: ExitStack) -> None:
        self.where = where
        self.running = running
        self.time = FakeTime()
        self.waits: list[Waiting] = []

    def connect_to(self, port: int, **options: Any) -> IBHistory:
        quick = {"connect_timeout_s": 5.0, "request_timeout_s": 5.0, "probe_timeout_s": 3.0}
        address = GatewayAddress(
            "127.0.0.1", port, state_dir=self.where, **{"library": LIBRARY, **TIMEOUTS, **quick, **options}
        )
        history = IBHistory(address, self.waits.append, self.time.sleep, clock=self.time)
        return self.running.enter_context(history)

    def leased(self, port: int) -> list[int]:
        return [lease.client_id for lease in in_use(self.lease_dir(port))]

    def lease_dir(self, port: int) -> Path:
        return self.where / "ib" / f"client_ids_127_0_0_1_{port}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as running:
        yield Bench(tmp_path, running)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def refusing(code: int, text: str = "something") -> FaultRule:
    return FaultRule("error", code=code, text=text)


# -- retries --------------------------------------------------------------------------------------------------------------


def test_transient_errors_are_retried_after_15_30_and_60_seconds(bench: Bench, start_gateway: Any) -> None:
    """Three retries on the specification's schedule; the error after giving up lists what was tried, once each."""
    faults = [
        FaultRule("error", code=162, text=text, nth=(n,)) for n, text in enumerate(["odd", "odd", "new", "end"], 1)
    ]
    gateway = start_gateway(faults)
    history = bench.connect_to(gateway.port)
    with pytest.raises(TransientError) as caught:
        history.fetch(SERIES, REQUEST)
    assert bench.time.long_sleeps == [15.0, 30.0, 60.0]
    assert (history.costs.retries, history.costs.requests, len(gateway.requests)) == (3, 4, 4)
    assert caught.value.code == 162
    text = str(caught.value)
    assert "given up after 4 tries" in text
    assert text.count("odd") == text.count("new") == text.count("end") == 1
    assert caught.value.doing == f"loading AAPL 1h {REQUEST.window}"
    assert [wait.seconds for wait in bench.waits if wait.reason.startswith("retry")] == [15.0, 30.0, 60.0]


def test_a_retry_that_works_shows_in_the_counts_only(bench: Bench, start_gateway: Any) -> None:
    """Two failures and then bars: the bars, two retries, three requests."""
    gateway = start_gateway([FaultRule("error", nth=(1, 2))])
    history = bench.connect_to(gateway.port)
    assert len(history.fetch(SERIES, REQUEST)) == 7
    assert (history.costs.retries, history.costs.requests) == (2, 3)
    assert bench.time.long_sleeps == [15.0, 30.0]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (refusing(200), PermanentError),
        (refusing(354), PermanentError),
        (refusing(162, "No market data permissions for NYSE STK"), PermanentError),
        (refusing(321), BugError),
    ],
)
def test_what_will_fail_again_is_not_tried_again(
    bench: Bench, start_gateway: Any, fault: FaultRule, kind: type[KtrdrError]
) -> None:
    """Permanent refusals and our own bugs: one request, no wait."""
    gateway = start_gateway([fault])
    history = bench.connect_to(gateway.port)
    with pytest.raises(kind) as caught:
        history.fetch(SERIES, REQUEST)
    assert type(caught.value) is kind
    assert (history.costs.retries, len(gateway.requests), bench.time.long_sleeps) == (0, 1, [])
    assert "given up" not in str(caught.value)


def test_bars_that_cannot_be_read_are_not_asked_again(bench: Bench) -> None:
    """A broken answer is a DataError after one request."""
    answers = {HISTORY: lambda fields: [bars(fields[1], ("20240301 09:30:00", *BAR[1:]))]}
    with ScriptedGateway(answers) as gateway:
        history = bench.connect_to(gateway.port)
        with pytest.raises(DataError):
            history.fetch(SERIES, REQUEST)
        assert len(gateway.received_of(HISTORY)) == 1
        history.close()


def test_a_pacing_violation_pauses_other_processes(bench: Bench, start_gateway: Any) -> None:
    """One process gets a pacing violation; the ledger, as every other process opens it, pauses all of them."""
    gateway = start_gateway([FaultRule("pacing", nth=(1,))])
    history = bench.connect_to(gateway.port, retry_waits_s=())
    with pytest.raises(PacingError):
        history.fetch(SERIES, REQUEST)
    other = open_ledger(bench.where / "ib", history.address.login, bench.time)
    assert "pacing" in other.snapshot().pauses[0].reason
    other.close()
    before_s = bench.time.wall_s
    assert len(bench.connect_to(gateway.port).fetch(SERIES, REQUEST)) == 7
    assert bench.time.wall_s - before_s >= 15


@pytest.mark.parametrize(
    ("code", "text"),
    [(10197, "No market data during competing live session"), (162, "connected from a different IP address")],
)
def test_the_same_login_elsewhere_pauses_every_process_and_informs_the_user(bench: Bench, code: int, text: str) -> None:
    """Transient: every process of the login waits, and the user learns what happened and what to do about it."""
    replies = iter([lambda i: error(i, code, text)] * 2 + [lambda i: bars(i, BAR)])
    with ScriptedGateway({HISTORY: lambda fields: [next(replies)(fields[1])]}) as gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=(1.5,))
        with pytest.raises(TransientError, match="log out there"):
            history.fetch(SERIES, REQUEST)
        assert "log out there" in bench.waits[0].reason
        other = bench.connect_to(gateway.port)
        begun_s = bench.time.wall_s
        other.fetch(SERIES, Request(REQUEST.window, END, Duration(2, "D")))
        assert bench.time.wall_s - begun_s >= 30
        assert bench.waits[-1].reason.startswith("pacing: pause of all processes (the gateway answered ")
        assert text in bench.waits[-1].reason
        history.close()
        other.close()


def test_every_wait_is_in_the_log(bench: Bench, start_gateway: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Retries with their error and wait, and waits for pacing with their rule: whoever reads the log knows why it took long."""
    caplog.set_level("INFO", "ktrdr_pipelines")
    gateway = start_gateway([FaultRule("error", text="odd", nth=(1,))])
    history = bench.connect_to(gateway.port, retry_waits_s=(3.0,))
    history.fetch(SERIES, REQUEST)
    assert "(history service error): odd" in caplog.text
    assert "try 2 of 2 in 3 s" in caplog.text
    assert re.search("waiting up to 1[123] s: pacing: no identical request within 15 seconds", caplog.text)
    assert history.costs.retry_wait_s == 3.0
    assert 10 < history.costs.pacing_wait_s < 13


def test_no_gateway_at_the_first_call_fails_at_once(bench: Bench, unused_port: int) -> None:
    """A gateway that is not running is reported now, not after 105 seconds, and no lease stays behind."""
    history = bench.connect_to(unused_port)
    for call in (lambda: history.fetch(SERIES, REQUEST), lambda: history.pin(stock("AAPL")), history.connect):
        with pytest.raises(GatewayUnreachable, match="connection refused"):
            call()
    assert (bench.time.long_sleeps, history.costs.requests, bench.leased(unused_port)) == ([], 0, [])


# -- connections that break -----------------------------------------------------------------------------------------------


def test_a_dropped_connection_is_made_again_for_the_retry(bench: Bench, start_gateway: Any) -> None:
    """Half an answer, then nothing: transient, and the retry comes over a new connection."""
    gateway = start_gateway([FaultRule("drop_after", after_bytes=150, nth=(1,))])
    history = bench.connect_to(gateway.port)
    assert len(history.fetch(SERIES, REQUEST)) == 7
    assert (history.costs.retries, bench.time.long_sleeps) == (1, [15.0])
    assert len(bench.leased(gateway.port)) == 1


def test_a_gateway_that_restarts_for_minutes_is_waited_for(bench: Bench) -> None:
    """Once there was a connection, a gateway that is gone is looked for every 15 seconds; the wait is reported once, and when it
    is back the load goes on, without a retry spent. The next restart is waited for as long again."""
    gateway = run_in_thread(SyntheticMarket(), judge=False)
    with ExitStack() as running:
        running.enter_context(gateway)
        port = gateway.port
        history = bench.connect_to(port)
        history.pin(stock("AAPL"))
        client = history.connect()
        gateway.stop()
        wait_until(lambda: not client.is_connected)

        def come_back(seconds: float) -> None:
            if bench.time.long_sleeps == [15.0] * 20:
                running.enter_context(run_in_thread(SyntheticMarket(), judge=False, port=port))

        bench.time.on_sleep = come_back
        assert len(history.fetch(SERIES, REQUEST)) == 7
        assert bench.time.long_sleeps == [15.0] * 20
        assert history.costs.retries == 0
        assert history.costs.retry_wait_s == 300.0
        (reported,) = bench.waits
        assert reported.reason.startswith("the gateway is gone and may be restarting: no gateway at")
        assert reported.seconds == pytest.approx(525, abs=20)
        history.close()


def test_patience_with_a_gateway_that_stays_away_has_an_end(bench: Bench) -> None:
    """Five times the retry waits, then it is given up, with how long it was waited for; the next request fails at once."""
    gateway = run_in_thread(SyntheticMarket(), judge=False)
    with gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=(2.0, 3.0))
        history.pin(stock("AAPL"))
        client = history.connect()
        gateway.stop()
        wait_until(lambda: not client.is_connected)
        for _ in range(2):
            with pytest.raises(GatewayUnreachable) as caught:
                history.fetch(SERIES, REQUEST)
        slept = sum(bench.time.long_sleeps)
        assert 15 < slept <= 25  # less what the attempts took
        assert history.costs.retries == 0
        assert "waited" not in str(caught.value)
        assert bench.leased(gateway.port) == []


def test_a_gateway_that_left_is_not_waited_for_where_nothing_is_retried(bench: Bench) -> None:
    """Whoever switches retries off wants to know at once."""
    with ScriptedGateway() as gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=())
        client = history.connect()
    wait_until(lambda: not client.is_connected)
    with pytest.raises(GatewayUnreachable, match="connection refused"):
        history.fetch(SERIES, REQUEST)
    assert bench.time.long_sleeps == []


def test_a_machine_that_slept_asks_before_it_trusts(bench: Bench) -> None:
    """After a sleep, which only the clock that goes on meanwhile shows, a connection that looks alive is asked for the time; one
    that is dead is made again, and no request is lost on it. A clock that was set back counts as idle."""
    answers = {
        HISTORY: lambda fields: [bars(fields[1], BAR)],
        TIME: lambda _: [(49, 1, int(time.time()))] if len(gateway.received_of(TIME)) != 3 else [],
    }
    with ScriptedGateway(answers) as gateway:
        history = bench.connect_to(gateway.port, probe_timeout_s=0.3)
        client = history.connect()
        assert history.connect() is client
        assert len(gateway.received_of(TIME)) == 1
        bench.time.pass_by(3600)
        assert history.connect() is client
        assert len(gateway.received_of(TIME)) == 2
        bench.time.pass_by(-3600)
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert (gateway.connections, history.costs.retries, len(gateway.received_of(HISTORY))) == (2, 0, 1)
        history.close()


def test_requests_that_the_link_lost_are_asked_again_as_soon_as_pacing_allows(bench: Bench) -> None:
    """After 1101 no retry wait is added, but the identical request still waits its fifteen seconds in the ledger; a second loss
    waits as retries do."""
    lost = [error(-1, 1100, "lost"), error(-1, 1101, "restored - data lost")]
    replies = iter([lambda _: lost, lambda _: lost, lambda i: [bars(i, BAR)]])
    with ScriptedGateway({HISTORY: lambda fields: next(replies)(fields[1])}) as gateway:
        history = bench.connect_to(gateway.port, request_timeout_s=60.0)
        begun_s = bench.time.wall_s
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert bench.time.long_sleeps == [30.0]
        assert 45 < bench.time.wall_s - begun_s < 47
        assert [wait.seconds for wait in bench.waits if wait.reason.startswith("retry")] == [0.0, 30.0]
        assert "pacing: no identical request within 15 seconds" in [wait.reason for wait in bench.waits]
        assert (history.costs.retries, gateway.connections) == (2, 1)
        history.close()


def test_a_connection_lost_while_waiting_for_its_turn_costs_no_request(bench: Bench) -> None:
    """The gateway goes away while the ledger makes a request wait: nothing is sent into the void, and it goes out at once over
    the next connection."""
    with ScriptedGateway({HISTORY: lambda fields: [bars(fields[1], BAR)]}) as gateway:
        history = bench.connect_to(gateway.port)
        history.fetch(SERIES, REQUEST)
        client = history.connect()

        def drop(_: float) -> None:
            gateway.drop_clients()
            wait_until(lambda: not client.is_connected)

        bench.time.on_sleep = drop
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert (len(gateway.received_of(HISTORY)), history.costs.requests, history.costs.retries) == (2, 2, 1)
        assert bench.time.long_sleeps == []
        history.close()


@pytest.mark.slow
def test_a_gateway_that_hangs_and_restarts_is_ridden_out(bench: Bench) -> None:
    """Connected and silent: the request times out, the probe finds the hang, the connection is made anew, until it answers."""
    silent = {"for": 3}

    def on_time(_: list[str]) -> list[Any]:
        if gateway.received_of(HISTORY) and silent["for"]:
            silent["for"] -= 1
            return []
        return [(49, 1, int(time.time()))]

    def on_history(fields: list[str]) -> list[Any]:
        return [] if silent["for"] else [bars(fields[1], BAR)]

    with ScriptedGateway({HISTORY: on_history, TIME: on_time}) as gateway:
        history = bench.connect_to(gateway.port, request_timeout_s=0.3, probe_timeout_s=0.3)
        assert len(history.fetch(SERIES, REQUEST)) == 1
        # asked on the old connection, on two new ones that hang as well, and on the one that works
        assert (gateway.connections, history.costs.retries) == (4, 1)
        assert bench.time.long_sleeps == [15.0] * 3
        history.close()


@pytest.mark.slow
def test_after_a_time_out_a_dead_connection_is_found_out_before_the_retry(bench: Bench) -> None:
    """A gateway that stopped answering is asked for the time before it is given another request, and connected to anew."""
    alive = [True]

    def on_history(fields: list[str]) -> list[Any]:
        alive[0] = not alive[0]
        return [bars(fields[1], BAR)] if alive[0] else []

    def on_time(_: list[str]) -> list[Any]:
        return [(49, 1, int(time.time()))] if alive[0] or gateway.connections == 2 else []

    with ScriptedGateway({HISTORY: on_history, TIME: on_time}) as gateway:
        history = bench.connect_to(gateway.port, request_timeout_s=0.3, probe_timeout_s=0.3)
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert (gateway.connections, len(gateway.received_of(HISTORY)), history.costs.retries) == (2, 2, 1)
        history.close()


@pytest.mark.slow
def test_requests_that_time_out_are_given_up_as_failures(bench: Bench, start_gateway: Any) -> None:
    """Silence is never "no data": four requests, four cancels, RequestTimeout."""
    gateway = start_gateway([FaultRule("silent")])
    history = bench.connect_to(gateway.port, request_timeout_s=0.2)
    with pytest.raises(RequestTimeout, match="given up after 4 tries"):
        history.fetch(SERIES, REQUEST)
    assert [record.kind for record in gateway.requests] == ["history", "cancel"] * 4


def test_requests_wait_for_the_end_of_an_outage_of_the_history_farm(bench: Bench) -> None:
    """After 2105 nothing is sent until 2106; the wait is reported once."""
    slept: list[float] = []

    def recover(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            gateway.send(*error(-1, 2106, "HMDS data farm connection is OK:ushmds"))
        if len(slept) >= 5:
            client.probe()  # whatever was sent before has arrived now

    answers = {HISTORY: lambda fields: [bars(fields[1], BAR)]}
    with ScriptedGateway(answers) as gateway:
        history = bench.connect_to(gateway.port)
        client = history.connect()
        gateway.send(*error(-1, 2105, "HMDS data farm connection is broken:ushmds"))
        client.probe()
        bench.time.on_sleep = recover
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert slept == [1.0] * 5
        assert [wait.reason for wait in bench.waits] == ["the gateway reports an outage: history farm ushmds"]
        history.close()


def test_patience_with_a_broken_farm_has_an_end(bench: Bench) -> None:
    """A notice that is never taken back delays a load once, not every request; bars are taken, "no data" is not."""
    no_data = "HMDS query returned no data: AAPL"
    replies = iter([lambda i: bars(i, BAR), lambda i: error(i, 162, no_data)])
    with ScriptedGateway({HISTORY: lambda fields: [next(replies)(fields[1])]}) as gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=())
        client = history.connect()
        gateway.send(*error(-1, 2105, "HMDS data farm connection is broken:ushmds"))
        client.probe()
        begun_s = bench.time.wall_s
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert OUTAGE_PATIENCE_S <= bench.time.wall_s - begun_s < OUTAGE_PATIENCE_S + 20
        middle_s = bench.time.wall_s
        with pytest.raises(TransientError, match="answered during an outage"):
            history.fetch(SERIES, Request(REQUEST.window, END, Duration(2, "D")))
        assert bench.time.wall_s - middle_s < 5
        history.close()


def test_without_patience_a_broken_link_is_reported_at_once(bench: Bench) -> None:
    """An interactive request is neither sent nor waits while the gateway reports an outage of its link to IB."""
    with ScriptedGateway({}) as gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=(), outage_patience_s=0.0)
        client = history.connect()
        gateway.send(*error(-1, 1100, "Connectivity between IB and Trader Workstation has been lost."))
        client.probe()
        begun_s = bench.time.wall_s
        for ask in (lambda: history.fetch(SERIES, REQUEST), lambda: history.pin(SERIES.instrument)):
            with pytest.raises(TransientError, match="reports an outage: link between the gateway and IB"):
                ask()
        assert (bench.time.wall_s, history.costs.requests) == (begun_s, 0)
        history.close()


def test_an_idle_connection_is_asked_before_it_is_trusted(bench: Bench, start_gateway: Any) -> None:
    """A connection that ended while it was idle costs no retry: it is made anew before the request."""
    gateway = start_gateway()
    history = bench.connect_to(gateway.port)
    first = history.connect()
    assert history.connect() is first
    gateway.call(gateway.server.disconnect_clients)
    deadline = time.monotonic() + 5
    while first.is_connected:
        assert time.monotonic() < deadline
    assert len(history.fetch(SERIES, REQUEST)) == 7
    assert history.costs.retries == 0


# -- client ids -----------------------------------------------------------------------------------------------------------


def test_a_client_id_of_another_program_is_passed_over(bench: Bench, start_gateway: Any, tmp_path: Path) -> None:
    """326 takes the next id at once; each history has its own; all leases end with their connection."""
    gateway = start_gateway()
    stranger = Bench(tmp_path / "other program", bench.running).connect_to(gateway.port)
    stranger.connect()
    begun = time.monotonic()
    ours, second = bench.connect_to(gateway.port), bench.connect_to(gateway.port)
    daemon = bench.connect_to(gateway.port, client_ids=ClientIds.DAEMON)
    wished = bench.connect_to(gateway.port, client_id=77)
    ids = [history.connect().client_id for history in (stranger, ours, second, daemon, wished)]
    assert ids == [1, 2, 3, 200, 77]
    assert time.monotonic() - begun < 3
    assert bench.leased(gateway.port) == [2, 3, 77, 200]
    for history in (ours, second, daemon, wished):
        history.close()
        history.close()
    assert bench.leased(gateway.port) == []


def test_leases_end_on_every_path(bench: Bench, start_gateway: Any) -> None:
    """After an exception in the block, and after a request that failed: the id can be leased again, the gateway has it free."""
    gateway = start_gateway([refusing(200)])
    with pytest.raises(PermanentError), bench.connect_to(gateway.port) as history:
        history.fetch(SERIES, REQUEST)
    with pytest.raises(ZeroDivisionError), bench.connect_to(gateway.port) as history:
        _ = 1 / (history.connect().client_id - 1)
    assert bench.leased(gateway.port) == []
    with lease_client_id(ClientIds.PERSON, bench.lease_dir(gateway.port)) as lease:
        assert lease.client_id == 1
    deadline = time.monotonic() + 5
    while gateway.server.gateway.client_ids:
        assert time.monotonic() < deadline, "the gateway still knows the client"


@pytest.mark.parametrize("refuse_by", ["late word", "hanging up"])
def test_the_next_id_is_taken_however_the_gateway_refuses(bench: Bench, refuse_by: str) -> None:
    """326 that comes after the greeting, and a gateway that only closes the connection: the next id at once, no time-out."""

    def answer(fields: list[str]) -> list[Any]:
        if gateway.received_of(START_API)[-1][2] != "1":
            return READY if fields[0] == START_API else [(49, 1, int(time.time()))]
        if refuse_by == "hanging up":
            return [("close",)]
        late = error(-1, 326, "Unable to connect as the client id is already in use")
        return READY if fields[0] == START_API else [late, ("close",)]

    with ScriptedGateway({START_API: answer, TIME: answer}) as gateway:
        history = bench.connect_to(gateway.port, connect_timeout_s=60.0, probe_timeout_s=60.0)
        assert history.connect().client_id == 2
        assert bench.leased(gateway.port) == [2]
        assert (gateway.connections, bench.time.long_sleeps) == (2, [])
        history.close()


def test_a_gateway_that_hangs_up_on_every_id_is_not_tried_fifty_times(bench: Bench) -> None:
    """A trusted-IP rule looks like a refused id: one other id is tried, then the error is raised."""
    with ScriptedGateway(ready=(("close",),)) as gateway:
        history = bench.connect_to(gateway.port)
        with pytest.raises(GatewayUnreachable, match="trusted IP"):
            history.connect()
        assert gateway.connections == 2
        assert bench.leased(gateway.port) == []


def test_a_zombie_of_our_own_is_passed_over(bench: Bench) -> None:
    """A connection taken away by 326 in the middle of a request, and the gateway still holding its id: the next one, at once."""
    taken: list[str] = []

    def start(fields: list[str]) -> list[Any]:
        refusal = error(-1, 326, "Unable to connect as the client id is already in use")
        return [refusal, ("close",)] if fields[2] in taken else list(READY)

    def history_request(fields: list[str]) -> list[Any]:
        if taken:
            return [bars(fields[1], BAR)]
        taken.append("1")
        return [error(-1, 326, "Unable to connect as the client id is already in use")]

    with ScriptedGateway({START_API: start, HISTORY: history_request}) as gateway:
        history = bench.connect_to(gateway.port, request_timeout_s=60.0)
        assert len(history.fetch(SERIES, REQUEST)) == 1
        assert [fields[2] for fields in gateway.received_of(START_API)] == ["1", "1", "2"]
        assert bench.time.long_sleeps == []  # no retry wait: only the ledger's
        history.close()


@pytest.mark.slow
def test_when_every_id_is_taken_that_is_reported(bench: Bench) -> None:
    """A gateway that refuses every id: each is tried once and quickly, then the range is named."""
    refused = ScriptedGateway(
        ready=(error(-1, 326, "Unable to connect as the client id is already in use"), ("close",))
    )
    with refused as gateway:
        history = bench.connect_to(gateway.port, retry_waits_s=(), client_ids=ClientIds.PERSON)
        with pytest.raises(TransientError, match="all client ids from 1 to 50 are in use"):
            history.connect()
        assert gateway.connections == 50
        assert bench.leased(gateway.port) == []


# -- what is counted and remembered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("account", "source"),
    [
        ("SIM0000001", "simulator"),
        ("DU1234567", "paper"),
        ("DF7654321", "paper"),
        ("U1234567", "live"),
        ("F99", "live"),
    ],
)
def test_the_source_follows_the_account(bench: Bench, account: str, source: str) -> None:
    """Simulator, paper and live differ by the account id, which no setting can get wrong."""
    with ScriptedGateway(ready=((15, 1, f"{account},"), (9, 1, 1))) as gateway:
        history = bench.connect_to(gateway.port)
        history.connect()
        assert history.source == source
        history.close()


def test_the_start_of_history_is_asked_once(bench: Bench, start_gateway: Any) -> None:
    """It counts as a history request, so the answer is kept."""
    gateway = start_gateway()
    history = bench.connect_to(gateway.port, retry_waits_s=())
    head = history.find_head(stock("AAPL"))
    assert head is not None
    assert history.find_head(stock("AAPL")) == head
    assert history.costs.requests == 1
    assert [record.kind for record in gateway.requests] == ["head"]


def test_a_start_of_history_that_cannot_be_had_fails_no_load(bench: Bench, start_gateway: Any) -> None:
    """It is a hint: whatever the gateway answers instead, it is asked for once, without retries, and the load goes on without."""
    gateway = start_gateway([FaultRule("error", on="head", code=162, text="No head time stamp")])
    history = bench.connect_to(gateway.port)
    assert history.find_head(stock("AAPL")) is None
    assert history.find_head(stock("AAPL")) is None
    assert len(gateway.requests) == 1


def test_contract_look_ups_are_kept_and_not_counted(bench: Bench, start_gateway: Any) -> None:
    """A contract is looked up once, costs nothing of the budget, and a conId decides even if the rest is equal."""
    gateway = start_gateway()
    history = bench.connect_to(gateway.port)
    pinned = history.pin(stock("AAPL"))
    assert history.pin(stock("AAPL")) is pinned
    assert (history.costs.requests, pinned.time_zone) == (0, "America/New_York")
    other = Instrument("AAPL", "STK", "SMART", "USD", con_id=pinned.con_id + 987654)
    with pytest.raises(PermanentError, match="looking up AAPL"):
        history.pin(other)


def test_no_request_goes_out_unpaced(bench: Bench, start_gateway: Any) -> None:
    """Nine requests of one contract: never six in two seconds, and what waited is counted."""
    gateway = start_gateway()
    history = bench.connect_to(gateway.port)
    for days in range(1, 10):
        history.fetch(SERIES, Request(REQUEST.window, END, Duration(days, "D")))
    assert history.costs.requests == len(gateway.requests) == 9
    assert history.costs.pacing_wait_s == pytest.approx(2.5, abs=0.6)
    assert [wait.reason for wait in bench.waits] == [
        "pacing: fewer than six requests for one contract within 2 seconds"
    ]


@pytest.mark.parametrize(("behind_s", "least_s"), [(0, 0), (-3600, 0), (3600, 3600)])
def test_how_far_the_gateways_clock_is_behind_is_known_once_connected(
    bench: Bench, start_gateway: Any, behind_s: int, least_s: int
) -> None:
    """Its own time decides which bars are complete; whole seconds and the way of the answer are no lag."""
    gateway = start_gateway(clock=lambda: time.time() - behind_s)
    history = bench.connect_to(gateway.port)
    assert history.clock_lag_s == 0
    history.pin(stock("AAPL"))
    assert least_s <= history.clock_lag_s < least_s + 30
