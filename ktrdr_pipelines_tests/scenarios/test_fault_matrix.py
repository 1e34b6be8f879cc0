"""The fault matrix: after every fault, in every mode, the file equals the market, or the run failed and the next run makes it
equal. Never a wrong bar, never one lost without a report, never "complete" while a bar is missing.

The cells and their promise are in `scenarios/fault_matrix.py`. Here every fault is tested in every mode and at every timeframe;
all combinations take minutes: `make matrix` runs them and prints a table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from ktrdr_pipelines.domain.load_request import Mode
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.orchestration.resources import GatewayResource
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint, lend
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.fakes import MovingClock
from ktrdr_pipelines_tests.orchestration.test_assets import AAPL_1H, materialize
from ktrdr_pipelines_tests.scenarios.fault_matrix import (
    FAULTS,
    PLACES,
    QUICK,
    Cell,
    check,
    find_truth,
    judge,
    list_cells,
    pick_cells,
    utc,
)

CELLS = pick_cells()
PATIENT = "head timestamp silent | full | RBLX 1d"
"""Waits half a minute for the head timestamp, whose time-out is not a setting."""
BY_NAME = {fault.name: fault for fault in FAULTS}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cells of one process share."""
    return tmp_path_factory.mktemp("held")


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=pytest.mark.long if cell.name == PATIENT else ()) for cell in CELLS],
)
def test_after_every_fault_the_file_is_exact_or_the_run_failed_and_the_next_one_makes_it_exact(
    cell: Cell, scratch: Path, tmp_path: Path
) -> None:
    """All columns of all bars, against the market itself."""
    check(cell, *cell.play(scratch, tmp_path))


@pytest.mark.parametrize("tempo", [pytest.param(0.1, id="ten times faster"), pytest.param(10.0, id="ten times slower")])
@pytest.mark.parametrize(
    "name", ["slow", "restart", "hang", "1100, 1101, answers lost", "2105, 2107, no bars meanwhile", "gap of seven"]
)
def test_the_promise_does_not_depend_on_the_gateways_tempo(
    name: str, tempo: float, scratch: Path, tmp_path: Path
) -> None:
    """Answers and outages ten times shorter or longer: other runs fail, no other bars are lost."""
    cell = Cell(BY_NAME[name], Mode.FULL, PLACES[Mode.FULL, "1d"])
    check(cell, *cell.play(scratch, tmp_path, tempo=tempo))


def test_every_fault_meets_every_mode_and_timeframe() -> None:
    """The tested part includes every row of the whole matrix, and every mode and timeframe of a row."""

    def rows(cells: list[Cell]) -> dict[str, tuple[set[str], set[str]]]:
        found: dict[str, tuple[set[str], set[str]]] = {}
        for cell in cells:
            if not cell.fault.may_fail_again and cell.place.series.timeframe.name in ("1m", "1h", "1d"):
                modes, timeframes = found.setdefault(cell.fault.name, (set(), set()))
                modes.add(cell.mode)
                timeframes.add(cell.place.series.timeframe.name)
        return found

    whole, tested = rows(list_cells()), rows(CELLS)
    assert {cell.fault.name for cell in CELLS} == {cell.fault.name for cell in list_cells()}
    assert [name for name in whole if tested[name][0] != whole[name][0]] == []
    assert [name for name in whole if len(tested[name][1]) < len(tested[name][0])] == []


@pytest.mark.parametrize("name", ["silent, all tries", "conflict", "2105, 2107, no bars meanwhile"])
def test_the_promise_holds_through_the_asset(
    name: str,
    start_gateway: StartGateway,
    make_settings: Callable[..., Settings],
    instance: dg.DagsterInstance,
    tmp_path: Path,
) -> None:
    """A Dagster run over three months meets the fault: it fails or its file is exact; the next run succeeds, and it is."""
    fault = BY_NAME[name]
    clock = MovingClock()  # retries repeat the request, which pacing allows every 15 seconds only
    verdicts, truth = [], find_truth(AAPL_1H, utc("2024-01-01"), utc("2024-04-01"))
    for rules, timeout_s in ((fault.rules, 2 * QUICK), ((), 20.0)):
        settings = make_settings(start_gateway(rules).port, ib_request_timeout_s=timeout_s)
        history = IBHistory(GatewayResource.of(settings).address(), clock=clock, sleep=clock.sleep)
        with history, lend(EntryPoint(history=history)):
            result = materialize(settings, instance, "2024-01-01", "2024-03-01")
        verdict = judge(settings.data_dir / "AAPL_1h.csv", truth)
        verdicts.append(verdict)
        assert not (verdict.invented or verdict.wrong or verdict.doubled)
        assert result.success == verdict.is_exact
    assert verdicts[1].is_exact
