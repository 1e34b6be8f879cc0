"""Clients that send whatever they like: the simulated gateway serves the others correctly, holds little, leaves nothing.

Messages are made from seeds; a failing case names its seed. What sane clients may do is in `test_client_session.py` and
`test_server.py`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import struct
import threading
import tracemalloc
from collections import Counter
from random import Random

import pytest

from ktrdr_pipelines.simulator import server as server_module
from ktrdr_pipelines.simulator.client_session import Session, State
from ktrdr_pipelines.simulator.gateway import Gateway
from ktrdr_pipelines.simulator.messages import PARSERS
from ktrdr_pipelines.simulator.server import MAX_STRANGERS, run_in_thread
from ktrdr_pipelines.simulator.wire import LENGTH_BYTES, MAX_ANSWER_BYTES, MAX_FRAME_BYTES, encode, frame

from .talk import AAPL, EURUSD, MARKET, NOW, FaultRule, Talk, errors, head, history
from .test_server import Client, wait_until

NUMBERS = (
    "",
    "0",
    "-1",
    "2",
    "9" * 30,
    "9" * 5000,
    "nan",
    "inf",
    "1e309",
    "1.5",
    "abc",
    "²",
    "１",
    "1_0",
    " 1",
    "true",
)
TEXTS = (
    "\x1b[2J",
    "é",
    "\\ud800",
    "x" * 2000,
    "TRADES",
    "SCHEDULE",
    "BID_ASK",
    "BAG",
    "FUT",
    "CONTFUT",
    "CASH",
    "EUR",
    "202412",
)
ENDS = (
    *(
        "20240230-00:00:00",
        "99999999-99:99:99",
        "00010101-00:00:00",
        "99991231-23:59:59",
        "٢٠٢٤٠٣٠١-10:00:00",
        "10:00:00",
    ),
    *("10:00:00 Mars/Base", "10:00:00 America", "20240301 10:00:00 Mars/Base", "20240301 10:00:00 ../../etc/passwd"),
    *("00010101 00:00:00 Asia/Tokyo", "99991231 23:59:59 Etc/GMT+12", "20240301 10:00:00 " + "Z" * 300, " " * 500),
)
LENGTHS = (
    "999999999 D",
    "68 Y",
    "100 Y",
    "1 S",
    "86400 S",
    "12 M",
    "52 W",
    "0 D",
    "-1 D",
    "1 day",
    "1 secs",
    "1 min",
    "1M",
)
EVIL = (*NUMBERS, *TEXTS, *ENDS, *LENGTHS)
OPENINGS = (
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
    b"API",
    b"APX\0",
    b"\0\0\0\0",
    b"API\0",
    b"API\0" + b"\xff" * 8,
)
HELLO = b"API\0" + frame(b"v157..176")


def make_message(random: Random) -> bytes:
    """One frame: a request with fields changed, lost or added; or nothing of the kind."""
    req_id = random.randrange(5)
    fields = random.choice(
        (
            history(req_id),
            history(req_id, EURUSD, what="MIDPOINT", rth=False),
            history(req_id, what="SCHEDULE", size="1 day", duration="1 M"),
            history(req_id, end="", keep=True),
            head(req_id),
            (9, 8, req_id, *AAPL, "", ""),
            (81, req_id, "AAP"),
            (25, 1, req_id),
            (71, 2, 1, ""),
            (random.choice(list(PARSERS)), 1, req_id, *AAPL),
            (random.randrange(-5, 300), *AAPL),
        )
    )
    changed = list(fields)
    for _ in range(random.randrange(4)):
        at = random.randrange(len(changed))
        match random.randrange(4):
            case 0:
                del changed[at]
            case 1:
                changed.insert(at, random.choice(EVIL))
            case _:
                changed[at] = random.choice(EVIL)
        changed = changed or [""]
    if random.random() < 0.05:
        return frame(random.randbytes(random.randrange(1, 60)) + b"\0")
    return encode(*changed)


def make_attack(random: Random) -> bytes:
    """Everything one connection sends."""
    match random.randrange(6):
        case 0:
            return random.choice(OPENINGS) + random.randbytes(random.randrange(100))
        case 1:
            return (
                HELLO + random.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", (MAX_FRAME_BYTES + 1).to_bytes(4, "big"))) * 50
            )
        case 2 if random.random() < 0.1:
            return HELLO + (1 << 20).to_bytes(4, "big") + bytes(3 * MAX_FRAME_BYTES)
        case 2:
            return HELLO + encode(71, 2, random.randrange(100, 120), "") + encode(*history(1))[: random.randrange(80)]
        case 3:
            return b"API\0" + frame(
                random.choice((b"v1", b"v999999..1", b"v100..", b"", b"\0", b"v\xff", b"v" + b"9" * 5000)) + b"\0"
            )
        case _:
            start = encode(71, 2, random.choice((*range(100, 130), *NUMBERS)), "")
            return HELLO + start + b"".join(make_message(random) for _ in range(random.randrange(40)))


@pytest.fixture(autouse=True)
def nothing_left_behind(caplog):
    """No exception is logged, no thread stays."""
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING):
        yield
    assert not [record.getMessage() for record in caplog.records if record.exc_info or record.name == "asyncio"]
    assert not set(threading.enumerate()) - before


@pytest.fixture
def gateway():
    with run_in_thread(MARKET, clock=lambda: NOW, judge=None) as running:
        yield running


def counts(gateway):
    """Everything of a gateway that connections could leave behind; call it in the gateway's thread."""
    return (
        len(gateway.server._connections),
        len(gateway.server.gateway.client_ids),
        gateway.server.gateway.open_requests,
    )


