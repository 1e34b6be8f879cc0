"""A gateway that sends whatever it likes: the client ends every request in time, and takes nothing for bars that is not.

The answers are made by `hostile.py` from seeds, with what has to come of each; a failing case is named by seed and number
and made again by them alone. Faults that a real gateway commits are in `test_client.py`.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import numpy as np
import pytest

from ktrdr_pipelines.bars.answer import normalise_answer
from ktrdr_pipelines.bars.schema import (
    COLUMNS,
    BarArrays,
    find_faults,
    latest_closes,
    opens_of,
    rules_for,
    validate_bars,
)
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.errors import DataError, GatewayUnreachable, KtrdrError, RequestTimeout, TransientError
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.contracts import ContractInfo
from ktrdr_pipelines.ib.wire.decoding import RawBars
from ktrdr_pipelines.simulator.wire import encode, frame
from ktrdr_pipelines_tests.ib.hostile import (
    BREAKING,
    CLOSE,
    DATES,
    DAY_S,
    NUMBERS,
    Piece,
    Row,
    Script,
    cut,
    good,
    make_script,
    noise,
    storable,
)
from ktrdr_pipelines_tests.ib.scripted_gateway import DETAILS, HEAD, HISTORY, READY, START, TIME, ScriptedGateway
from ktrdr_pipelines_tests.ib.test_client import AAPL, ask_bars, live_threads, make_client, wait_until

SERIES = Series(stock("AAPL"), parse_timeframe("1h"))
WINDOW = Window.from_epoch(DAY_S, DAY_S + 86400)
LATER_S = float(DAY_S + 10 * 86400)
SHORT_S = 0.08
"""The time-out of requests that are never answered."""

Make = Callable[[Random, int], Script]


class HostileGateway(ScriptedGateway):
    """Answers requests for bars by `make` and keeps the script of the last one; remembers nothing, so that it never grows."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__({HISTORY: self._answer}, **options)
        self.random = Random(seed)
        self.make: Make = make_script
        self.last = Script("none", [])

    def _answer(self, fields: list[str]) -> Any:
        self.received.clear()
        self.last = self.make(self.random, int(fields[1]))
        return self.last.pieces


def tables(client: GatewayClient) -> list[Any]:
    """Whatever could grow with the requests made."""
    return [client.open_requests]


def unthrottled(client: GatewayClient) -> GatewayClient:
    """Without the library's limit of 45 messages a second."""
    client.library_parts.client.MaxRequests = 0
    return client


@contextmanager
def connected(gateway: ScriptedGateway, **options: Any) -> Iterator[GatewayClient]:
    with make_client(gateway.port, **{"request_timeout_s": 20.0, **options}) as client:
        yield unthrottled(client)


@pytest.fixture(autouse=True)
def nothing_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After every test no thread of a connection is alive, and no library has logged an exception."""
    before = live_threads()
    with caplog.at_level(logging.WARNING):
        yield
    wait_until(lambda: not live_threads() - before, f"left behind: {live_threads() - before}")
    raised = [
        record.getMessage() for record in caplog.records if record.exc_info or record.name in ("asyncio", "eventkit")
    ]
    assert not raised


def outcome_of(ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns, or the `KtrdrError` it raises; any other exception fails the test."""
    try:
        return ask()
    except KtrdrError as error:
        return error


def check(script: Script, outcome: RawBars | KtrdrError, name: str) -> None:
    """The outcome is what the bytes mean; and what of it is taken for bars keeps every rule."""
    if script.rows is None:
        assert isinstance(outcome, KtrdrError), f"{name}: accepted {outcome}"
        str(outcome).encode()  # fit to be printed and stored
        assert len(str(outcome)) < 5000
        return
    assert isinstance(outcome, RawBars), f"{name}: refused: {outcome}"
    columns = (outcome.opens_s, outcome.open, outcome.high, outcome.low, outcome.close, outcome.volume)
    sent = np.array([row[1:] for row in script.rows], dtype=np.float64).reshape(-1, 5)
    assert outcome.opens_s.tolist() == [row[0] for row in script.rows], name
    assert np.array_equal(np.column_stack(columns[1:]), sent, equal_nan=True), name
    assert bool(outcome.no_data_text) == script.says_no_data, name
    if script.is_altered:
        check_stored(script.rows, outcome, name)


