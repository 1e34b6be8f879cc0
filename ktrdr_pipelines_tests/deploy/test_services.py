"""Every service's command runs as a process with its environment, becomes healthy, and together they load bars.

The services are started as compose would: in the order of their conditions. See `compose.py` for what stands in for an engine.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ktrdr_pipelines.cli.main import cli
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.deploy.compose import Here, Stack
from ktrdr_pipelines_tests.postgres_server import throw_away_cluster

UNIVERSE = "series:\n  - {symbol: AAPL, timeframes: [1d]}\n"
LAUNCH = """mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
ASSETS = "{ assetNodes { assetKey { path } } repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
RELOAD = 'mutation { reloadRepositoryLocation(repositoryLocationName: "ktrdr_pipelines") { __typename } }'


def variables(gateway: GatewayThread) -> dict[str, str]:
    """What a user sets before `docker compose up`."""
    return {
        "POSTGRES_PASSWORD": "of no use to a server that trusts",
        "KTRDR_API_TOKEN": "t" * 40,
        "TWS_USERID": "user",
        "TWS_PASSWORD": "nothing",
        "IB_GATEWAY_BIND": "127.0.0.1",
        "IB_HOST": gateway.host,
        "IB_PORT": str(gateway.port),
        "KTRDR_TAIL_SENSOR": "false",  # no other load than the one looked at
    }


def ask(stack: Stack, query: str, **variables: Any) -> dict[str, Any]:
    """GraphQL through the web server."""
    body = json.dumps({"query": query, "variables": variables}).encode()
    address = f"http://127.0.0.1:{stack.here.ports['3000']}/graphql"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer)
    assert "errors" not in found, found
    return found["data"]  # type: ignore[no-any-return]


def assets(stack: Stack) -> list[str]:
    return sorted("/".join(node["assetKey"]["path"]) for node in ask(stack, ASSETS)["assetNodes"])


def launch_load(stack: Stack) -> str:
    """Start a load of AAPL's daily bars of 2023 as the UI's button does; the run's id."""
    selector = {
        "repositoryLocationName": "ktrdr_pipelines",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["ohlcv", "AAPL_1d"]}],
    }
    tags = [{"key": "dagster/partition", "value": "2023"}]
    parameters = {"selector": selector, "mode": "default", "executionMetadata": {"tags": tags}}
    launched = ask(stack, LAUNCH, p=parameters)["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return str(launched["run"]["runId"])


def load_over_api(stack: Stack, symbol: str) -> dict[str, Any]:
    """A load of daily bars of 2023 of a series that the universe does not have yet; its result."""
    body = {"symbol": symbol, "timeframe": "1d", "mode": "full", "start": "2023-01-01", "end": "2024-01-01"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.here.ports['8000']}/api/v1/data/load",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer " + "t" * 40},
    )
    with urllib.request.urlopen(request, timeout=170) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def count_in_ledger(stack: Stack) -> int:
    with psycopg.connect(host=str(stack.here.postgres), user="ktrdr", dbname="ktrdr") as connection:
        row = connection.execute("SELECT count(*) FROM ib_pacing_requests").fetchone()
    assert row
    return int(row[0])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.postgres
def test_the_services_become_healthy_and_load_bars_together(tmp_path: Path) -> None:
    """The compose file's commands as processes, in the order of its conditions: each is ill before its start and healthy
    after it by its own check; the web server shows the code server's assets; a load launched there goes over the database,
    the daemon, the code server and the gateway into the CSV; a series added to the universe shows after a reload; a load of a
    new series over the API goes the same way.

    One test, since starting the services is most of its time.
    """
    with (
        run_in_thread(SyntheticMarket()) as gateway,
        throw_away_cluster("ktrdr") as postgres,
        Stack(Here(tmp_path / "var", postgres), variables(gateway)) as stack,
    ):
        data = stack.here.base / "data"
        (data / "universe.yaml").write_text(UNIVERSE)
        services = ["code-server", "daemon", "webserver", *(["api"] if "serve" in cli.commands else [])]

        stack.run_to_end("migrate")
        stack.start("code-server")
        assert not stack.is_healthy("daemon"), "healthy before it was started"
        stack.wait_until(
            lambda: stack.listens("4000") and stack.is_healthy("code-server"), "the code server's health", tries=300
        )
        assert not stack.is_healthy("webserver"), "healthy before it was started"
        for service in services[1:]:
            stack.start(service)
        stack.wait_until(
            lambda: stack.listens("3000") and stack.is_healthy("webserver"), "the web server's health", tries=300
        )
        assert assets(stack) == ["ohlcv/AAPL_1d"]

        run_id = launch_load(stack)

        def status() -> str:
            return str(ask(stack, RUN, id=run_id)["runOrError"]["status"])

        stack.wait_until(lambda: status() in ("SUCCESS", "FAILURE", "CANCELED"), "the run's end", tries=600)
        assert status() == "SUCCESS", stack.logs()
        rows = (data / "AAPL_1d.csv").read_text().splitlines()[1:]
        assert len([row for row in rows if row.startswith("2023-")]) == 250  # sessions of the New York Stock Exchange
        assert count_in_ledger(stack) == len(gateway.requests) > 0

        # Its liveness: with it a run that dies with the code server's container is found.
        assert (stack.here.base / "dagster_home" / "running" / f"{run_id}.lock").exists()

        (data / "universe.yaml").write_text(UNIVERSE + "  - {symbol: MSFT, timeframes: [1d]}\n")
        ask(stack, RELOAD)
        stack.wait_until(lambda: assets(stack) == ["ohlcv/AAPL_1d", "ohlcv/MSFT_1d"], "the new series", tries=300)

        if "api" in services:
            stack.wait_until(lambda: stack.listens("8000") and stack.is_healthy("api"), "the API's health", tries=300)
            loaded = load_over_api(stack, "GOOG")
            assert (loaded["status"], loaded["fetched_bars"]) == ("success", 250), stack.logs()
            assert ask(stack, RUN, id=loaded["run_id"])["runOrError"]["status"] == "SUCCESS"

        for service in services:
            if service not in ("code-server", "webserver"):  # whose health was waited for
                stack.wait_until(lambda: stack.is_healthy(service), f"the health of {service}", tries=20)  # noqa: B023