# -- without sockets -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_message_is_answered_with_an_exception(seed):
    """3000 messages a seed, from clients of all versions: each is served, refused or the end of its connection, and a sane
    client of the same gateway gets what it always gets."""
    random = Random(seed)
    shared = Gateway(MARKET)
    sane = Talk(shared, client_id=77)
    expected = sane.say(*history(1))
    outcomes = Counter()
    for _ in range(150):
        client = Talk(shared, version=random.choice((100, 123, 124, 140, 157, 163, 176, 178)), client_id=1)
        for _ in range(20):
            client.now += 1
            answers = client.feed(make_message(random))
            outcomes["closed" if client.closed else "refused" if errors(answers) else "served"] += 1
            assert all(int(answer[0]) > 0 for answer in answers)
        client.session.release()
        sane.now += 1
        assert sane.say(*history(1)) == expected
        assert shared.client_ids == {77}
        assert shared.open_requests == 0
    assert min(outcomes["refused"], outcomes["served"]) > 500


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_any_kind_are_bounded_and_end_in_a_close_or_silence(seed):
    """500 streams a seed, cut anywhere: little is held of each, and nothing once it is closed."""
    random = Random(seed)
    shared = Gateway(MARKET)
    for _ in range(500):
        session = Session(shared)
        stream = make_attack(random) if random.random() < 0.7 else random.randbytes(random.randrange(3000))
        while stream:
            size = random.randrange(1, 400)
            session.receive(stream[:size], NOW)
            stream = stream[size:]
            held = len(session._prefix) + session._frames.pending_bytes
            assert held <= MAX_FRAME_BYTES + LENGTH_BYTES
            assert session.state is not State.CLOSED or held <= LENGTH_BYTES + 400 + 5000
        session.release()
    assert not shared.client_ids
    assert not shared.open_requests


@pytest.mark.parametrize("end", ENDS)
def test_ends_with_odd_zones_and_dates_are_refused_or_served(end):
    """No date, time or zone is more than a refusal: folders of the zone database and times without a date included."""
    (answer,) = (message for message in Talk().say(*history(1, end=end)) if message[0] == "17" or message[3] != "2174")
    assert answer[0] == "17" or answer[3] in ("10314", "162")


