"""A client of one session without sockets: sends messages and reads the answers as fields. Used by the simulator's tests."""

from __future__ import annotations

from datetime import UTC, datetime

from ktrdr_pipelines.simulator.client_session import Close, Send, Session, Wait
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.gateway import Gateway
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines.simulator.wire import MAX_ANSWER_BYTES, FrameDecoder, encode, frame, split_fields

MARKET = SyntheticMarket()
NOW = datetime(2024, 3, 5, 19, 40, 30, tzinfo=UTC).timestamp()

AAPL = (0, "AAPL", "STK", "", 0.0, "", "", "SMART", "", "USD", "", "", False)
IBM = (0, "IBM", *AAPL[2:])
EURUSD = (0, "EUR", "CASH", "", 0.0, "", "", "IDEALPRO", "", "USD", "", "", False)


def history(
    req_id,
    contract=AAPL,
    end="20240301-21:00:00",
    size="1 hour",
    duration="1 D",
    what="TRADES",
    rth=True,
    fmt=2,
    keep=False,
):
    """The fields of a history request, as since version 124."""
    return (20, req_id, *contract, end, size, duration, rth, what, fmt, keep, "")


def head(req_id, contract=AAPL, what="TRADES", fmt=2):
    return (87, req_id, *contract, True, what, fmt)


class Talk:
    """A client and its session; ``seen`` collects the actions that are not bytes. It is READY unless ``start`` is False."""

    def __init__(self, gateway=None, *, version=176, client_id=1, start=True, **options):
        self.gateway = gateway or Gateway(MARKET, **options)
        self.session = Session(self.gateway)
        self.now = NOW
        self.seen = []
        self._decoder = FrameDecoder(max_bytes=MAX_ANSWER_BYTES)
        if start:
            self.handshake(version)
            self.greeting = self.send(71, 2, client_id, "")

    def handshake(self, version):
        return self.feed(b"API\0" + frame(b"v100..%d" % version))

    def feed(self, data):
        """Send raw bytes and return the fields of the messages that come back."""
        return self.read(self.session.receive(data, self.now))

    def read(self, actions):
        self.seen += [action for action in actions if not isinstance(action, Send)]
        data = b"".join(action.data for action in actions if isinstance(action, Send))
        return [split_fields(payload) for payload in self._decoder.feed(data)]

    def send(self, *fields):
        return self.feed(encode(*fields))

    def wake(self):
        """Let the time of every `Wait` pass."""
        waits = [action for action in self.seen if isinstance(action, Wait)]
        self.seen = [action for action in self.seen if not isinstance(action, Wait)]
        return [message for wait in waits for message in self.read(self.session.wake(wait.token))]

    @property
    def closed(self):
        return [action.reason for action in self.seen if isinstance(action, Close)]


def errors(messages):
    """(request id, code) of each error or notice."""
    return [(int(m[2]), int(m[3])) for m in messages if m[0] == "4"]


__all__ = ["AAPL", "EURUSD", "IBM", "MARKET", "NOW", "FaultRule", "PacingJudge", "Talk", "errors", "head", "history"]
