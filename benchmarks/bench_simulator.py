"""How many bars a second the simulated gateway serves over loopback: it must never be what another benchmark measures.

Run by `make bench`, or: ``python benchmarks/bench_simulator.py``. The gateway runs in a process of its own; the reader is a bare
socket that only counts. Beside it the rate at which the client library decodes, in CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time

from bench_answer import BARS, decode_with_library, payload_of
from gateway import run_gateway
from measuring import best
from rows import print_row

from ktrdr_pipelines.simulator.wire import HANDSHAKE_PREFIX, encode, frame

ANSWER_ID = b"17"


class CountingClient:
    """Speaks just enough of the protocol to ask for history and to count the bars that come."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._buffer = bytearray()
        self.received_bytes = 0
        self._socket.sendall(HANDSHAKE_PREFIX + frame(b"v157..176"))
        self.read_frame()
        self._socket.sendall(encode(71, 2, 1, ""))

    def read_frame(self) -> bytes:
        """The payload of the next frame."""
        self._fill(4)
        end = 4 + int.from_bytes(self._buffer[:4], "big")
        self._fill(end)
        payload = bytes(self._buffer[4:end])
        del self._buffer[:end]
        return payload

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionError("the gateway closed the connection")
            self.received_bytes += len(data)
            self._buffer += data

    def ask(self, req_id: int, symbol: str, end: str, duration: str, bar_size: str) -> int:
        """Ask for trades in extended hours and return the number of bars in the answer."""
        contract = (0, symbol, "STK", "", "0.0", "", "", "SMART", "", "USD", "", "", False)
        self._socket.sendall(encode(20, req_id, *contract, end, bar_size, duration, False, "TRADES", 2, False, ""))
        while True:
            payload = self.read_frame()
            fields = payload.split(b"\0", 5)
            if fields[0] == ANSWER_ID:
                return int(fields[4])
            if fields[0] == b"4" and fields[2] == str(req_id).encode():
                raise ConnectionError(f"refused: {payload!r}")

    def close(self) -> None:
        self._socket.close()


def measure(port: int, rounds: int) -> None:
    """Print bars a second for large answers, made the first time and again, and for many small ones."""
    client = CountingClient(port)
    try:
        for label, seen in (("first time", False), ("again", True)):
            started, before, bars = time.perf_counter(), client.received_bytes, 0
            for i in range(rounds):
                bars += client.ask(1 + i + rounds * seen, "AAPL", f"2024{1 + i % 12:02d}28-23:59:59", "1 M", "1 min")
            _report(f"1 min, 1 M, {label}", bars, time.perf_counter() - started, client.received_bytes - before)
        started, before, bars = time.perf_counter(), client.received_bytes, 0
        for i in range(200):
            bars += client.ask(1000 + i, "AAPL", f"202402{1 + i % 28:02d}-23:59:59", "1 D", "1 hour")
            time.sleep(0.021)  # more than 50 messages a second would be refused
        elapsed = time.perf_counter() - started - 200 * 0.021
        print(f"1 hour, 1 D: {200 / elapsed:,.0f} answers a second ({bars} bars)")
    finally:
        client.close()


def _report(label: str, bars: int, elapsed_s: float, size: int) -> None:
    decode_s = best(decode_with_library(payload_of(BARS)), 9)
    what = f"simulated gateway, {label} ({bars:,} bars, {size / 1e6:.0f} MB): bars a second of wall time"
    print_row(what, bars / elapsed_s, "bars", against=BARS / decode_s, of="client library decodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="large answers in each of the two passes")
    rounds = parser.parse_args().rounds
    asyncio.set_event_loop(asyncio.new_event_loop())  # the library asks for one when it is imported
    with run_gateway("--no-judge") as gateway:
        measure(gateway.port, rounds)


if __name__ == "__main__":
    main()