@pytest.mark.parametrize(
    ("contract", "what", "size", "duration"),
    [
        (AAPL, "TRADES", "1 min", "68 Y"),
        (EURUSD, "MIDPOINT", "1 min", "1 Y"),
        (EURUSD, "MIDPOINT", "5 mins", "68 Y"),
        (EURUSD, "MIDPOINT", "1 min", "6 M"),
        (EURUSD, "MIDPOINT", "1 hour", "10 Y"),
    ],
)
def test_no_answer_is_longer_than_a_message_may_be(contract, what, size, duration):
    """Years of minutes are refused before they are looked up; whatever is sent fits into what IBKR's clients take."""
    talk = Talk()
    tracemalloc.start()
    try:
        data = talk.session.receive(
            encode(*history(1, contract, what=what, size=size, duration=duration, rth=False)), NOW
        )
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (answer,) = talk.read(data)
    assert answer[:4] == ["4", "2", "1", "162"] or answer[0] == "17"
    assert len(data[0].data) <= LENGTH_BYTES + MAX_ANSWER_BYTES
    assert most < 200 << 20


@pytest.mark.slow
def test_thousands_of_requests_leave_no_memory_behind():
    """The log is bounded in lines and in their length; what else is allocated after 2000 more messages was so before."""
    shared = Gateway(MARKET)
    shared.max_records = 100

    def measure():
        random = Random(
            5
        )  # the same messages each time: what the market keeps is bounded, and filled by the first time
        for _ in range(100):
            client = Talk(shared, client_id=1)
            for _ in range(20):
                client.now += 1
                client.feed(make_message(random))
            client.session.release()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    Talk(shared, client_id=2).say(*history(1, (0, "x" * 60_000, *AAPL[2:])))
    assert len(shared.requests[-1].symbol) == 200
    tracemalloc.start()
    try:
        before, after = measure(), measure()
    finally:
        tracemalloc.stop()
    assert len(shared.requests) == 100
    assert after - before < 100_000


# -- on sockets ------------------------------------------------------------------------------------------------------------


