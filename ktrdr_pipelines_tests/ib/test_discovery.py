"""What a symbol means: asked of IB, never guessed, remembered for a while; and where history starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ktrdr_pipelines.domain.instruments import Instrument, Series, stock
from ktrdr_pipelines.domain.load_request import Choice
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import BugError, InputError, KtrdrError, PermanentError
from ktrdr_pipelines.ib.contracts import AmbiguousSymbol, ContractInfo, EmptyContractAnswer
from ktrdr_pipelines.ib.discovery import discover, estimate_history_start, identify_series, symbols_file
from ktrdr_pipelines.ib.history import GatewayAddress, IBHistory
from ktrdr_pipelines.ib.symbol_cache import FOUND_KEPT, NONE_KEPT, KnownSymbols
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.listings import list_instruments
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines.universe.file import DEFAULT_UNIVERSE, add_series, parse_universe, read_universe
from ktrdr_pipelines_tests.fakes import TIMEOUTS, MovingClock
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY

NOON = datetime(2025, 6, 11, 16, 0, tzinfo=UTC)
Connect = Callable[..., IBHistory]


class Now:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def connect(tmp_path: Path, now: Now) -> Iterator[Connect]:
    clock = MovingClock()
    with ExitStack() as running:

        def make(port: int) -> IBHistory:
            quick: dict[str, Any] = {**TIMEOUTS, "retry_waits_s": (), "request_timeout_s": 10}
            address = GatewayAddress("127.0.0.1", port, state_dir=tmp_path, library=LIBRARY, **quick)
            return running.enter_context(IBHistory(address, sleep=clock.sleep, now=now, clock=clock))

        yield make


@pytest.fixture
def history(start_gateway: Any, connect: Connect, now: Now) -> IBHistory:
    return connect(start_gateway(clock=lambda: now().timestamp()).port)


@pytest.mark.parametrize(
    ("symbol", "choice", "meant"),
    [
        ("eur.usd", Choice(), ("EURUSD", "CASH", "IDEALPRO", "USD", "EUR", "", "MIDPOINT")),
        ("aapl", Choice(), ("AAPL", "STK", "SMART", "USD", "AAPL", "", "TRADES")),
        ("SPY", Choice(), ("SPY", "STK", "SMART", "USD", "SPY", "", "TRADES")),
        ("BRK B", Choice(), ("BRK B", "STK", "SMART", "USD", "BRK B", "", "TRADES")),
        ("BRK.B", Choice(), ("BRK B", "STK", "SMART", "USD", "BRK B", "", "TRADES")),
        ("SAP", Choice(), ("SAP", "STK", "SMART", "EUR", "SAP", "", "TRADES")),
        ("AAPL", Choice(currency="mxn"), ("AAPL", "STK", "SMART", "MXN", "AAPL", "", "TRADES")),
        ("AAPL", Choice(exchange="MEXI", currency="MXN"), ("AAPL", "STK", "SMART", "MXN", "AAPL", "", "TRADES")),
        ("ESZ4", Choice(), ("ESZ4", "FUT", "CME", "USD", "ES", "202412", "TRADES")),
        ("ES", Choice("FUT", con_id=495500003), ("ESZ4", "FUT", "CME", "USD", "ES", "202412", "TRADES")),
        ("ES", Choice("CONTFUT", "CME"), ("ES", "CONTFUT", "CME", "USD", "ES", "", "TRADES")),
        ("SPX", Choice("IND", "CBOE"), ("SPX", "IND", "CBOE", "USD", "SPX", "", "TRADES")),
        ("BTC", Choice("CRYPTO"), ("BTC", "CRYPTO", "PAXOS", "USD", "BTC", "", "AGGTRADES")),
        ("AMBG", Choice(con_id=900002), ("AMBG", "STK", "SMART", "USD", "AMBG", "", "TRADES")),
    ],
)
def test_a_symbol_becomes_one_described_and_pinned_instrument(
    history: IBHistory, tmp_path: Path, symbol: str, choice: Choice, meant: tuple[str, ...]
) -> None:
    """Every kind; what comes out can be put into the universe and is read back as it was."""
    found = discover(symbol, choice=choice, history=history)
    got = found.instrument
    assert meant == (got.symbol, got.sec_type, got.exchange, got.currency, got.ib_symbol, got.expiry, got.what_to_show)
    assert (got.con_id > 0) == (got.sec_type != "CONTFUT")
    for fact in (found.contract.long_name, found.contract.time_zone, found.contract.trading_hours):
        assert fact
    path = tmp_path / "universe.yaml"
    path.write_text("series: []\n")
    series = Series(got, TIMEFRAMES["1d"])
    add_series(path, series)
    (again,) = read_universe(path)
    assert (again, again.instrument.con_id) == (series, got.con_id)
    assert history.pin(again.instrument).con_id == got.con_id


def test_ambiguity_shows_every_candidate_and_chooses_none(history: IBHistory) -> None:
    """Two companies, all expiries of a future: each with what distinguishes it, and how to choose."""
    with pytest.raises(AmbiguousSymbol) as caught:
        discover("AMBG", history=history)
    assert {each.con_id for each in caught.value.candidates} == {900001, 900002}
    for words in ("conId 900001", "conId 900002", "HOLDINGS", "GROWTH FUND", "NYSE", "ARCA", "--con-id", "--exchange"):
        assert words in str(caught.value)
    assert discover("AMBG", choice=Choice(exchange="ARCA"), history=history).instrument.con_id == 900002
    with pytest.raises(AmbiguousSymbol) as futures:
        discover("ES", history=history)
    assert "--sec-type CONTFUT" in futures.value.advice
    assert "CONTFUT" not in caught.value.advice
    codes = [each.local_symbol for each in futures.value.candidates]
    assert len(codes) >= 10
    assert all(code in str(futures.value) for code in codes)


def test_a_con_id_of_another_symbol_is_refused(history: IBHistory) -> None:
    """A mistyped number must not put another company's bars into this symbol's file."""
    with pytest.raises(InputError, match=r"is MSFT .*, not AAPL"):
        discover("AAPL", choice=Choice(con_id=265100), history=history)
    with pytest.raises(PermanentError):
        discover("AAPL", choice=Choice(con_id=1), history=history)


def test_a_misspelling_is_answered_with_symbols_like_it(history: IBHistory) -> None:
    """What was tried, in order, and IB's own suggestions."""
    with pytest.raises(PermanentError) as caught:
        discover("APPL", history=history)
    assert "tried as STK APPL USD, STK APPL, FUT APPL" in str(caught.value)
    assert "similar: AAPL STK NASDAQ USD APPLE INC" in str(caught.value)
    with pytest.raises(PermanentError, match="tried as CASH XXX ZZZ, STK XXXZZZ USD"):
        discover("XXXZZZ", history=history)


