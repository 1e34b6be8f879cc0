"""Promises of the questions about the gateway: really asked, bounded in time, and a failure is never reported as an absence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from ktrdr_pipelines.api.models import Status
from ktrdr_pipelines.cli.ib_tables import describe_status
from ktrdr_pipelines.domain.work_class import WorkClass
from ktrdr_pipelines.errors import InputError, PermanentError, TransientError
from ktrdr_pipelines.ib.client_ids import ClientIds, lease_client_id
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.ib.pacing.rules import Ask, Wait, contract_text, head_ask
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.services.gateway.cleanup import cleanup
from ktrdr_pipelines.services.gateway.config import gateway_config
from ktrdr_pipelines.services.gateway.health import gateway_health
from ktrdr_pipelines.services.gateway.question import quick_address
from ktrdr_pipelines.services.gateway.ranges import data_ranges
from ktrdr_pipelines.services.gateway.status import Farm, gateway_status, read_farms
from ktrdr_pipelines.services.gateway.symbols import discover_symbol, look_up
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines_tests.conftest import StartGateway

MakeSettings = Callable[..., Settings]

HOLD_AN_ID = """
import sys, time
from pathlib import Path
from ktrdr_pipelines.ib.client_ids import ClientIds, lease_client_id
with lease_client_id(ClientIds.PERSON, Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

HOLD_UNTIL_TOLD = """
import sys, time
from pathlib import Path
from ktrdr_pipelines.ib.client_ids import ClientIds, lease_client_id
with lease_client_id(ClientIds.PERSON, Path(sys.argv[1])):
    try:
        print("held", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.readline()
"""


def test_the_status_has_connection_ids_pacing_and_farms(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """And the question's own client id is not among those in use."""
    settings = make_settings(start_gateway().port)
    with lease_client_id(ClientIds.PERSON, GatewayResource.of(settings).address().leases_dir):
        status = gateway_status(settings)
    assert status.connection.connected
    assert (status.connection.source, status.connection.link_to_ib) == ("simulator", True)
    assert [leased.pid for leased in status.client_ids_in_use] == [os.getpid()]
    assert {(farm.kind, farm.state) for farm in status.connection.farms} >= {("history", "ok"), ("contracts", "ok")}
    assert status.pacing is not None
    assert (status.pacing.used, status.pacing.limit) == (0, 60)


def test_without_a_gateway_the_status_says_so_and_health_is_bad(make_settings: MakeSettings, unused_port: int) -> None:
    """The rest is reported."""
    settings = make_settings(unused_port)
    status = gateway_status(settings)
    assert not status.connection.connected
    assert status.connection.problem is not None
    assert status.connection.problem.kind == "gateway"
    assert status.pacing is not None
    health = gateway_health(settings)
    assert not health.healthy
    assert {check.name: check.ok for check in health.checks} == {
        "connection": False, "pacing ledger": True, "data folder": True,
    }  # fmt: skip


def test_the_status_shows_the_classes_and_who_waits(make_settings: MakeSettings, unused_port: int) -> None:
    """After its first burst a backfill waits for the reserve: shown with its symbol, process and expected time."""
    settings = make_settings(unused_port)
    apple = head_ask(
        contract=contract_text(sec_type="STK", ib_symbol="AAPL", currency="USD"), exchange="SMART", what_to_show="TRADES",
        use_rth=True,
    )  # fmt: skip
    with IBHistory(quick_address(settings)) as history:
        for number in range(50):
            with history.ledger.acquire(Ask(f"{number}", f"{number}"), work=WorkClass.BACKFILL) as grant:
                grant.sent()
        with history.ledger.line_up(apple, work=WorkClass.BACKFILL) as place:
            assert isinstance(place.look(), Wait)
            status = gateway_status(settings)
    assert status.pacing is not None
    assert [(each.work, each.used, each.waiting, each.kept_from) for each in status.pacing.classes] == [
        ("tail", 0, 0, 0), ("interactive", 0, 0, 3), ("backfill", 50, 1, 10),
    ]  # fmt: skip
    (waiting,) = status.pacing.queue
    assert (waiting.work, waiting.symbol, waiting.pid, waiting.host) == ("backfill", "AAPL", os.getpid(), "")
    assert 10 < (waiting.until - waiting.since).total_seconds() < 60
    shown = Status.model_validate(status.as_dict())
    assert shown.pacing is not None
    assert shown.pacing.queue[0].symbol == "AAPL"
    assert any("backfill" in line and "AAPL" in line for line in describe_status(status))


def test_health_asks_the_gateway(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    """A data folder that refuses is no health, though the gateway is well. (/proc refuses even root.)"""
    gateway = start_gateway()
    well = make_settings(gateway.port)
    assert gateway_health(well).healthy
    assert list(well.data_dir.iterdir()) == [], "a question left something behind"
    health = gateway_health(make_settings(gateway.port, data_dir="/proc/ktrdr"))
    assert [check.name for check in health.checks if not check.ok] == ["data folder"]
    assert health.problem is not None
    assert health.problem.kind == "store"
    assert health.problem.message.startswith("trying the data folder: /proc/ktrdr")


def test_farms_are_shown_as_last_reported() -> None:
    """The newest word about each counts; other notices are none."""
    said = ["2106 HMDS data farm connection is OK:ushmds", "2105 HMDS data farm connection is broken:ushmds",
            "2104 Market data farm connection is OK:usfarm", "1100 lost", "2107 HMDS inactive:euhmds", "no code"]  # fmt: skip
    assert read_farms(said) == [
        Farm("euhmds", "history", "idle"), Farm("ushmds", "history", "broken"), Farm("usfarm", "quotes", "ok"),
    ]  # fmt: skip


def test_the_configuration_shows_no_password(make_settings: MakeSettings) -> None:
    """Neither the ledger's nor the API's."""
    settings = make_settings(1, ledger_url="postgresql+psycopg://me:hidden-word@db/x", api_token="hidden-token")
    shown = str(gateway_config(settings).as_dict())
    assert "hidden-word" not in shown
    assert "hidden-token" not in shown
    assert "hidden-token" not in repr(settings)


def test_ranges_tell_where_history_begins_and_ends(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    """One request for each instrument, however many timeframes; a symbol that is none is a problem, not an absence."""
    gateway = start_gateway()
    found = data_ranges(make_settings(gateway.port), ["AAPL", "NOSUCH"], ["1d", "1h", "30s"])
    assert found.requests_made == 1
    assert [(each.symbol, each.timeframe, each.problem is None) for each in found.ranges] == [
        ("AAPL", "1d", True), ("AAPL", "1h", True), ("AAPL", "30s", True),
        ("NOSUCH", "1d", False), ("NOSUCH", "1h", False), ("NOSUCH", "30s", False),
    ]  # fmt: skip
    daily, _, seconds = found.ranges[:3]
    assert daily.earliest is not None
    assert daily.earliest.year == 1999
    assert daily.latest is not None
    assert seconds.earliest is not None
    assert (datetime.now(UTC) - seconds.earliest).days in (182, 183)


def test_the_same_ranges_again_take_no_request(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    """Within fifteen seconds IB would not answer it, and the start of a history hardly moves."""
    settings = make_settings(start_gateway().port)
    first, again = (data_ranges(settings, ["AAPL", "KO"], ["1d"]) for _ in range(2))
    assert [each.problem for each in again.ranges] == [None, None]
    assert [each.earliest for each in again.ranges] == [each.earliest for each in first.ranges]
    assert None not in [each.earliest for each in again.ranges]
    assert (first.requests_made, again.requests_made) == (2, 0)


def test_a_symbol_that_ib_does_not_know_is_reported_alike_at_every_entry_point(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """What it was tried as and what is like it, also while that IB knows none is only remembered."""
    settings = make_settings(start_gateway().port)
    messages = []
    for ask in (discover_symbol, discover_symbol, look_up):
        with pytest.raises(PermanentError) as caught:
            ask(settings, "APPL")
        messages.append(str(caught.value))
    assert messages[0] == messages[2]
    assert "(tried as STK APPL USD" in messages[0]
    assert " )" not in messages[0]
    for text in messages:
        assert "; similar: AAPL STK" in text
    assert "asked again after" in messages[1]


def test_a_head_timestamp_that_fails_is_a_problem_and_not_none(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """A failure is never read as "there is none"."""
    gateway = start_gateway([FaultRule(kind="error", on="head", code=321, text="Server error when validating")])
    (found,) = data_ranges(make_settings(gateway.port), ["AAPL"], ["1d"]).ranges
    assert found.earliest is None
    assert found.problem is not None


def test_without_a_gateway_ranges_are_problems_at_once(make_settings: MakeSettings, unused_port: int) -> None:
    """One try for all of them."""
    found = data_ranges(make_settings(unused_port))
    assert len(found.ranges) == 20
    assert {each.problem.kind for each in found.ranges if each.problem} == {"gateway"}


def test_too_many_ranges_at_once_are_refused(make_settings: MakeSettings) -> None:
    """They would take the budget of everybody else."""
    with pytest.raises(InputError, match="21 instruments"):
        data_ranges(make_settings(1), [f"A{i}" for i in range(21)])


def test_discovery_asks_ib(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    """A pair is a pair, a stock of the universe is that one, with IB's id."""
    settings = make_settings(start_gateway().port)
    assert discover_symbol(settings, "gbp.usd").sec_type == "CASH"
    assert discover_symbol(settings, "AAPL").con_id > 0


def test_while_the_link_is_down_questions_fail_at_once(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """Loads ride it out for minutes; a question about a symbol ends with the reason why there is no answer."""
    settings = make_settings(start_gateway([FaultRule(kind="link_down", on="connect", seconds=600)]).port)
    for ask in (lambda: discover_symbol(settings, "KO"), lambda: look_up(settings, "KO")):
        with pytest.raises(TransientError, match="reports an outage: link between the gateway and IB"):
            ask()
    (found,) = data_ranges(settings, ["KO"], ["1d"]).ranges
    assert found.problem is not None
    assert "reports an outage" in found.problem.message
    assert gateway_status(settings).connection.link_to_ib is False


@pytest.mark.slow
def test_cleanup_does_not_call_its_own_questions_disconnected(make_settings: MakeSettings) -> None:
    """An id of this process that is given back meanwhile was not taken from anybody."""
    settings = make_settings(1)
    leases_dir = GatewayResource.of(settings).address().leases_dir
    holder = subprocess.Popen([sys.executable, "-c", HOLD_UNTIL_TOLD, str(leases_dir)], stdout=subprocess.PIPE, text=True,
                              stdin=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdin is not None

    def finish_question() -> None:
        assert holder.stdout.readline() == "interrupted\n"  # type: ignore[union-attr]
        own.release()
        print("go", file=holder.stdin, flush=True)

    try:
        assert holder.stdout.readline() == "held\n"
        own = lease_client_id(ClientIds.PERSON, leases_dir)
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(finish_question)
            done = cleanup(settings)
            finished.result(10)
        assert [leased.pid for leased in done.disconnected] == [holder.pid]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stdin.close()


@pytest.mark.slow
def test_cleanup_interrupts_who_holds_an_id_and_not_itself(make_settings: MakeSettings) -> None:
    """Another process lets go, as by Ctrl-C; the one that asks keeps its own."""
    settings = make_settings(1)
    leases_dir = GatewayResource.of(settings).address().leases_dir
    holder = subprocess.Popen([sys.executable, "-c", HOLD_AN_ID, str(leases_dir)], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        done = cleanup(settings)
        assert [leased.pid for leased in done.disconnected] == [holder.pid]
        assert done.still_in_use == ()
        assert holder.wait(10) in (-signal.SIGINT, 1, 130)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