def check_stored(rows: list[Row], raw: RawBars, name: str) -> None:
    """What would be stored is exactly what the answer has for the window, or nothing, and then for a reason."""
    expected = storable(rows, WINDOW.start_s, WINDOW.end_s)
    try:
        closes_s = latest_closes(SERIES.timeframe, raw.opens_s)
        bars = normalise_answer(raw, SERIES, WINDOW, now_s=LATER_S, closes_s=closes_s).bars
        validate_bars(bars, SERIES)
    except DataError:
        assert expected is None, f"{name}: refused {rows}"
        return
    assert expected is not None, f"{name}: took {rows} for bars"
    assert not find_faults(BarArrays.of(bars), rules_for(SERIES))
    stored = zip(opens_of(bars).tolist(), *(bars[column].tolist() for column in COLUMNS[1:]), strict=True)
    assert list(stored) == [expected[opens_s] for opens_s in sorted(expected)], name
    assert not np.signbit(bars[list(COLUMNS[1:])].to_numpy()).any(), name


# -- bars on a connection that lasts ---------------------------------------------------------------------------------------

CASES, SEEDS = 1300, 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_answer_is_taken_for_more_or_less_than_its_bytes_say(seed: int) -> None:
    """1300 answers a seed on one connection: bars, "no data" or a `KtrdrError`, as an independent reading of the bytes has it.

    None waits for its time-out, none ends the connection, and none leaves anything behind.
    """
    kinds: Counter[str] = Counter()
    with HostileGateway(seed) as gateway, connected(gateway) as client:
        for number in range(CASES):
            outcome = outcome_of(lambda: ask_bars(client))
            name = f"seed {seed} case {number} {gateway.last}"
            kinds[gateway.last.kind] += 1
            assert not isinstance(outcome, RequestTimeout), f"{name}: {outcome}"
            check(gateway.last, outcome, name)
            assert not any(tables(client)), name
        assert gateway.connections == 1
        client.probe()
    assert min(kinds.values()) > 10


@pytest.mark.slow
def test_a_broken_connection_fails_its_request_and_is_replaced() -> None:
    """Half a frame and the end, a length no gateway sends, garbage: the request fails at once, and a new connection serves."""
    with HostileGateway(11) as gateway:
        for number in range(150):
            make = BREAKING[number % len(BREAKING)]
            with connected(gateway) as client:
                for gateway.make in (make_script, make):
                    outcome = outcome_of(lambda client=client: ask_bars(client))
                    name = f"seed 11 case {number} {gateway.last}"
                    assert not isinstance(outcome, RequestTimeout), name
                    check(gateway.last, outcome, name)
                assert isinstance(outcome, TransientError), name
                assert not client.is_connected, name
                assert not any(tables(client)), name
                assert client.pending_bytes < 1000
                with pytest.raises(TransientError):
                    ask_bars(client)
        assert gateway.connections == 150


@pytest.mark.slow
def test_late_answers_and_answers_to_others_reach_no_request() -> None:
    """A request that is answered with everything but an answer times out; its bars, arriving later, harm no other request."""
    late: list[bytes] = []

    def say_nothing(random: Random, req_id: int) -> Script:
        late[:] = [good(random, req_id)[0], encode(4, 2, req_id, 162, "query cancelled", ""), encode(88, req_id, "1")]
        return Script("silence", [noise(random, req_id + 500_000) for _ in range(5)])

    def come_late(random: Random, req_id: int) -> Script:
        data, rows = good(random, req_id)
        before, after = random.choices(late, k=2)
        return Script("late", [before + data + after], rows)

    with HostileGateway(12) as gateway, connected(gateway) as client:
        for number in range(40):
            gateway.make, client.request_timeout_s = say_nothing, SHORT_S
            assert isinstance(outcome_of(lambda: ask_bars(client)), RequestTimeout)
            gateway.make, client.request_timeout_s = come_late, 20.0
            outcome = outcome_of(lambda: ask_bars(client))
            check(gateway.last, outcome, f"case {number}")
            assert not any(tables(client))
        assert gateway.connections == 1