@pytest.mark.parametrize(
    "choice", [{"sec_type": "OPT"}, {"currency": "US"}, {"exchange": "../x"}, {"con_id": -1}, {"con_id": 1 << 70}]
)
def test_a_choice_that_cannot_be_meant_is_refused(choice: dict[str, Any]) -> None:
    """Before anything is asked."""
    with pytest.raises(InputError):
        Choice(**choice)


@pytest.mark.parametrize("doubt", [EmptyContractAnswer("an end and no word"), BugError("321 is no such pair")])
def test_a_type_that_was_only_guessed_is_no_obstacle(history: IBHistory, doubt: KtrdrError) -> None:
    """GOOGLE has the form of a pair. What IB does with that question decides nothing about the stock."""
    google = ContractInfo(1, "GOOGLE", "STK", "NASDAQ", "USD", valid_exchanges="SMART,NASDAQ")

    def describe(instrument: Instrument, _: str) -> list[ContractInfo]:
        if instrument.sec_type == "CASH":
            raise doubt
        return [google]

    history.describe = describe  # type: ignore[method-assign]
    assert discover("GOOGLE", history=history).contract == google


@pytest.mark.parametrize("doubt", [EmptyContractAnswer("an end and no word"), BugError("321 is no such pair")])
def test_an_answer_without_content_is_no_evidence_of_absence(history: IBHistory, doubt: KtrdrError) -> None:
    """Where IB has none of the other types, the doubt is raised, and it is not remembered."""

    def describe(instrument: Instrument, _: str) -> list[ContractInfo]:
        if instrument.sec_type == "STK":
            raise doubt
        return []

    ask = history.describe
    history.describe = describe  # type: ignore[method-assign]
    with pytest.raises(type(doubt)):
        discover("TSLA", history=history)
    history.describe = ask  # type: ignore[method-assign]
    assert discover("TSLA", history=history).instrument == stock("TSLA")


