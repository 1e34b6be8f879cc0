"""Message layouts by protocol version, field by field, as the client libraries read and write them."""

from __future__ import annotations

import pytest

from ktrdr_pipelines.simulator.market import ContractQuery
from ktrdr_pipelines.simulator.messages import (
    HistoryRequest,
    MessageError,
    StartApi,
    build_contract_details,
    build_error,
    build_history_head,
    build_symbol_samples,
    parse_message,
    parse_versions,
)

from .talk import MARKET, Talk, history

APPLE = MARKET.listings[0]


@pytest.mark.parametrize(
    ("text", "versions"), [("v157..176", (157, 176)), ("v100..157 +PACEAPI", (100, 157)), ("v176", (176, 176))]
)
def test_version_ranges_are_read(text, versions):
    """Lowest and highest; options after a space do not matter."""
    assert parse_versions(text) == versions


@pytest.mark.parametrize("text", ["", "v", "157..176", "v..176", "va..b", "v1..2..3", "v" + "9" * 20, "v１５７..176"])
def test_other_texts_are_no_version_range(text):
    """Half a range, foreign digits or absurdly long numbers are refused."""
    with pytest.raises(MessageError):
        parse_versions(text)


CONTRACT = ["8314", "IBM", "STK", "", "0.0", "", "", "SMART", "NYSE", "USD", "IBM", "IBM", "1"]
QUERY = ContractQuery(8314, "IBM", "STK", "", "0.0", "", "", "SMART", "NYSE", "USD", "IBM", "IBM", True)


def test_history_request_of_present_versions():
    """Since version 124 there is no version field, and keepUpToDate at the end."""
    fields = ["20", "5", *CONTRACT, "20240301-21:00:00", "1 hour", "1 D", "1", "TRADES", "2", "1", ""]
    assert parse_message(fields, 176) == HistoryRequest(
        5, QUERY, "20240301-21:00:00", "1 hour", "1 D", True, "TRADES", "2", True
    )


def test_history_request_of_old_versions():
    """Before 124 a version field came second and nothing was kept up to date."""
    fields = ["20", "6", "5", *CONTRACT, "", "1 hour", "1 D", "0", "TRADES", "1", ""]
    assert parse_message(fields, 123) == HistoryRequest(5, QUERY, "", "1 hour", "1 D", False, "TRADES", "1", False)


def test_legs_of_a_combination_are_skipped():
    """Four fields a leg lie between the format and keepUpToDate."""
    contract = ["0", "X", "BAG", *CONTRACT[3:]]
    legs = ["2", "1", "1", "BUY", "SMART", "2", "1", "SELL", "SMART"]
    parsed = parse_message(["20", "5", *contract, "", "1 hour", "1 D", "1", "TRADES", "2", *legs, "1", ""], 176)
    assert isinstance(parsed, HistoryRequest)
    assert parsed.keep_up_to_date


def test_start_is_read_with_and_without_capabilities():
    """Clients before version 72 send none; the gateway needs none."""
    assert parse_message(["71", "2", "7", "x"], 176) == StartApi(7)
    assert parse_message(["71", "1", "7"], 100) == StartApi(7)


def test_errors_gain_a_field_with_version_166():
    """The rejection details of advanced orders, always empty here; since 153 text is ASCII."""
    assert build_error(157, 3, 200, "none") == (4, 2, 3, 200, "none")
    assert build_error(166, 3, 200, "none") == (4, 2, 3, 200, "none", "")
    assert build_error(153, -1, 1, "históricos")[4] == "hist\\xf3ricos"
    assert build_error(150, -1, 1, "históricos")[4] == "históricos"


@pytest.mark.parametrize(
    ("version", "count"),
    [(100, 32), (110, 33), (121, 34), (122, 36), (126, 37), (134, 38), (152, 39), (163, 40), (164, 40), (178, 40)],
)
def test_contract_details_grow_with_the_version(version, count):
    """Each version adds its fields; 164 drops message version and size multiplier and brings three sizes."""
    assert len(build_contract_details(version, 1, APPLE, "SMART", "", "")) == count


def test_history_head_and_rows_of_old_versions():
    """Before 124: a version field, and whether a bar has gaps before its count."""
    assert build_history_head(123, 1, "a", "b", 2) == (17, 3, 1, "a", "b", 2)
    assert build_history_head(124, 1, "a", "b", 2) == (17, 1, "a", "b", 2)
    (answer,) = Talk(version=123).send(20, 6, *history(5)[1:-2], "")
    assert answer[:3] == ["17", "3", "5"]
    assert len(answer) == 6 + 7 * 9
    assert answer[6 + 7] == "false"


def test_symbol_samples_gain_a_description():
    """Since 176 with a name and an issuer."""
    assert len(build_symbol_samples(175, 1, [APPLE])) == 3 + 6 + len(APPLE.derivatives)
    assert build_symbol_samples(176, 1, [APPLE])[-2:] == ("APPLE INC", "")