def test_requests_side_by_side_get_each_its_own_bars() -> None:
    """Answers out of order and amid others' go to the requests whose ids they carry."""
    waiting: dict[int, bytes] = {}
    rows: dict[int, list[Row]] = {}
    random = Random(13)

    def answer(fields: list[str]) -> list[bytes]:
        req_id = int(fields[1])
        waiting[req_id], rows[req_id] = good(random, req_id)
        if len(waiting) < 4:
            return []
        stream = [*waiting.values(), *(noise(random, req_id + 100) for _ in range(6))]
        random.shuffle(stream)
        waiting.clear()
        return [b"".join(stream)]

    received: list[list[int]] = []
    with ScriptedGateway({HISTORY: answer}) as gateway, connected(gateway) as client:
        for _ in range(50):
            askers = [
                threading.Thread(target=lambda: received.append(ask_bars(client).close.tolist())) for _ in range(4)
            ]
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join(30)
        assert not any(tables(client))
    assert sorted(received) == sorted([row[4] for row in rows[req_id]] for req_id in rows)
    assert len(received) == 200


SANE_CONTRACT = [
    "AAPL", "STK", "", "0", "", "SMART", "USD", "AAPL", "NMS", "NMS", "265598", "0.01", "", "LMT",
    "SMART", "1", "0", "APPLE INC", "NASDAQ", "", "Technology", "", "", "US/Eastern", "", "", "",
    "0", "0", "1", "", "", "26", "", "COMMON", "1", "1", "100",
]  # fmt: skip
"""Fields of a contract behind the request id."""


def damaged_contract(random: Random) -> list[str]:
    fields = list(SANE_CONTRACT)
    fields[10] = random.choice(("0", "-1", "", "9" * 30, *["265598"] * 30))
    for _ in range(random.randrange(3)):
        at = random.randrange(len(fields))
        match random.randrange(3):
            case 0:
                fields[at] = random.choice(NUMBERS + DATES)
            case 1:
                del fields[at]
            case _:
                fields.insert(at, random.choice(NUMBERS))
    return fields


@pytest.mark.slow
def test_contracts_and_heads_made_of_anything_are_read_or_fail() -> None:
    """2000 look-ups: contracts with an id, none, a time with a zone, None, or a `KtrdrError`; nothing stays behind."""
    random = Random(14)

    def describe(fields: list[str]) -> list[bytes]:
        req_id = int(fields[2])
        found = [encode(10, req_id, *damaged_contract(random)) for _ in range(random.randrange(3))]
        return [*found, noise(random, req_id + 9), encode(88, req_id, "1"), encode(52, 1, req_id)]

    def head(fields: list[str]) -> list[bytes]:
        gateway.received.clear()
        req_id = int(fields[1])
        text = random.choice((*NUMBERS, *DATES, "345479400", "345479400"))
        return [encode(52, 1, req_id), noise(random, req_id + 9), encode(88, req_id, text), encode(88, req_id, "1")]

    outcomes: Counter[str] = Counter()
    with ScriptedGateway({DETAILS: describe, HEAD: head}) as gateway, connected(gateway) as client:
        for _ in range(1000):
            found = outcome_of(lambda: client.contract_details(AAPL))
            start = outcome_of(lambda: client.head_timestamp(AAPL))
            outcomes.update((type(found).__name__, type(start).__name__))
            assert not isinstance(found, RequestTimeout)
            if isinstance(found, list):
                assert all(isinstance(each, ContractInfo) and each.con_id > 0 for each in found)
                "".join(each.describe() for each in found).encode()
            assert not isinstance(start, RequestTimeout)
            assert start is None or isinstance(start, KtrdrError) or start.utcoffset() is not None
            assert not any(tables(client))
        assert gateway.connections == 1
    assert min(outcomes[name] for name in ("list", "EmptyContractAnswer", "DataError", "datetime", "NoneType")) > 50, (
        outcomes
    )