# -- what is remembered -----------------------------------------------------------------------------------------------------


def test_what_was_found_is_remembered_and_expires(start_gateway: Any, connect: Connect, now: Now) -> None:
    """A second process does not ask; after a day it does."""
    first, second, third = (connect(start_gateway(clock=lambda: now().timestamp()).port) for _ in range(3))
    known = symbols_file(first)
    found = discover("TSLA", history=first, known=known)
    asked: list[str] = []
    second.describe = lambda instrument, doing, call=None: asked.append(doing) or []  # type: ignore[method-assign, func-returns-value]
    assert discover("tsla", history=second, known=KnownSymbols(known.path, now)) == found
    assert [each.instrument for each in known.list_found()] == [found.instrument]
    assert (len(known.list_found("STK")), known.list_found("CASH")) == (1, [])
    assert asked == []
    now.at += FOUND_KEPT
    with pytest.raises(PermanentError):
        discover("TSLA", history=second, known=KnownSymbols(known.path, now))
    assert asked
    known.path.unlink()
    assert discover("TSLA", history=third, known=known).instrument == found.instrument


def test_an_answer_to_one_account_does_not_count_for_another(start_gateway: Any, connect: Connect, now: Now) -> None:
    """The simulator today and IB tomorrow, at one address: TSLA's conId of the one is Coca-Cola's at the other."""
    ids = {listing.symbol: listing.con_id for listing in list_instruments() if listing.currency == "USD"}
    swapped = {ids["TSLA"]: ids["KO"], ids["KO"]: ids["TSLA"]}
    elsewhere = tuple(replace(each, con_id=swapped.get(each.con_id, each.con_id)) for each in list_instruments())
    with run_in_thread(SyntheticMarket(), judge=False) as simulator:
        port = simulator.port
        assert discover("TSLA", history=connect(port)).instrument.con_id == ids["TSLA"]
    with run_in_thread(SyntheticMarket(listings=elsewhere), judge=False, account="DU1234567", port=port):
        assert discover("TSLA", history=connect(port)).instrument.con_id == ids["KO"]


def test_continuous_futures_are_remembered_side_by_side(history: IBHistory) -> None:
    """They have no conId that could distinguish them."""
    known = replace(symbols_file(history), account="DU1")
    es, nq = (Instrument(symbol, "CONTFUT", "CME", "USD") for symbol in ("ES", "NQ"))
    for future in (es, nq):
        known.remember(future.symbol, future, None)
    assert [each.instrument for each in symbols_file(history).list_found()] == [es, nq]
    known.remember_head(es, NOON)
    assert known.find_head(es) is not None
    assert known.find_head(nq) is None
    assert replace(known, account="DU2").find_head(es) is None


def test_that_there_is_none_is_remembered_for_minutes_only(history: IBHistory, now: Now) -> None:
    """Asked once within ten minutes, with the time when it will be asked again; then again."""
    with pytest.raises(PermanentError):
        discover("NOSUCH", history=history)
    history.describe = lambda *_: pytest.fail("asked again")  # type: ignore[method-assign]
    with pytest.raises(PermanentError, match="asked 2025-06-11T16:00:00Z, asked again after 2025-06-11T16:10:00Z"):
        discover("NOSUCH", history=history)
    assert timedelta(minutes=10) == NONE_KEPT
    now.at += NONE_KEPT
    history.describe = lambda *_: []  # type: ignore[method-assign]
    with pytest.raises(PermanentError):
        discover("NOSUCH", history=history)


def test_in_the_nightly_reset_nothing_unknown_is_remembered(tmp_path: Path) -> None:
    """At 00:10 New York valid contracts are unknown: the answer counts for nothing a minute later."""
    for at, is_kept in ((datetime(2025, 6, 11, 4, 10, tzinfo=UTC), False), (NOON, True)):
        known = KnownSymbols(tmp_path / f"{is_kept}.json", lambda at=at: at)
        known.remember("AAPL", None, None)
        assert (known.find("AAPL") is not None) == is_kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"symbols": 7}',
        '{"symbols": {"TSLA    ": {"until": "2099"}}, "heads": []}',
        "\0\0",
        "[" * 5000,
    ],
)
def test_a_damaged_memory_costs_a_question_and_no_more(history: IBHistory, text: str) -> None:
    """Garbage is as good as nothing, and is replaced by something whole."""
    known = symbols_file(history)
    known.path.parent.mkdir(parents=True, exist_ok=True)
    known.path.write_text(text)
    found = discover("TSLA", history=history)
    assert json.loads(known.path.read_text())["symbols"]
    assert [each.contract for each in known.list_found()] == [found.contract]


