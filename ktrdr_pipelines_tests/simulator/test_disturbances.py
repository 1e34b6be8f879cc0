"""Disturbances of the whole gateway: what clients see while it is down, hangs, has lost IB, or tells a wrong time."""

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
    """A client as soon as somebody listens on the gateway's port."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return Client(gateway)


def test_restart_drops_everybody_and_listens_on_the_same_port_again():
    """The request that it began with is not answered; a new client is, as if nothing had been."""
    with open_gateway(FaultRule("restart", nth=(2,), seconds=0.05)) as gateway:
        client, other = Client(gateway, 1), Client(gateway, 2)
        client.say(*history(1))
        assert client.read()[0] == "17"
        client.say(*history(2))
        assert client.read() is None
        assert other.read() is None
        client.close()
        other.close()
        with contextlib.closing(connect_when_up(gateway)) as again:
            again.say(*history(1))
            assert again.read()[0] == "17"


def test_stopping_during_a_restart_leaves_nothing_behind():
    """A gateway that is down can be ended like any other."""
    with open_gateway(FaultRule("restart", seconds=60)) as gateway:
        client = Client(gateway)
        client.say(*history(1))
        assert client.read() is None
        client.close()
    assert gateway.server.port == 0


def test_hang_reads_nothing_and_answers_all_of_it_later():
    """The connection stays; what was asked meanwhile, even the time, is answered at the end."""
    with (
        open_gateway(FaultRule("hang", nth=(1,), seconds=0.1)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.say(*history(1))
        client.say(49, 1)
        client.socket.settimeout(0.03)
        with pytest.raises(TimeoutError):
            client.read()
        client.socket.settimeout(5)
        assert {client.read()[0], client.read()[0]} == {"17", "49"}


def test_link_that_comes_back_with_its_data_answers_late():
    """1100, silence, 1102, and then the bars that were asked for before and during the outage."""
    with (
        open_gateway(FaultRule("link_down", nth=(1,), seconds=0.1)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.say(*history(1))
        client.say(*history(2))
        assert errors([client.read(), client.read()]) == [(-1, 1100), (-1, 1102)]
        assert [client.read()[:2] for _ in range(2)] == [["17", "1"], ["17", "2"]]


def test_link_that_comes_back_without_its_data_has_forgotten_the_requests():
    """After 1101 nothing that was open is answered; what is asked then is."""
    with (
        open_gateway(FaultRule("link_down", nth=(1,), seconds=0.05, back=1101, meanwhile="lost")) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        client.say(*history(1))
        assert errors([client.read(), client.read()]) == [(-1, 1100), (-1, 1101)]
        client.say(*history(2))
        assert client.read()[:2] == ["17", "2"]


@pytest.mark.parametrize("back", [2106, 2107])
def test_broken_farm_may_say_that_there_is_no_data(back):
    """The lie that costs loaders their bars: 2105, then 162 "no data" for a window full of bars."""
    rule = FaultRule("farm_down", nth=(1,), seconds=0.05, back=back, meanwhile="empty")
    with open_gateway(rule) as gateway, contextlib.closing(Client(gateway)) as client:
        client.say(*history(1))
        assert errors([client.read() for _ in range(3)]) == [(-1, 2105), (1, 162), (-1, back)]
        client.say(*history(2))
        assert client.read()[:2] == ["17", "2"]


def test_disturbance_may_begin_some_time_after_a_client_came():
    """For trying by hand: seconds after the connection, without any request."""
    with (
        open_gateway(FaultRule("farm_down", on="connect", delay=0.02, seconds=0.02)) as gateway,
        contextlib.closing(Client(gateway)) as client,
    ):
        assert errors([client.read(), client.read()]) == [(-1, 2105), (-1, 2106)]


def test_client_id_can_be_called_taken_though_it_is_not():
    """326 and the end of the connection, so often as the rule says; the id is free afterwards."""
    first = Talk(faults=[FaultRule("client_id_in_use", on="connect", times=1)])
    assert errors(first.greeting) == [(-1, 326)]
    assert first.closed
    assert len(Talk(first.gateway).greeting) == 5


def test_rules_for_anything_asked_leave_connecting_alone():
    """Who wants to spoil connections has to say so."""
    assert len(Talk(faults=[FaultRule("pacing", on="")]).greeting) == 5


def test_stale_clock_is_behind_in_all_that_depends_on_it():
    """The current time, and the newest bar of a request that ends now, which is the one that forms then."""
    talk = Talk(faults=[FaultRule("stale_clock", on="connect", seconds=3600)])
    assert talk.say(49, 1) == [["49", "1", str(int(NOW) - 3600)]]
    (late,), (punctual,) = talk.say(*history(1, end="")), Talk().say(*history(1, end=""))
    assert int(late[4]) == int(punctual[4]) - 1


def test_unknown_fate_of_requests_is_one_clear_error():
    """The words that exist are named."""
    with pytest.raises(InputError, match="meanwhile cannot be 'gone'"):
        FaultRule("link_down", meanwhile="gone")
