"""Promises of the routes about symbols: one contract or a refusal that lists them, a choice, and what is remembered."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines_tests.api.conftest import OpenApi, make_loads, problem_of, serving, settings_in
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


def test_one_load_is_one_request_however_it_is_spelt(tmp_path: Path) -> None:
    """As the universe spells its symbols, others in capitals; a name of one's own keeps its small letters."""
    settings = settings_in(tmp_path)
    loads = make_loads(settings)

    def symbols_of(*names: str) -> set[str]:
        return {loads.respell(LoadRequest.parse(name, "1h")).symbol for name in names}

    assert symbols_of("aapl", "AAPL", "Aapl") == {"AAPL"}
    assert symbols_of("eurusd", "EUR.USD", "eur/usd", "EURUSD") == {"EURUSD"}
    assert symbols_of("tsla", "TSLA") == {"TSLA"}
    settings.data_dir.mkdir()
    settings.universe_path.write_text("series:\n  - {symbol: Spider, ib_symbol: SPY, timeframes: [1h]}\n")
    assert symbols_of("Spider") == {"Spider"}


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


def test_what_hangs_does_not_block_the_status_and_cleanup(start_gateway: StartGateway, tmp_path: Path) -> None:
    """They are asked for when something hangs, and never wait for each other."""
    gateway = start_gateway([FaultRule(kind="silent", on="head")])
    settings = settings_in(tmp_path, gateway.port)
    with serving(settings, make_loads(settings)) as address, ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(httpx.get, f"{address}/ib/ranges?symbols=AAPL&timeframes=1d", timeout=60)
        deadline = time.monotonic() + 30
        while not gateway.requests:
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)
        status = httpx.get(f"{address}/ib/status", timeout=60)
        assert not hanging.done()
        assert status.json()["connection"]["connected"]
        assert httpx.post(f"{address}/ib/cleanup", timeout=60).status_code == 200
        problem = hanging.result().json()["ranges"][0]["problem"]
    assert problem["kind"] == "timeout"
