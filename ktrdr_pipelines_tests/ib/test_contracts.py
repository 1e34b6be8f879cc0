"""Which contract is meant: never the first of several, and never another than asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ktrdr_pipelines.domain.instruments import Instrument, forex, stock
from ktrdr_pipelines.errors import InputError, KtrdrError, PermanentError
from ktrdr_pipelines.ib.contracts import ContractInfo, choose_contract, list_candidates, pin_contract

NASDAQ = ContractInfo(265598, "AAPL", "STK", "SMART", "USD", "NASDAQ", long_name="APPLE INC", time_zone="US/Eastern")
MEXICO = ContractInfo(38708077, "AAPL", "STK", "SMART", "USD", "MEXI", long_name="APPLE INC-MX")
EURO = ContractInfo(273544, "AAPL", "STK", "SMART", "EUR", "IBIS")
CRUDE = ContractInfo(
    304037456, "CL", "FUT", "NYMEX", "USD", local_symbol="CLZ4", expiry="20241120", contract_month="202412"
)


def test_one_that_fits_is_chosen_among_others() -> None:
    """Currency and kind sort out what was not asked for, wherever in the list it stands; repeats are one contract."""
    option = replace(NASDAQ, con_id=5, sec_type="OPT")
    for offered in ([EURO, option, NASDAQ], [NASDAQ, EURO, option], [NASDAQ, NASDAQ, replace(NASDAQ, exchange="ARCA")]):
        assert choose_contract(stock("AAPL"), offered).con_id == 265598


def test_ambiguity_lists_every_candidate() -> None:
    """Several contracts are an error that shows each with its conId and name; none is guessed."""
    with pytest.raises(InputError) as caught:
        choose_contract(stock("AAPL"), [NASDAQ, MEXICO])
    for words in ("conId 265598", "NASDAQ", "conId 38708077", "MEXI", "con_id (or primary_exchange)"):
        assert words in str(caught.value)


def test_the_con_id_decides() -> None:
    """A conId picks its contract and no other, whatever else fits."""
    wanted = Instrument("AAPL", "STK", "SMART", "USD", con_id=38708077)
    assert choose_contract(wanted, [NASDAQ, MEXICO]) is MEXICO
    with pytest.raises(PermanentError):
        choose_contract(wanted, [NASDAQ])


def test_the_primary_exchange_decides() -> None:
    """By IB's primary exchange; where IB names none, by wherever the contract trades."""
    wanted = stock("AAPL", primary_exchange="NASDAQ")
    assert choose_contract(wanted, [MEXICO, NASDAQ]) is NASDAQ
    silent = replace(NASDAQ, primary_exchange="", valid_exchanges="SMART,AMEX,NASDAQ,ARCA")
    assert choose_contract(wanted, [MEXICO, silent]) is silent
    with pytest.raises(PermanentError):
        choose_contract(wanted, [MEXICO])


@pytest.mark.parametrize(
    ("expiry", "fits"), [("202412", True), ("20241120", True), ("202411", False), ("20241121", False)]
)
def test_a_future_is_found_by_its_month_or_its_last_day(expiry: str, fits: bool) -> None:
    """The December crude contract trades last in November: contract month and last day mean it, the last day's month does not."""
    wanted = Instrument("CLZ4", "FUT", "NYMEX", "USD", ib_symbol="CL", expiry=expiry)
    if fits:
        assert choose_contract(wanted, [CRUDE]) is CRUDE
    else:
        with pytest.raises(PermanentError, match="20241120"):
            choose_contract(wanted, [CRUDE])


@pytest.mark.parametrize(("offered", "words"), [([], "it offered: nothing"), ([EURO], "AAPL STK IBIS EUR")])
def test_without_a_fit_the_offers_are_listed(offered: list[ContractInfo], words: str) -> None:
    """What IB knows instead helps to correct the request."""
    with pytest.raises(PermanentError, match=words):
        choose_contract(stock("AAPL"), offered)


def test_pinning_keeps_who_the_instrument_is() -> None:
    """conId and zone are added; name, hours and equality stay, so that keys and files do."""
    pinned = pin_contract(stock("AAPL"), NASDAQ)
    assert (pinned.con_id, pinned.time_zone) == (265598, "US/Eastern")
    assert pinned == stock("AAPL")


@pytest.mark.parametrize(
    ("symbol", "kinds"),
    [
        ("EURUSD", ["CASH", "STK", "FUT"]),
        ("eur.usd", ["CASH", "STK", "FUT"]),
        ("AAPL", ["STK", "FUT"]),
        ("BRK B", ["STK", "FUT"]),
        ("GOOGLE", ["CASH", "STK", "FUT"]),
    ],
)
def test_a_bare_symbol_is_tried_as_a_pair_a_stock_and_a_future(symbol: str, kinds: list[str]) -> None:
    """The specification's order of discovery; a stock in US dollars first, then in any currency."""
    found = list_candidates(symbol)
    assert list(dict.fromkeys(candidate.sec_type for candidate in found)) == kinds
    assert [candidate.currency for candidate in found if candidate.sec_type == "STK"][:2] == ["USD", ""]


def test_a_pair_is_described_as_ib_wants_it() -> None:
    """Base as symbol, quote as currency."""
    assert list_candidates(" eurusd ")[0] == forex("EURUSD")


@pytest.mark.parametrize("symbol", ["", "  ", "../x", "A" * 40])
def test_what_is_no_symbol_is_refused(symbol: str) -> None:
    """Nothing is asked of IB for what cannot be a symbol."""
    with pytest.raises(InputError):
        list_candidates(symbol)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Instrument("AAPL", "STK", "SMART", "USD", con_id=2), "no STK with conId 2 in USD .*AAPL STK MEXI MXN"),
        (Instrument("AAPL", "CFD", "SMART", "MXN", con_id=2), "no CFD with conId 2"),
        (Instrument("KO", "STK", "SMART", "MXN", con_id=2), "conId 2 is AAPL STK MEXI MXN .*not KO"),
        (Instrument("AAPL", "STK", "SMART", "MXN", con_id=3), "no STK with conId 3"),
    ],
)
def test_a_con_id_of_another_instrument_is_refused(wanted: Instrument, words: str) -> None:
    """It would bring bars in another currency, or of another company, under this one's name."""
    with pytest.raises(KtrdrError, match=words):
        choose_contract(wanted, [ContractInfo(2, "AAPL", "STK", "MEXI", "MXN", long_name="APPLE INC")])


@pytest.mark.parametrize(
    "wanted",
    [
        Instrument("AAPL-MX", "STK", "SMART", "MXN", ib_symbol="AAPL", con_id=2),
        Instrument("AAPL", "STK", "MEXI", "", primary_exchange="ELSEWHERE", con_id=2),
    ],
)
def test_a_con_id_decides_where_the_rest_leaves_it_open(wanted: Instrument) -> None:
    info = ContractInfo(2, "AAPL", "STK", "MEXI", "MXN")
    assert choose_contract(wanted, [info]) is info
    nameless = replace(info, symbol="", sec_type="", currency="")  # a gateway that sends hardly any fields
    assert choose_contract(wanted, [nameless]) is nameless


def test_without_a_contract_month_the_last_day_decides() -> None:
    """A gateway that leaves the contract month out is understood by the last trade date."""
    wanted = Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES", expiry="202412")
    info = ContractInfo(1, "ES", "FUT", "CME", "USD", expiry="20241220")
    assert choose_contract(wanted, [info, replace(info, con_id=2, expiry="20250321")]) is info