def reset(connection):
    """Close as a crash does: with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.slow
def test_a_sane_client_is_served_while_hundreds_attack(gateway):
    """600 connections send anything, stay, close or are reset: every twentieth time a sane client gets its bars and the time,
    and in the end it alone is left."""
    random = Random(6)
    gateway.server.gateway.max_messages_per_s = 1_000_000  # so that the clock has no say in what happens
    sane = Client(gateway)
    sane.say(*history(1))
    expected = sane.read()
    attackers = []
    for number in range(600):
        attacker = socket.create_connection((gateway.host, gateway.port), timeout=5)
        attackers.append(attacker)
        with contextlib.suppress(OSError):
            attacker.sendall(make_attack(random))
        if len(attackers) > 40:
            leaving = attackers.pop(random.randrange(len(attackers)))
            reset(leaving) if random.random() < 0.5 else leaving.close()
        if number % 20 == 0:
            sane.say(*history(1))
            assert sane.read() == expected, f"seed 6 connection {number}"
            sane.say(49, 1)
            assert sane.read() == ["49", "1", str(int(NOW))]
    for attacker in attackers:
        reset(attacker)
    assert wait_until(gateway, lambda: counts(gateway) == (1, 1, 0))
    sane.close()
    assert wait_until(gateway, lambda: counts(gateway) == (0, 0, 0))


@pytest.mark.slow
def test_thousands_of_connections_come_and_go(gateway):
    """2000 connections that say nothing, the prefix or half a greeting leave nothing behind."""
    sane = Client(gateway)
    for number in range(2000):
        with socket.create_connection((gateway.host, gateway.port), timeout=5) as visitor, contextlib.suppress(OSError):
            visitor.sendall(HELLO[: number % (len(HELLO) + 1)])
    sane.say(49, 1)
    assert sane.read()[0] == "49"
    sane.close()
    assert wait_until(gateway, lambda: counts(gateway) == (0, 0, 0))


def test_strangers_who_stay_make_room_for_others(gateway):
    """Of connections that never come to terms the newest are kept; clients are not among those dropped, and newcomers are
    served."""
    sane = Client(gateway)
    with contextlib.ExitStack() as idle:
        for _ in range(MAX_STRANGERS + 60):
            idle.enter_context(socket.create_connection((gateway.host, gateway.port), timeout=5))
        newcomer = Client(gateway, 2)
        for client in (sane, newcomer):
            client.say(49, 1)
            assert client.read()[0] == "49"
            client.close()
        assert wait_until(gateway, lambda: counts(gateway)[0] <= MAX_STRANGERS)
    assert wait_until(gateway, lambda: counts(gateway) == (0, 0, 0))


def ask_much(client, times):
    data = b"".join(
        encode(*history(number, EURUSD, size="1 min", duration="1 M", what="MIDPOINT", rth=False))
        for number in range(times)
    )
    client.socket.sendall(data)


def backlog(gateway):
    """Bytes waiting to be read by the clients."""
    return sum(each._transport.get_write_buffer_size() for each in gateway.server._connections)


@pytest.mark.slow
def test_answers_to_a_client_that_does_not_read_do_not_pile_up(gateway):
    """Thirty requests in one packet for megabytes each: one answer waits at a time; read at last, all arrive in order."""
    idle, other = Client(gateway, 1), Client(gateway, 2)
    ask_much(idle, 30)
    other.say(49, 1)
    assert other.read()[0] == "49"
    assert 0 < gateway.call(lambda: backlog(gateway)) < 8 << 20
    assert [idle.read()[1] for _ in range(30)] == [str(number) for number in range(30)]
    for client in (idle, other):
        client.close()
    assert wait_until(gateway, lambda: counts(gateway) == (0, 0, 0))


@pytest.mark.slow
def test_late_answers_to_a_client_that_does_not_read_wait_too():
    """Answers that come due while a client does not read are made when it reads."""
    rules = [FaultRule("slow", on="history", seconds=0.01)]
    with run_in_thread(MARKET, clock=lambda: NOW, judge=None, faults=rules) as gateway:
        idle = Client(gateway)
        ask_much(idle, 30)
        connections = gateway.server._connections
        assert wait_until(gateway, lambda: all(len(each._due) > 20 and not each._timers for each in connections))
        assert gateway.call(lambda: backlog(gateway)) < 8 << 20
        assert sorted(int(idle.read()[1]) for _ in range(30)) == list(range(30))
        idle.close()
        assert wait_until(gateway, lambda: counts(gateway) == (0, 0, 0))


@pytest.mark.slow
def test_a_client_that_is_closed_and_does_not_read_is_dropped(gateway, monkeypatch):
    """An answer that nobody takes keeps no connection open for ever once the gateway has closed it."""
    monkeypatch.setattr(server_module, "_LINGER_S", 0.05)
    idle = Client(gateway)
    ask_much(idle, 30)
    assert wait_until(gateway, lambda: backlog(gateway) > 0)
    gateway.call(lambda: [each.perform([server_module.Close("a test")]) for each in list(gateway.server._connections)])
    assert wait_until(gateway, lambda: counts(gateway)[0] == 0)
    idle.close()


def test_ids_used_twice_and_cancels_of_nothing_hurt_nobody(gateway):
    """102 for an id that is open, 366 for one that is not; the open request is still there to be cancelled."""
    gateway.call(lambda: gateway.server.gateway.faults.add(FaultRule("silent")))
    client, other = Client(gateway, 1), Client(gateway, 2)
    for fields in (history(5), history(5), (25, 1, 6), (25, 1, 5), (25, 1, 5)):
        client.say(*fields)
    assert errors([client.read() for _ in range(4)]) == [(5, 102), (6, 366), (5, 162), (5, 366)]
    other.say(25, 1, 5)
    assert errors([other.read()]) == [(5, 366)]
    assert gateway.call(lambda: counts(gateway)) == (2, 2, 0)
    for each in (client, other):
        each.close()
