"""Promises of the routes about symbols: one contract or a refusal that lists them, a choice, and what is remembered."""

from __future__ import annotations

from pathlib import Path

from ktrdr_pipelines_tests.api.conftest import OpenApi, problem_of, settings_in
from ktrdr_pipelines_tests.conftest import StartGateway

DISCOVER = "/api/v1/ib/symbols/discover"


def test_several_contracts_are_listed_and_a_choice_decides(
    open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Never the first one: the refusal names both companies, and the conId chosen is the one answered."""
    client = open_api(settings_in(tmp_path, start_gateway().port))
    refused = client.post(DISCOVER, json={"symbol": "AMBG"})
    assert refused.status_code == 422
    assert all(con_id in problem_of(refused)["message"] for con_id in ("900001", "900002"))
    chosen = client.post(DISCOVER, json={"symbol": "AMBG", "con_id": 900002})
    assert (chosen.status_code, chosen.json()["con_id"], chosen.json()["sec_type"]) == (200, 900002, "STK")


def test_a_misspelt_symbol_is_not_found_and_similar_ones_are_offered(
    open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """404, with what IB has that is like it."""
    client = open_api(settings_in(tmp_path, start_gateway().port))
    refused = client.post(DISCOVER, json={"symbol": "APPL"})
    assert refused.status_code == 404
    assert "AAPL" in problem_of(refused)["message"]


def test_what_was_discovered_is_remembered_and_can_be_filtered(
    open_api: OpenApi, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """A future that no universe names is listed after it was asked for; IB is not asked again."""
    gateway = start_gateway()
    client = open_api(settings_in(tmp_path, gateway.port))
    listed = "/api/v1/ib/symbols/discovered"
    assert [each["symbol"] for each in client.get(f"{listed}?instrument_type=futures").json()["symbols"]] == []
    assert client.post(DISCOVER, json={"symbol": "ESZ7"}).status_code == 200
    asked = len(gateway.requests)
    assert [each["symbol"] for each in client.get(f"{listed}?instrument_type=futures").json()["symbols"]] == ["ESZ7"]
    assert "AAPL" in [each["symbol"] for each in client.get(listed).json()["symbols"]]
    assert len(gateway.requests) == asked
