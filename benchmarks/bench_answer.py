"""One answer of 7,800 bars from the wire to the CSV, of the client library's decode rate: without Dagster, and with it.

CPU of this process (the gateway has one of its own), in a process that has loaded before. Without Dagster: load machine,
validation, ledger, store. With it: a whole run of Dagster in this process; and what the run of one answer of 20 days takes
more than that of one day. The rival: the library's decoder alone, which makes an object of each bar and checks and keeps
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

from gateway import run_gateway
from loading import load_minutes, open_history
from measuring import best, best_of_each
from rows import print_row

from ktrdr_pipelines.bars.answer import normalise_answer
from ktrdr_pipelines.bars.schema import latest_closes
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits
from ktrdr_pipelines.ib.wire.decoding import columns_from_bars, read_bars_message
from ktrdr_pipelines.ib.wire.library import load_library
from ktrdr_pipelines.services.load import load_series
from ktrdr_pipelines.settings import load_settings
from ktrdr_pipelines.store.store import Store

SYMBOLS = ("AAPL", "MSFT", "SPY", "GOOG", "AMZN", "NVDA", "IBM")
START, ONE_DAY, TWENTY_DAYS = "2024-01-02", "2024-01-03", "2024-01-31"
BARS, DAY_BARS = 7_800, 390
START_S = 1_704_205_800


def payload_of(count: int) -> bytes:
    """A bars message."""
    fields = ["17", "1", "start", "end", str(count)]
    for i in range(count):
        price = 100 + i % 77 / 8
        fields += map(str, (START_S + 60 * i, price, price + 1, price - 1, price, i % 1000, price, i % 50))
    return "\0".join(fields).encode()


def decode_with_library(payload: bytes) -> Callable[[], None]:
    library = load_library("ib_insync")

    def decode() -> None:
        bars: list[object] = []
        wrapper = SimpleNamespace(historicalData=lambda _, bar: bars.append(bar), historicalDataEnd=lambda *_: None)
        library.decoder(wrapper, 176).interpret(payload.decode().split("\0"))

    return decode


def decode_here(payload: bytes, count: int) -> Callable[[], None]:
    library, window = load_library("ib_insync"), Window.from_epoch(START_S, START_S + 60 * count)
    series = Series(stock("BENCH"), TIMEFRAMES["1m"])

    def decode() -> None:
        raw = columns_from_bars(read_bars_message(payload.decode().split("\0")), library.parse_time, intraday=True)
        normalise_answer(raw, series, window, now_s=2e9, closes_s=latest_closes(series.timeframe, raw.opens_s))

    return decode


def print_rate(what: str, bars: int, seconds: float, decode_s: float, at_least: float | None = None) -> None:
    print_row(
        f"{what}: bars a second of CPU", bars / seconds, "bars", against=BARS / decode_s, of="client library decodes",
        at_least=at_least, reach_unit="%",
    )  # fmt: skip


def measure_machine(decode: Callable[[], None], port: int, folder: Path) -> None:
    """Without Dagster; the best of several symbols, the first of which warms the process up."""
    store = Store(folder / "without")
    took, decoded = [], []
    with open_history(port, folder) as history:
        for symbol in SYMBOLS:
            began = time.process_time()
            report = load_minutes(history, store, symbol, START, TWENTY_DAYS, HistoryLimits.CURRENT)
            took.append(time.process_time() - began)
            assert (report.fetched_bars, report.ib_requests_made) == (BARS, 1), report
            decoded.append(best(decode))
    print_rate("one answer of 7,800 bars, wire to CSV, without Dagster", BARS, min(took), min(decoded), 70)


def measure_runs(decode: Callable[[], None], port: int, folder: Path) -> None:
    settings = load_settings(
        data_dir=folder / "data", dagster_home=folder / "home", ib_host="127.0.0.1", ib_port=port,
        history_limits=HistoryLimits.CURRENT,
    )  # fmt: skip
    took: dict[str, list[float]] = {ONE_DAY: [], TWENTY_DAYS: []}
    for number, symbol in enumerate(SYMBOLS[:6]):
        end = (ONE_DAY, TWENTY_DAYS)[number % 2]
        request = LoadRequest.parse(symbol, "1m", "full", start=START, end=end, now=datetime.now(UTC))
        began = time.process_time()
        report = load_series(request, settings=settings).report
        took[end].append(time.process_time() - began)
        assert not report.failures and report.ib_requests_made == 1
    decode_s, long_s, short_s = best(decode, 9), min(took[TWENTY_DAYS]), min(took[ONE_DAY])
    more_s = max(long_s - short_s, 1e-9)
    print_rate(
        "one answer of 7,800 bars with Dagster, beyond an answer of one day", BARS - DAY_BARS, more_s, decode_s, 25
    )
    print_rate("one answer of 7,800 bars with Dagster, the whole run in a warm process", BARS, long_s, decode_s)


def main() -> None:
    asyncio.set_event_loop(asyncio.new_event_loop())  # the library asks for one when it is imported
    logging.getLogger("ib_insync").setLevel(logging.CRITICAL)
    payload = payload_of(BARS)
    theirs = decode_with_library(payload)
    ours_s, theirs_s = best_of_each(decode_here(payload, BARS), theirs, repeats=9)
    print_rate("one answer of 7,800 bars, wire to a checked table", BARS, ours_s, theirs_s)
    with run_gateway("--no-judge") as gateway, tempfile.TemporaryDirectory(prefix="bench_answer_") as folder:
        measure_machine(theirs, gateway.port, Path(folder))
        measure_runs(theirs, gateway.port, Path(folder))


if __name__ == "__main__":
    main()
