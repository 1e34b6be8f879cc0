"""The sockets: real connections to a gateway in its thread."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.wire import FrameDecoder, encode, frame, split_fields

from .talk import EURUSD, MARKET, NOW, FaultRule, errors, head, history


class Client:
    """A blocking client that sends raw messages."""

    def __init__(self, gateway, client_id=1, start=True):
        self.socket = socket.create_connection((gateway.host, gateway.port), timeout=5)
        self._decoder = FrameDecoder(max_bytes=1 << 26)
        self._messages = []
        self.socket.sendall(b"API\0" + frame(b"v157..176"))
        self.version = self.read()[0]
        if start:
            self.send(71, 2, client_id, "")
            self.greeting = [self.read() for _ in range(5)]

    def send(self, *fields):
        self.socket.sendall(encode(*fields))

    def read(self):
        """The next message, or None when the gateway has closed the connection."""
        while not self._messages:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._messages += [split_fields(payload) for payload in self._decoder.feed(data)]
        return self._messages.pop(0)

    def close(self):
        self.socket.close()


@pytest.fixture
def gateway():
    with run_in_thread(MARKET, clock=lambda: NOW, judge=None) as running:
        yield running


@pytest.fixture
def client(gateway):
    with contextlib.closing(Client(gateway)) as connected:
        yield connected


def wait_until(gateway, condition, timeout_s=5.0):
    """Call ``condition`` in the gateway's thread until it is true; False after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not gateway.call(condition):
        if time.monotonic() > deadline:
            return False
    return True


def test_client_is_served_over_a_socket(client):
    """Handshake, greeting, time, history."""
    assert client.version == "176"
    client.send(49, 1)
    assert client.read() == ["49", "1", str(int(NOW))]
    client.send(*history(1))
    assert client.read()[:2] == ["17", "1"]


def test_bytes_may_come_one_by_one(gateway):
    """Partial reads are joined."""
    raw = socket.create_connection((gateway.host, gateway.port), timeout=5)
    with contextlib.closing(raw):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"API\0" + frame(b"v157..176"):
            raw.sendall(bytes([byte]))
        assert raw.recv(100)[4:7] == b"176"


def test_many_requests_in_one_packet_are_all_answered(client):
    """Requests may be sent without waiting for answers."""
    client.socket.sendall(b"".join(encode(*history(i, end=f"202402{10 + i}-21:00:00")) for i in range(10)))
    assert [client.read()[1] for _ in range(10)] == [str(i) for i in range(10)]


def test_clients_are_served_side_by_side_and_ids_come_back(gateway):
    """Two clients at once; a taken id is 326 and the end; a client that leaves frees its id."""
    first, second = Client(gateway, 1), Client(gateway, 2)
    twin = Client(gateway, 1, start=False)
    twin.send(71, 2, 1, "")
    assert errors([twin.read()]) == [(-1, 326)]
    assert twin.read() is None
    first.close()
    assert wait_until(gateway, lambda: gateway.server.gateway.client_ids == {2})
    again = Client(gateway, 1)
    for each in (second, again, twin):
        each.close()


def test_dropped_answer_is_cut_at_the_byte(gateway):
    """The client receives ``after_bytes`` bytes of the answer, then the connection ends."""
    gateway.call(lambda: gateway.server.gateway.faults.add(FaultRule("drop_after", after_bytes=77)))
    client = Client(gateway)
    client.send(*history(1))
    received = b""
    while data := client.socket.recv(4096):
        received += data
    assert len(received) == 77
    client.close()


def test_latency_delays_answers_without_blocking_others():
    """While one answer waits, another request is answered."""
    rules = [FaultRule("slow", on="history", seconds=0.05)]
    with run_in_thread(MARKET, clock=lambda: NOW, judge=None, faults=rules) as gateway:
        client = Client(gateway)
        client.send(*history(1))
        client.send(*head(2))
        assert [client.read()[0] for _ in range(2)] == ["88", "17"]
        client.close()


@pytest.mark.slow
def test_slow_reader_does_not_stop_others(gateway):
    """A client that does not read its large answers does not delay the other clients."""
    idle = Client(gateway, 1)
    for i in range(20):
        idle.send(*history(i, EURUSD, size="1 min", duration="1 M", what="MIDPOINT", rth=False))
    other = Client(gateway, 2)
    other.send(49, 1)
    assert other.read()[0] == "49"
    answers = [idle.read() for _ in range(20)]
    assert {message[4] for message in answers} == {answers[0][4]}
    assert [message[1] for message in answers] == [str(i) for i in range(20)]
    idle.close()
    other.close()


def test_notices_and_disconnects_reach_clients(gateway, client):
    """A test can send a notice or drop all clients; new clients are served."""
    gateway.call(lambda: gateway.server.broadcast(1100, "Connectivity between IB and TWS has been lost."))
    assert errors([client.read()]) == [(-1, 1100)]
    gateway.call(gateway.server.disconnect_clients)
    assert client.read() is None
    Client(gateway).close()


def test_another_protocol_is_closed_and_other_clients_are_served(gateway, client):
    """A web browser on the port is closed at once."""
    browser = socket.create_connection((gateway.host, gateway.port), timeout=5)
    browser.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert browser.recv(100) == b""
    browser.close()
    client.send(49, 1)
    assert client.read()[0] == "49"


def test_log_names_every_request(gateway, client):
    """Client, request and outcome of each."""
    client.send(*history(1))
    client.read()
    client.send(*history(2, duration="8 H"))
    client.read()
    first, second = gateway.requests
    assert (first.symbol, first.bar_size, first.duration, first.outcome, first.bars) == (
        "AAPL",
        "1 hour",
        "1 D",
        "bars",
        7,
    )
    assert (first.client_id, first.con_id, first.first, first.last) == (1, 265000, 1709303400, 1709323200)
    assert second.outcome.startswith("321 ")
    assert second.to_dict()["duration"] == "8 H"


def test_stopping_closes_connections_and_port():
    """After the block no client is connected and nothing listens."""
    with run_in_thread(MARKET, clock=lambda: NOW) as gateway:
        client = Client(gateway)
        port = gateway.port
    assert client.read() is None
    client.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=0.5)
    gateway.stop()


def test_taken_port_is_an_input_error(gateway):
    """The error names the address, and the thread has ended."""
    with pytest.raises(InputError, match=f"127.0.0.1:{gateway.port}"):
        run_in_thread(MARKET, port=gateway.port).start()
