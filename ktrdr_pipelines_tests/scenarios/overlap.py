"""Loads of several series with six requests open, through all that is real: driver, ledger, client library, a socket, files.

The expected files are computed from the simulator's market alone (`fault_matrix.find_truth`). The loader's clock runs `SPEED`
times as fast as the machine's, so that a retry takes a fraction of a second. `Mixer` stands between client and gateway and does
to the messages what the simulator, which keeps to the protocol, would never do.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.loading.driver import drive
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.loading.series_load import Load
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines.simulator.wire import FrameDecoder, encode, frame, split_fields
from ktrdr_pipelines.store.store import Store
from ktrdr_pipelines_tests.load_forks import FastClock
from ktrdr_pipelines_tests.scenarios.fault_matrix import Verdict, find_truth, judge, show, utc

SPEED = 40
NOW = utc("2024-06-14T19:20:30")
START = utc("2023-12-01")
SYMBOLS = ("AAPL", "MSFT", "SPY", "IBM", "KO", "JPM", "INTC", "AMD")
OPEN_REQUESTS = 6
"""The default of KTRDR_OPEN_REQUESTS."""


def series_of(symbol: str) -> Series:
    return Series(stock(symbol), TIMEFRAMES["1h"])


@dataclass
class Result:
    """What a run of several loads came to: their reports by symbol, their files against the truth, the waits shown."""

    reports: dict[str, LoadReport] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    waits: list[Waiting] = field(default_factory=list)

    @property
    def failed(self) -> set[str]:
        return {symbol for symbol, report in self.reports.items() if report.failures}

    @property
    def requests(self) -> int:
        return sum(report.ib_requests_made for report in self.reports.values())

    def errors_of(self, symbol: str) -> list[str]:
        return [str(failure.error) for failure in self.reports[symbol].failures]


class OverlapBench:
    """A data folder and a pacing ledger; each load has a connection of its own to the gateway on a port."""

    def __init__(self, folder: Path, *, store: Store | None = None) -> None:
        self.folder = folder
        self.store = store or Store(folder / "data")
        self.clock = FastClock(SPEED)

    def load(
        self,
        port: int,
        symbols: Sequence[str],
        *,
        open_requests: int | None = OPEN_REQUESTS,
        on_event: Callable[[str, Any], None] = lambda _symbol, _event: None,
        unknown: str = "",
        **address: Any,
    ) -> Result:
        """Load `START` to `NOW` of ``symbols`` side by side, and check what has to be true after every load. ``unknown``: one
        that does not exist."""
        options = {"connect_timeout_s": 5.0, "request_timeout_s": 20.0, "probe_timeout_s": 5.0,
                   "retry_waits_s": (15.0, 30.0, 60.0), "library": "ib_insync", "state_dir": self.folder}  # fmt: skip
        where = GatewayAddress("127.0.0.1", port, **{**options, **address})
        result = Result()
        with IBHistory(where, sleep=self.clock.sleep, now=lambda: NOW, clock=self.clock) as history:
            loads = [self._make_load(symbol, history) for symbol in symbols]
            for load, event in drive(loads, open_requests=open_requests, on_wait=lambda _, w: result.waits.append(w)):
                on_event(load.series.instrument.symbol, event)
        for load in loads:
            symbol = load.series.instrument.symbol
            result.reports[symbol] = load.report
            if symbol != unknown:
                result.verdicts[symbol] = self._check(load)
        return result

    def _make_load(self, symbol: str, history: IBHistory) -> Load:
        return Load(
            series_of(symbol),
            Window(START, NOW),
            store=self.store,
            history=lambda: history,
            limits=HistoryLimits.CLASSIC,
            now=lambda: NOW,
        )

    def _check(self, load: Load) -> Verdict:
        """The file against the truth. Nothing is invented, wrong or doubled; what is lost is reported as missing, and neither
        as absent nor as complete.

        Raises:
            AssertionError: one of these is not so.
        """
        series, report = load.series, load.report
        verdict = judge(self.store.csv_path(series), find_truth(series, START, NOW))
        assert not (verdict.invented or verdict.wrong or verdict.doubled), (str(series), verdict)
        assert report.missing_bars == len(verdict.lost), (str(series), report.as_dict(), show(verdict.lost))
        assert bool(report.failures) == bool(verdict.lost), (str(series), report.as_dict(), show(verdict.lost))
        absent = self.store.read_sidecar(series).proven_empty
        false = [s for s in verdict.lost if any(a.start.timestamp() <= s < a.end.timestamp() for a in absent)]
        assert not false, f"{series}: {show(false)} exist and are recorded as absent"
        spans = [done.partition.window for done in report.completed.values()]
        assert not [s for s in verdict.lost if any(w.start_s <= s < w.end_s for w in spans)], (
            f"{series}: false completion"
        )
        assert self.store.verify(series) == []
        for failure in report.failures:
            assert str(series) in str(failure.error), failure.error
        return verdict


# ---------------------------------------------------------------------------------------------------- between both ends


Mix = Callable[[list[bytes], Random], list[bytes]]


class Relay:
    """A port in front of a server; ``connect`` returns a socket to it. While it is off, connections end at once, old and new.
    Use as a context manager."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.is_off = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.switch_off()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for each in (self._listener, *self._sockets):
            each.close()

    def switch_off(self) -> None:
        """End all connections, and accept none any more."""
        self.is_off = True
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def switch_on(self) -> None:
        """Accept connections again."""
        self.is_off = False

    def _start(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_off:
                    client.close()
                    continue
                server = self._connect()
                self._sockets += [client, server]
                self._start(self._pass_on, client, server)
                self._start(self.bring_back, server, client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def bring_back(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what the server sends."""
        self._pass_on(source, target)


class Mixer(Relay):
    """Stands in front of the gateway on ``port``: its answers to history requests that arrive within ``collect_s`` of each other
    are given to ``mix``, and sent as it returns them, in pieces of odd sizes."""

    def __init__(self, port: int, mix: Mix, *, collect_s: float = 0.05, seed: int = 1) -> None:
        super().__init__(lambda: socket.create_connection(("127.0.0.1", port)))
        self._mix, self._collect_s, self._chance = mix, collect_s, Random(seed)

    def bring_back(self, source: socket.socket, target: socket.socket) -> None:
        frames, kept = FrameDecoder(), list[bytes]()
        with suppress(OSError):
            while True:
                source.settimeout(self._collect_s if kept else None)
                try:
                    data = source.recv(65536)
                except TimeoutError:
                    self._send(target, self._mix(kept, self._chance))
                    kept = []
                    continue
                if not data:
                    break
                for payload in frames.feed(data):
                    if split_fields(payload)[0] == "17":
                        kept.append(payload)
                    else:
                        self._send(target, [payload])
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _send(self, target: socket.socket, payloads: Sequence[bytes]) -> None:
        data = b"".join(frame(payload) for payload in payloads)
        while data:
            size = self._chance.choice((1, 3, 7, 1000, 4096, len(data)))
            target.sendall(data[:size])
            data = data[size:]


def error_about(req_id: object, code: int, text: str) -> bytes:
    """The payload of an error message."""
    return encode(4, 2, req_id, code, text, "")[4:]


def id_of(answer: bytes) -> str:
    """The request id of an answer with bars."""
    return split_fields(answer)[1]


# ---------------------------------------------------------------------------------------------------- random faults


@dataclass(frozen=True)
class Trial:
    """A random job: ``symbols`` with ``rules`` in the first of two loads. ``permanent``: series that IB refuses."""

    symbols: Sequence[str]
    rules: Sequence[FaultRule]
    permanent: frozenset[str]

    @classmethod
    def of(cls, seed: int) -> Trial:
        """One to eight series, one to three faults."""
        chance = Random(seed)
        symbols = chance.sample(SYMBOLS, chance.randint(1, 8))
        most = 7 * len(symbols)
        rules, permanent = [], set()
        for _ in range(chance.randint(1, 3)):
            kind = chance.choice(sorted(_AMOUNTS))
            hits = 1 if kind == "no_data_lie" else chance.choice((1, 1, 2, min(5, most)))  # two agree, and are believed
            nth = tuple(sorted(chance.sample(range(1, most + 1), hits)))
            amounts = dict(_AMOUNTS[kind])
            if kind == "no permission":
                permanent.add(symbol := chance.choice(symbols))
                rules.append(FaultRule("error", symbol=symbol, **amounts))
            else:
                rules.append(FaultRule(amounts.pop("kind", kind), nth=nth, **amounts))
        return cls(symbols, rules, frozenset(permanent))

    def play(self, folder: Path) -> tuple[Result, Result, int]:
        """The load with faults and the one after it; and the fewest requests that both could need.

        Raises:
            AssertionError: a promise of `OverlapBench.load` is broken.
        """
        bench = OverlapBench(folder)
        with run_in_thread(
            SyntheticMarket(), judge=False, clock=NOW.timestamp, faults=self.rules, latency_s=0.01
        ) as gateway:
            first = bench.load(gateway.port, self.symbols, request_timeout_s=0.5, probe_timeout_s=0.5)
            assert count_sent(gateway) <= first.requests, "requests that no load counts"
        with run_in_thread(SyntheticMarket(), judge=False, clock=NOW.timestamp) as gateway:
            second = bench.load(gateway.port, self.symbols)
        return first, second, 7 * len(self.symbols)


_162 = "Historical Market Data Service error message:"
_AMOUNTS: dict[str, dict[str, Any]] = {
    "pacing": {},
    "pacing 420": {
        "kind": "error",
        "code": 420,
        "text": "Invalid Real-time Query:Historical data request pacing violation",
    },
    "silent": {},
    "late": {},
    "slow": {"seconds": 0.2},
    "drop_after": {"after_bytes": 3000},
    "drop before": {"kind": "drop_after", "after_bytes": 0},
    "restart": {"seconds": 0.3},
    "hang": {"seconds": 0.8},
    "link_down": {"seconds": 0.3},
    "link lost": {"kind": "link_down", "seconds": 0.3, "back": 1101, "meanwhile": "lost"},
    "farm_down": {"seconds": 0.3, "meanwhile": "lost"},
    "farm empty": {"kind": "farm_down", "seconds": 0.3, "back": 2107, "meanwhile": "empty"},
    "no permission": {"code": 162, "text": f"{_162}No market data permissions for NYSE STK"},
    "unknown 162": {"kind": "error", "code": 162, "text": f"{_162}unexpected failure"},
    "query_cancelled": {},
    "unknown_query": {},
    "partial": {},
    "gap": {"rows": 7},
    "empty": {},
    "no_data_lie": {},
    "duplicate": {"rows": 5},
    "out_of_order": {"rows": 9},
}


def count_sent(gateway: GatewayThread) -> int:
    """History requests that the gateway received."""
    return sum(record.kind != "cancel" for record in gateway.requests)