# -- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thousands_of_hostile_answers_leave_no_memory_behind(caplog: pytest.LogCaptureFixture) -> None:
    """What is allocated after 1500 answers more is what was allocated before; at most a hundred notices are kept."""
    caplog.set_level(logging.CRITICAL, "ktrdr_pipelines")  # pytest keeps every line of the log

    def measure(cases: int) -> int:
        for _ in range(cases):
            outcome_of(lambda: ask_bars(client))
        gateway.last = Script("none", [])
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def busy(random: Random, req_id: int) -> Script:
        script = make_script(random, req_id)
        return Script(script.kind, [*(noise(random, req_id) for _ in range(5)), *script.pieces])

    with HostileGateway(15) as gateway, connected(gateway) as client:
        gateway.make = busy
        tracemalloc.start()
        try:
            before = measure(300)
            after = measure(1500)
        finally:
            tracemalloc.stop()
        assert len(client.notices) <= 100
        assert max(map(len, client.notices)) < 3000
        assert not any(tables(client))
    assert after - before < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("length", [1 << 24, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("is_greeting", [False, True])
def test_an_announced_flood_is_not_taken_in(length: int, is_greeting: bool) -> None:
    """After a length that no message has, the connection ends before its bytes arrive: hardly any of 64 MB is kept."""
    flood = length.to_bytes(4, "big") + bytes(1 << 26)
    options: dict[str, Any] = {"hello": None, "raw_hello": flood} if is_greeting else {}
    with ScriptedGateway({HISTORY: lambda _: [flood]}, **options) as gateway:
        client = make_client(gateway.port)
        tracemalloc.start()
        try:
            if is_greeting:
                with pytest.raises(GatewayUnreachable, match=f"not as a gateway does: it announced .* {length} bytes"):
                    client.connect()
            else:
                with client, pytest.raises(TransientError, match=f"was lost .announced a message of {length} bytes"):
                    ask_bars(client)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert client.pending_bytes == 0
    assert most < 1 << 23


@pytest.mark.slow
def test_the_longest_message_there_is_arrives_whole() -> None:
    """Bars of nearly 16 MB in pieces are read, and cost time in proportion to their length."""
    row = ["1709303400", "1.5", "2.5", "0.5", "2.0", "1" + "0" * 200, "1.7", "12"]
    count = ((1 << 24) - 200) // (len("\0".join(row)) + 1)
    body = ("\0".join([*row, ""]) * count).encode()
    head = f"17\0{{}}\0a\0b\0{count}\0"

    def answer(fields: list[str]) -> list[bytes]:
        data = frame(head.format(fields[1]).encode() + body)
        return [data[at : at + 100_000] for at in range(0, len(data), 100_000)]

    with ScriptedGateway({HISTORY: answer}) as gateway, connected(gateway) as client:
        assert len(ask_bars(client)) == count
        client.probe()


# -- greetings -------------------------------------------------------------------------------------------------------------

VERSION = encode(176, "20240301 12:00:00 EST")
STRANGERS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x16",
    b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"220 mail.example.org ESMTP\r\n",
    b"-ERR unknown command\r\n",
    b"\xff" * 5000,
    b"\x00" * 5000,
    frame(b"hello"),
    frame(b"hello\0"),
    frame(b"a\0b\0"),
    frame(b"\0\0"),
    frame(b"1_76\0x\0") + frame(b"\xff\xfe\0"),
    frame(b"-5\0x\0"),
    frame(b"99\0x\0"),
    frame(b"9" * 5000 + b"\0x\0"),
    frame(b"176\0x\0y\0"),
    frame(bytes(2000)),
    VERSION + b"\xff\xff\xff\xff",
    VERSION + b"GET / HTTP/1.1\r\n",
    VERSION + encode(15, "DU1"),
    VERSION + encode(9, 1),
    VERSION + encode(9, 1, "one"),
    VERSION + encode(9, 1, "9" * 5000),
    VERSION + encode(4, 2, -1, 504, "Not connected", ""),
)


def greet(gateway: ScriptedGateway, **options: Any) -> GatewayClient | KtrdrError:
    client = make_client(gateway.port, **options)
    return outcome_of(lambda: (client.connect(), client)[1])


@pytest.mark.slow
@pytest.mark.parametrize("ends", [False, True])
def test_other_protocols_are_recognised_at_once_wherever_their_bytes_are_cut(ends: bool) -> None:
    """Other protocols and unreadable greetings, in pieces, closed or left open: no gateway, long before the time-out."""
    random = Random(16)
    for number, stranger in enumerate(STRANGERS):
        pieces = [stranger] if number % 2 else cut(random, stranger)
        options: dict[str, Any] = {"hello": None, "raw_hello": b"".join(pieces), "closes_after_hello": ends}
        with ScriptedGateway(**options) as gateway:
            begun = time.monotonic()
            outcome = greet(gateway, connect_timeout_s=15.0)
            assert isinstance(outcome, GatewayUnreachable), f"{stranger[:60]!r}: {outcome}"
            assert time.monotonic() - begun < 10, stranger[:60]  # of 15 s
            str(outcome).encode()
            wait_until(lambda gateway=gateway: not gateway.open_sockets, "the socket stays open")


@pytest.mark.slow
def test_greetings_made_of_anything_connect_or_fail() -> None:
    """160 changed greetings: a connection that answers, or `GatewayUnreachable`; threads and sockets are gone either way."""
    random = Random(17)
    outcomes: Counter[str] = Counter()
    for number in range(160):
        sane = VERSION + b"".join(encode(*fields) for fields in READY)
        stream = bytearray(sane)
        match number % 4:
            case 0:
                stream[random.randrange(len(stream))] ^= 1 << random.randrange(8)
            case 1:
                del stream[random.randrange(len(stream)) :]
            case 2:
                stream = bytearray(VERSION + b"".join(noise(random, 7) for _ in range(3)) + sane[len(VERSION) :])
            case _:
                stream = bytearray(random.randbytes(random.randrange(1, 60)))
        options = {"hello": None, "raw_hello": bytes(stream), "serves_raw": True}
        with ScriptedGateway({START: lambda _: ()}, **options) as gateway:
            outcome = greet(gateway, connect_timeout_s=SHORT_S, probe_timeout_s=SHORT_S)
            outcomes[type(outcome).__name__] += 1
            if isinstance(outcome, GatewayClient):
                outcome.close()
            else:
                assert isinstance(outcome, GatewayUnreachable), f"seed 17 case {number}: {outcome!r}"
            wait_until(lambda gateway=gateway: not gateway.open_sockets, "the socket stays open")
    assert outcomes["GatewayClient"] > 25


@pytest.mark.slow
def test_endless_bytes_without_a_message_end_with_the_time_out() -> None:
    """A greeting of empty frames, or one that never ends, is given up at once or in time; little of it is kept."""
    for endless in (bytes(1000), (60_000).to_bytes(4, "big") + b"x" * 1000):
        stop = threading.Event()

        def pour(gateway: ScriptedGateway, stop: threading.Event = stop, endless: bytes = endless) -> None:
            while not stop.is_set():
                for peer in list(gateway.open_sockets):
                    with suppress(OSError):
                        peer.sendall(endless)
                stop.wait(0.002)

        with ScriptedGateway(hello=None, raw_hello=endless) as gateway:
            pouring = threading.Thread(target=pour, args=(gateway,))
            pouring.start()
            outcome = greet(gateway, connect_timeout_s=0.5)
            stop.set()
            pouring.join(10)
            assert isinstance(outcome, GatewayUnreachable)


@pytest.mark.slow
def test_a_gateway_that_talks_without_end_stops_no_time_out() -> None:
    """Notices by the thousand while a request waits: it times out in time, and the last hundred notices are kept."""

    def chatter(_: Random, req_id: int) -> Script:
        notice = encode(4, 2, -1, 2119, "x" * 100_000, "") * 3 + encode(5, req_id, "order") * 1000
        return Script("chatter", [notice] * 40)

    with HostileGateway(18) as gateway, connected(gateway, request_timeout_s=0.4) as client:
        gateway.make = chatter
        assert isinstance(outcome_of(lambda: ask_bars(client)), RequestTimeout)
        wait_until(lambda: len(client.notices) == 100, "the notices")
        gateway.make, client.request_timeout_s = make_script, 20.0
        check_after = outcome_of(lambda: ask_bars(client))
        check(gateway.last, check_after, "after the chatter")
        assert sum(map(len, client.notices)) < 300_000


def test_a_time_that_is_none_is_no_proof_of_life() -> None:
    """Whatever else than a time the probe is answered with, the gateway is not believed to be alive; nothing stays behind."""
    replies: list[Piece] = []
    with (
        ScriptedGateway({TIME: lambda _: list(replies) or [encode(49, 1, 1709303400)]}) as gateway,
        connected(gateway) as client,
    ):
        client.probe_timeout_s = SHORT_S
        for text in ("nan", "-1e9", "9" * 30, "soon", "1709303400.5"):
            replies[:] = [encode(49, 1, text), encode(49), encode(88, "currentTime", "1")]
            with pytest.raises(GatewayUnreachable, match="does not answer the time request"):
                client.probe()
            assert not any(tables(client))
        replies[:] = [CLOSE]
        with pytest.raises(GatewayUnreachable):
            client.probe()
        assert not any(tables(client))
