"""The API against its own description: what OpenAPI promises is kept for inputs that a machine makes up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ktrdr_pipelines.api.app import create_app
from ktrdr_pipelines.simulator.server import run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.api.conftest import make_loads, serving, settings_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API, with a gateway behind it and a universe of one series."""
    folder: Path = tmp_path_factory.mktemp("described")
    (folder / "data").mkdir()
    (folder / "data" / "universe.yaml").write_text("series:\n- {symbol: MSFT, timeframes: [1d]}\n")
    with run_in_thread(SyntheticMarket(), judge=False) as gateway:
        served = settings_in(folder, gateway.port)
        with serving(served, make_loads(served, queue_limit=10_000)) as address:
            yield address.removesuffix("/api/v1")


def describe_api() -> dict[str, Any]:
    """The API's own description."""
    settings = settings_in(Path("nowhere"))
    return create_app(settings, make_loads(settings)).openapi()


SCHEMA = schemathesis.openapi.from_dict(describe_api())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


PACED = ("GET /api/v1/ib/ranges", "POST /api/v1/ib/cleanup")
"""Routes that wait for pacing, or for other processes to let go."""


@pytest.mark.parametrize("mode", GenerationMode, ids=str)
@pytest.mark.parametrize("label", OPERATIONS)
def test_the_description_is_kept(label: str, mode: GenerationMode, root: str) -> None:
    """No 5xx, no undocumented status or body, nothing accepted that the description forbids.

    That everything the description allows is accepted is left out: it cannot express that start is before end.
    """

    examples = 2 if label in PACED else 8

    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def keeps(case: schemathesis.Case) -> None:
        if label == "POST /api/v1/data/load" and mode is GenerationMode.POSITIVE:
            case.query = {"wait": "false"}  # how loads end is tried elsewhere; here none is executed
            if isinstance(case.body, dict):
                case.body.pop("wait", None)
        elif label == "POST /api/v1/data/load" and "wait" not in (case.query or {}):
            case.query = {**dict(case.query or {}), "wait": "false"}
        case.call_and_validate(base_url=root, timeout=60, excluded_checks=[positive_data_acceptance])

    try:
        keeps()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # a route without parameters has no wrong ones


def test_every_route_is_described() -> None:
    """A summary, a text, and a model for the answer of each; examples for bodies."""
    description = describe_api()
    operations = [op for path in description["paths"].values() for op in path.values()]
    assert len(operations) == 12
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert "schema" in operation["responses"]["200"]["content"]["application/json"]
        assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")
    for name in ("LoadRequest", "DiscoverRequest"):
        assert description["components"]["schemas"][name]["examples"]