def test_a_memory_that_cannot_be_written_changes_nothing(history: IBHistory, tmp_path: Path) -> None:
    """The folder is a file: discovery works nevertheless."""
    (tmp_path / "blocked").write_text("")
    known = KnownSymbols(tmp_path / "blocked" / "symbols.json", history.now)
    assert discover("TSLA", history=history, known=known).instrument.symbol == "TSLA"


# -- the universe comes first -------------------------------------------------------------------------------------------------


def test_a_symbol_of_the_universe_is_the_instrument_of_the_universe(history: IBHistory) -> None:
    """A choice that differs is refused, one that agrees is taken; IB decides what the entry leaves open."""
    universe, hourly = DEFAULT_UNIVERSE, TIMEFRAMES["1h"]
    assert identify_series("EUR.USD", hourly, universe, history).instrument.symbol == "EURUSD"
    for choice in (Choice("STK"), Choice(con_id=265000), Choice(exchange="NASDAQ"), Choice(currency="USD")):
        assert identify_series("AAPL", hourly, universe, history, choice).instrument == stock("AAPL")
    for choice in (Choice("FUT"), Choice(con_id=900003), Choice(exchange="MEXI"), Choice(currency="MXN")):
        with pytest.raises(InputError, match="already has another instrument"):
            identify_series("AAPL", hourly, universe, history, choice)


def test_names_of_every_kind_work_in_the_universe() -> None:
    """`BRK B`, `EUR.USD` and `ESZ4` need no more than their name, and lead to files with different names."""
    universe = parse_universe(
        "series:\n- {symbol: BRK B, timeframes: [1d]}\n- {symbol: EUR.USD, sec_type: CASH, timeframes: [1d]}\n"
        "- {symbol: ESZ4, sec_type: FUT, exchange: CME, timeframes: [1d]}\n"
        "- {symbol: ES, sec_type: CONTFUT, exchange: CME, timeframes: [1d]}\n"
        "- {symbol: SPX, sec_type: IND, exchange: CBOE, timeframes: [1d]}\n"
        "- {symbol: AAPL-ADJ, ib_symbol: AAPL, what_to_show: ADJUSTED_LAST, timeframes: [1d]}\n"
    )
    assert [series.name for series in universe] == [
        "BRK_B_1d", "EURUSD_1d", "ESZ4_1d", "ES_1d", "SPX_1d", "AAPL_2D_ADJ_1d"
    ]  # fmt: skip
    kinds = {series.instrument.symbol: series.instrument for series in universe}
    assert kinds["ESZ4"].ib_symbol == "ES"
    assert (kinds["ES"].ends_now, kinds["AAPL-ADJ"].ends_now, kinds["ESZ4"].ends_now) == (True, True, False)
    assert [s for s, i in kinds.items() if not i.has_volume] == ["EURUSD", "SPX"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{symbol: ES, sec_type: FUT, exchange: CME, timeframes: [1d]}", "expiry"),
        ("{symbol: EURUSD, sec_type: CASH, what_to_show: ADJUSTED_LAST, timeframes: [1d]}", "ADJUSTED_LAST"),
        ("{symbol: EURUSD, sec_type: CASH, what_to_show: TRADES, timeframes: [1d]}", "TRADES"),
        ("{symbol: ESZ4, sec_type: FUT, exchange: CME, expiry: '202413', timeframes: [1d]}", "202413"),
    ],
)
def test_an_entry_that_leaves_the_contract_open_is_refused(entry: str, words: str) -> None:
    """A future without an expiry or with one that is no month, prices that its kind does not have."""
    with pytest.raises(InputError, match=words):
        parse_universe(f"series:\n- {entry}\n")


def test_a_future_is_found_by_its_code_alone(history: IBHistory) -> None:
    """An entry with a code and no expiry is asked for by that code, and an expired one is found for two years."""
    wanted = Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES")
    assert history.pin(wanted).con_id == 495500003
    with pytest.raises(PermanentError):
        history.pin(replace(wanted, symbol="ESF4"))


