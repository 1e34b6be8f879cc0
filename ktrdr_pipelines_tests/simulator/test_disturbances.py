"""Disturbances of the whole gateway: what clients see during a restart, a hang, an outage, or with a wrong clock."""

from __future__ import annotations

import contextlib

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import run_in_thread

from .talk import MARKET, NOW, Talk, errors, history
from .test_server import Client


def open_gateway(*rules):
    return run_in_thread(MARKET, clock=lambda: NOW, judge=None, faults=rules)


def connect_when_up(gateway):
    """A client, connected as soon as the gateway listens."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return Client(gateway)


def test_restart_drops_all_clients_and_listens_on_the_same_port_again():
    """The request that started it is not answered; a new client is served as before."""
    with open_gateway(FaultRule("restart", nth=(2,), seconds=0.05)) as gateway:
        client, other = Client(gateway, 1), Client(gateway, 2)
        client.send(*history(1))
        assert client.read()[0] == "17"
        client.send(*history(2))
        assert client.read() is None
        assert other.read() is None
        client.close()
        other.close()
        with contextlib.closing(connect_when_up(gateway)) as again:
            again.send(*history(1))
            assert again.read()[0] == "17"


def test_stopping_during_a_restart_leaves_nothing_behind():
    """A gateway can be stopped while its port is closed."""
    with open_gateway(FaultRule("restart", seconds=60)) as gateway:
        client = Client(gateway)
        client.send(*history(1))
        assert client.read() is None
        client.close()
    assert gateway.server.port == 0


def test_hang_reads_nothing_and_answers_all_of_it_later():
    """The connection stays; requests during the hang, even for the time, are answered at its end."""
    with (
        open_gateway(FaultRule("hang", nth=(1,), seconds=0.1)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.send(*history(1))
        client.send(49, 1)
        client.socket.settimeout(0.03)
        with pytest.raises(TimeoutError):
            client.read()
        client.socket.settimeout(5)
        assert {client.read()[0], client.read()[0]} == {"17", "49"}


def test_link_that_comes_back_with_its_data_answers_late():
    """1100, silence, 1102, and then the bars that were requested before and during the outage."""
    with (
        open_gateway(FaultRule("link_down", nth=(1,), seconds=0.1)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.send(*history(1))
        client.send(*history(2))
        assert errors([client.read(), client.read()]) == [(-1, 1100), (-1, 1102)]
        assert [client.read()[:2] for _ in range(2)] == [["17", "1"], ["17", "2"]]


def test_link_that_comes_back_without_its_data_has_forgotten_the_requests():
    """After 1101 open requests are not answered; new ones are."""
    with (
        open_gateway(FaultRule("link_down", nth=(1,), seconds=0.05, back=1101, meanwhile="lost")) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.send(*history(1))
        assert errors([client.read(), client.read()]) == [(-1, 1100), (-1, 1101)]
        client.send(*history(2))
        assert client.read()[:2] == ["17", "2"]


@pytest.mark.parametrize("back", [2106, 2107])
def test_broken_farm_may_answer_no_data(back):
    """2105, then a false 162 "no data" for a window full of bars."""
    rule = FaultRule("farm_down", nth=(1,), seconds=0.05, back=back, meanwhile="empty")
    with open_gateway(rule) as gateway, contextlib.closing(Client(gateway)) as client:
        client.send(*history(1))
        assert errors([client.read() for _ in range(3)]) == [(-1, 2105), (1, 162), (-1, back)]
        client.send(*history(2))
        assert client.read()[:2] == ["17", "2"]


def test_disturbance_may_start_some_time_after_a_connection():
    """Seconds after a client connected, without any request."""
    with (
        open_gateway(FaultRule("farm_down", on="connect", delay=0.02, seconds=0.02)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        assert errors([client.read(), client.read()]) == [(-1, 2105), (-1, 2106)]


def test_client_id_can_be_refused_though_it_is_free():
    """326 and a close, as often as the rule allows; afterwards the id is accepted."""
    first = Talk(faults=[FaultRule("client_id_in_use", on="connect", times=1)])
    assert errors(first.greeting) == [(-1, 326)]
    assert first.closed
    assert len(Talk(first.gateway).greeting) == 5


def test_rules_without_conditions_do_not_apply_to_new_clients():
    """Only ``on: connect`` applies to them."""
    assert len(Talk(faults=[FaultRule("pacing", on="")]).greeting) == 5


def test_stale_clock_changes_everything_that_depends_on_it():
    """The current time, and the newest bar of a request that ends now: the bar forming at that time."""
    talk = Talk(faults=[FaultRule("stale_clock", on="connect", seconds=3600)])
    assert talk.send(49, 1) == [["49", "1", str(int(NOW) - 3600)]]
    (late,), (punctual,) = talk.send(*history(1, end="")), Talk().send(*history(1, end=""))
    assert int(late[4]) == int(punctual[4]) - 1


def test_unknown_value_of_meanwhile_is_an_input_error():
    """The error names the value."""
    with pytest.raises(InputError, match="gone"):
        FaultRule("link_down", meanwhile="gone")
