"""Runs whose process is gone are found, whoever started them and in whichever container: they would block all others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from ktrdr_pipelines.ib.processes import current_owner
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.runs.dead_runs import OWNER_TAG, reap_dead_runs
from ktrdr_pipelines.orchestration.runs.liveness import SURE_AFTER_S, is_gone
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import DEFAULT_UNIVERSE
from ktrdr_pipelines_tests.conftest import StartGateway

ROOT = Path(__file__).parents[3]
GOES_ON = """
import sys, pathlib
from ktrdr_pipelines.orchestration.runs.liveness import show_life
show_life(pathlib.Path(sys.argv[1]), sys.argv[2])
print("shown", flush=True)
sys.stdin.read()
"""


def make_older(home: Path, run_id: str, seconds: float) -> Path:
    """As if the run had begun that long before."""
    path = home / "running" / f"{run_id}.lock"
    began = path.stat().st_mtime - seconds
    os.utime(path, (began, began))
    return path


@contextmanager
def process_of(home: Path, run_id: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that executes the run."""
    with subprocess.Popen(
        [sys.executable, "-c", GOES_ON, home, run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "shown\n"
        yield child
        child.kill()


def a_started_run(instance: dg.DagsterInstance) -> str:
    run = instance.create_run_for_job(dg.GraphDefinition(name="j").to_job())
    instance.report_dagster_event(
        dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name="j"), run.run_id
    )
    return run.run_id


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["the daemon", "another container"])
def test_a_run_whose_process_was_killed_is_reaped(instance: dg.DagsterInstance, started_by: str) -> None:
    """While the process lives the run is left alone, however old; once it is killed the run fails."""
    home = Path(instance.root_directory)
    run_id = a_started_run(instance)
    if started_by == "another container":
        elsewhere = [run_id, "", "another boot/another namespace", current_owner().pid, "1"]
        instance.add_run_tags(run_id, {OWNER_TAG: json.dumps(elsewhere)})
    with process_of(home, run_id) as child:
        make_older(home, run_id, 2 * SURE_AFTER_S)
        assert reap_dead_runs(instance) == []
        child.kill()
        child.wait()
        assert reap_dead_runs(instance) == [run_id]
    assert status_of(instance, run_id) is dg.DagsterRunStatus.FAILURE
    assert reap_dead_runs(instance) == []


def test_a_run_of_which_nothing_is_known_is_left_alone(instance: dg.DagsterInstance) -> None:
    """No sign of life may mean that it has not got so far; a file that nobody locks yet, too."""
    home = Path(instance.root_directory)
    without, young = a_started_run(instance), a_started_run(instance)
    (home / "running").mkdir()
    (home / "running" / f"{young}.lock").touch()
    assert reap_dead_runs(instance) == []
    assert status_of(instance, without) is status_of(instance, young) is dg.DagsterRunStatus.STARTED
    make_older(home, young, 2 * SURE_AFTER_S)
    assert reap_dead_runs(instance) == [young]


def test_files_of_runs_that_ended_do_not_gather(instance: dg.DagsterInstance) -> None:
    """After a day they are removed."""
    folder = Path(instance.root_directory) / "running"
    folder.mkdir()
    for name in ("old", "new"):
        (folder / f"{name}.lock").touch()
    old = make_older(folder.parent, "old", 2 * 86400)
    reap_dead_runs(instance)
    assert (old.exists(), (folder / "new.lock").exists()) == (False, True)


@pytest.mark.slow
def test_every_run_that_loads_shows_life_until_its_end_is_recorded(
    instance: dg.DagsterInstance, start_gateway: StartGateway, make_settings: Callable[..., Settings]
) -> None:
    """Nobody else can take the run's lock while it goes, nor in the moment after; the process's next run lets it go."""
    home = Path(instance.root_directory)
    settings = make_settings(start_gateway().port, dagster_home=home)
    series = next(s for s in DEFAULT_UNIVERSE if s.name == "AAPL_1d")
    job = build_definitions(settings, [series]).resolve_implicit_global_asset_job_def()

    def load() -> str:
        return job.execute_in_process(
            instance=instance, asset_selection=[asset_key(series)], partition_key="2023"
        ).run_id

    first = load()
    script = "import sys, pathlib; from ktrdr_pipelines.orchestration.runs.liveness import is_gone; "
    script += "print(is_gone(pathlib.Path(sys.argv[1]), sys.argv[2]))"
    make_older(home, first, 2 * SURE_AFTER_S)
    seen = subprocess.run(
        [sys.executable, "-c", script, home, first], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (seen.stdout, is_gone(home, first)) == ("False\n", False)
    second = load()
    assert not (home / "running" / f"{first}.lock").exists()
    assert (home / "running" / f"{second}.lock").exists()
