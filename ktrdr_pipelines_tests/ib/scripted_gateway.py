"""A gateway that sends exactly what a test wants, on a real socket, and keeps what it received.

For what the simulator, which keeps to the protocol, would never do. One thread per connection; messages are tuples of fields.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

from ktrdr_pipelines.simulator.wire import FrameDecoder, encode, split_fields

Fields = tuple[object, ...]
Answer = Callable[[list[str]], Sequence[Fields]]

START, TIME, HISTORY, CANCEL_HISTORY, DETAILS, HEAD, CANCEL_HEAD = "71", "49", "20", "25", "9", "87", "90"
READY: tuple[Fields, ...] = ((15, 1, "DU1234567"), (9, 1, 1))
BAR: Fields = ("1709303400", "1.5", "2.5", "0.5", "2.0", "100", "1.7", "12")


def error(req_id: object, code: int, text: str, *more: object) -> Fields:
    """An error message as since server version 166; the field for rejected orders can be given, left out or followed."""
    return (4, 2, req_id, code, text, *(more or ("",)))


def bars(req_id: object, *rows: Fields) -> Fields:
    return (17, req_id, "20240301 09:30:00 US/Eastern", "20240301 16:00:00 US/Eastern", len(rows), *sum(rows, ()))


class ScriptedGateway:
    """``answers`` by message id; ``ready`` follows the start message; ``hello`` None: accepts and sends nothing, or
    ``raw_hello``, and answers only if it ``serves_raw``."""

    def __init__(
        self,
        answers: dict[str, Answer] | None = None,
        *,
        ready: Sequence[Fields] = READY,
        hello: Fields | None = (176, "20240301 12:00:00 EST"),
        raw_hello: bytes = b"",
        closes: bool = False,
        closes_after_hello: bool = False,
        serves_raw: bool = False,
        hello_after: threading.Event | None = None,
    ) -> None:
        self.received: list[list[str]] = []
        self.connections = 0
        self.open_sockets: list[socket.socket] = []
        self._answers: dict[str, Answer] = {
            START: lambda _: ready,
            TIME: lambda _: [(49, 1, int(time.time()))],
            **(answers or {}),
        }
        self._hello, self._raw_hello, self._closes, self._hello_after = hello, raw_hello, closes, hello_after
        self._closes_after_hello, self._serves_raw = closes_after_hello, serves_raw
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ScriptedGateway:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_clients()
        for thread in self._threads:
            thread.join(5)

    def drop_clients(self) -> None:
        """Close every connection, as a restart does."""
        for peer in list(self.open_sockets):
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.open_sockets.remove(peer)  # gone already

    def send(self, *fields: object) -> None:
        """Send a message to every client, unasked."""
        for peer in list(self.open_sockets):
            peer.sendall(encode(*fields))

    def received_of(self, message: str) -> list[list[str]]:
        """The messages of one kind received so far."""
        return [fields for fields in self.received if fields[0] == message]

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="scripted-gateway")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pieces of an answer arrive as pieces
            self.connections += 1
            self.open_sockets.append(peer)
            self._start(self._serve, peer)

    def _serve(self, peer: socket.socket) -> None:
        try:
            self._converse(peer)
        except OSError:
            return
        finally:
            if peer in self.open_sockets:
                self.open_sockets.remove(peer)
            peer.close()

    def _converse(self, peer: socket.socket) -> None:
        if not self._greet(peer):
            return
        frames = FrameDecoder()
        while data := peer.recv(65536):
            if self._hello is None and not self._serves_raw:
                continue
            for payload in frames.feed(data):
                if not self._answer_one(peer, split_fields(payload)):
                    return

    def _greet(self, peer: socket.socket) -> bool:
        """Whether the connection goes on."""
        if self._closes:
            return False
        greeting = peer.recv(4096)
        if self._raw_hello:
            peer.sendall(self._raw_hello)
            if self._closes_after_hello:
                return False
        if self._hello_after is not None:
            self._hello_after.wait(10)
        if self._hello is not None and greeting:
            peer.sendall(encode(*self._hello))
        return True

    def _answer_one(self, peer: socket.socket, fields: list[str]) -> bool:
        """Whether the connection goes on."""
        self.received.append(fields)
        for answer in self._answers.get(fields[0], lambda _: ())(fields):
            if answer == ("close",):
                return False
            peer.sendall(encode(*answer) if isinstance(answer, tuple) else answer)
        return True