# -- where history starts -------------------------------------------------------------------------------------------------------

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)


def test_a_head_timestamp_is_checked_remembered_and_cancelled(start_gateway: Any, connect: Connect, now: Now) -> None:
    """One head and one long daily request, whose bars before the head disprove it; asked once for all processes."""
    rblx = Series(stock("RBLX"), TIMEFRAMES["1h"])
    gateway = start_gateway(clock=lambda: now().timestamp())
    start = estimate_history_start(rblx, connect(gateway.port), earliest=EARLIEST, now=NOON)
    assert start == datetime(2021, 3, 3, 14, 30, tzinfo=UTC)
    assert [(r.kind, r.bar_size, r.duration) for r in gateway.requests][:2] == [
        ("head", "", ""), ("history", "1 day", "1 Y")
    ]  # fmt: skip
    again = connect(gateway.port)
    assert estimate_history_start(rblx, again, earliest=EARLIEST, now=NOON) == start
    assert sum(r.kind == "head" for r in gateway.requests) == 1


def test_bars_before_the_head_timestamp_move_the_start(start_gateway: Any, connect: Connect, now: Now) -> None:
    """A head timestamp that is months too late is corrected; one that is years too late is not believed at all."""
    market = SyntheticMarket()
    true_head = market.head
    late = {"RBLX": 120 * 86400, "AAPL": 5 * 365 * 86400}
    market.head = lambda listing, what, *, regular: (  # type: ignore[method-assign]
        (true_head(listing, what, regular=regular) or 0) + late[listing.symbol]
    )
    gateway = start_gateway(market=market, clock=lambda: now().timestamp())
    history = connect(gateway.port)
    moved = estimate_history_start(Series(stock("RBLX"), TIMEFRAMES["1h"]), history, earliest=EARLIEST, now=NOON)
    assert moved == datetime(2021, 3, 3, tzinfo=UTC)
    never = estimate_history_start(Series(stock("AAPL"), TIMEFRAMES["1h"]), history, earliest=EARLIEST, now=NOON)
    assert never == EARLIEST


def test_a_head_timestamp_in_the_future_is_not_believed_and_not_remembered(
    start_gateway: Any, connect: Connect, now: Now
) -> None:
    """A hint that cannot be true is as good as none; the fault is IB's."""
    market = SyntheticMarket()
    true_head = market.head
    market.head = lambda *_, **__: int(NOON.timestamp()) + 90 * 86400  # type: ignore[method-assign]
    gateway = start_gateway(market=market, clock=lambda: now().timestamp())
    rblx = Series(stock("RBLX"), TIMEFRAMES["1h"])
    assert estimate_history_start(rblx, connect(gateway.port), earliest=EARLIEST, now=NOON) == EARLIEST
    market.head = true_head  # type: ignore[method-assign]
    assert estimate_history_start(rblx, connect(gateway.port), earliest=EARLIEST, now=NOON).year == 2021


def test_without_an_answer_to_the_check_the_hint_stays_a_hint(start_gateway: Any, connect: Connect) -> None:
    """A refused daily request fails no load."""
    gateway = start_gateway([FaultRule("error", code=162, text="odd", on="history")])
    start = estimate_history_start(
        Series(stock("RBLX"), TIMEFRAMES["1h"]), connect(gateway.port), earliest=EARLIEST, now=NOON
    )
    assert start.date().isoformat() == "2021-03-03"


def test_short_bars_begin_six_months_back_and_continuous_futures_where_one_request_reaches(
    start_gateway: Any, connect: Connect
) -> None:
    """The widest range by timeframe; for what is served only up to now nothing is asked."""
    gateway = start_gateway()
    history = connect(gateway.port)
    short = estimate_history_start(Series(stock("RBLX"), TIMEFRAMES["30s"]), history, earliest=EARLIEST, now=NOON)
    assert short == TIMEFRAMES["30s"].retained_from(NOON)
    before = len(gateway.requests)
    es = Series(Instrument("ES", "CONTFUT", "CME", "USD"), TIMEFRAMES["1d"])
    assert 360 <= (NOON - estimate_history_start(es, history, earliest=EARLIEST, now=NOON)).days <= 366
    assert len(gateway.requests) == before


def test_the_simulator_lists_one_of_every_kind() -> None:
    """So that each of them can be tried."""
    assert {x.sec_type for x in list_instruments()} == {"STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO"}
