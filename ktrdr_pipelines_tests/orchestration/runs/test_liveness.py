"""Runs whose process is gone are found, whoever launched them and in whichever container: they would block all others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import time_machine

from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.orchestration.runs.liveness import QUIET_S, executing, reap_dead_runs
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import DEFAULT_UNIVERSE
from ktrdr_pipelines_tests.conftest import StartGateway
from ktrdr_pipelines_tests.holding import make_dead_run, make_run

ROOT = Path(__file__).parents[3]
EXECUTE = """
import sys
import dagster as dg
from ktrdr_pipelines.orchestration.runs.liveness import executing
with dg.DagsterInstance.from_config(sys.argv[1]) as instance, executing(instance, sys.argv[2]):
    print("executing", flush=True)
    sys.stdin.read()
"""
REAP = """
import sys
import dagster as dg
from ktrdr_pipelines.orchestration.runs.liveness import reap_dead_runs
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    print(reap_dead_runs(instance))
"""
MUCH_LATER = timedelta(seconds=QUIET_S + 60)


def lock_file(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.root_directory) / "running" / f"{run_id}.lock"


def start_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@contextmanager
def process_of(instance: dg.DagsterInstance, run_id: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that executes the run."""
    with start_python(EXECUTE, instance.root_directory, run_id) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "executing\n"
        yield child
        child.kill()


def reap_elsewhere(instance: dg.DagsterInstance) -> str:
    """What another process reaps."""
    with start_python(REAP, instance.root_directory) as child:
        return child.communicate()[0].strip()


def begin(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    instance.report_dagster_event(
        dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name=run.job_name), run.run_id
    )
    return run.run_id


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_reaped_at_once(instance: dg.DagsterInstance) -> None:
    """While the process lives the run is left alone, however old; once it is killed the run fails, and the reason names it."""
    run_id = begin(instance, make_run(instance))
    with process_of(instance, run_id) as child:
        with time_machine.travel(datetime.now(UTC) + MUCH_LATER, tick=False):
            assert reap_dead_runs(instance) == []
        child.kill()
        child.wait()
        assert reap_dead_runs(instance) == [run_id]
    assert status_of(instance, run_id) is dg.DagsterRunStatus.FAILURE
    (failed,) = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    assert f"process {child.pid} on " in str(failed.dagster_event)
    assert reap_dead_runs(instance) == []
    assert not lock_file(instance, run_id).exists()


@pytest.mark.slow
def test_runs_of_this_process_are_alive_to_all_others(instance: dg.DagsterInstance) -> None:
    """To itself too; after the block a run whose end is not recorded is dead."""
    run_id = begin(instance, make_run(instance))
    with executing(instance, run_id):
        assert (reap_elsewhere(instance), reap_dead_runs(instance)) == ("[]", [])
    assert reap_dead_runs(instance) == [run_id]


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_run_of_unknown_process_is_left_alone(instance: dg.DagsterInstance, is_empty: bool) -> None:
    """No file: another machine's run. An empty one: its process is about to lock it."""
    begun = begin(instance, make_run(instance))
    if is_empty:
        lock_file(instance, begun).parent.mkdir()
        lock_file(instance, begun).touch()
    assert reap_dead_runs(instance) == []
    assert status_of(instance, begun) is dg.DagsterRunStatus.STARTED


def test_canceling_ends_as_canceled_and_a_copied_tag_means_nothing(instance: dg.DagsterInstance) -> None:
    """Dagster copies tags to re-executions; liveness is by run id."""
    dead = make_dead_run(instance, tags={"ktrdr/origin": "cli"})
    again = make_run(instance, tags=dict(dead.tags), parent_run_id=dead.run_id, root_run_id=dead.run_id)
    canceling = make_dead_run(instance)
    instance.report_run_canceling(canceling)
    assert sorted(reap_dead_runs(instance)) == sorted([dead.run_id, canceling.run_id])
    assert status_of(instance, dead.run_id) is dg.DagsterRunStatus.FAILURE
    assert status_of(instance, canceling.run_id) is dg.DagsterRunStatus.CANCELED
    assert status_of(instance, again.run_id) is dg.DagsterRunStatus.NOT_STARTED


def test_a_run_that_no_process_began_is_dead_after_ten_minutes(instance: dg.DagsterInstance) -> None:
    """Its process was killed while it launched the run. A run of ours is dead even if it is recorded as started, until its
    resources are ready; of other jobs' runs that have started nothing can be known."""
    never = make_run(instance, is_ours=False)
    started, ready, foreign = make_run(instance), make_run(instance), make_run(instance, is_ours=False)
    for run in (started, ready, foreign):
        begin(instance, run)
    data = instance.report_engine_event("Executing", ready).event_specific_data
    success = dg.DagsterEventType.RESOURCE_INIT_SUCCESS.value
    instance.report_dagster_event(dg.DagsterEvent(success, ready.job_name, event_specific_data=data), ready.run_id)
    with time_machine.travel(datetime.now(UTC) + timedelta(seconds=QUIET_S - 60), tick=False):
        assert reap_dead_runs(instance) == []
        instance.report_engine_event("still planning", started)
    with time_machine.travel(datetime.now(UTC) + MUCH_LATER, tick=False):
        assert reap_dead_runs(instance) == [never.run_id]
    with time_machine.travel(datetime.now(UTC) + 2 * MUCH_LATER, tick=False):
        assert reap_dead_runs(instance) == [started.run_id]


def test_files_of_runs_that_ended_do_not_gather(instance: dg.DagsterInstance) -> None:
    """Nor those of runs that were never created; one that has yet to be created keeps its file."""
    ended = make_dead_run(instance)
    assert reap_dead_runs(instance) == [ended.run_id]
    old, young = lock_file(instance, "old"), lock_file(instance, "young")
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    reap_dead_runs(instance)
    assert list(young.parent.iterdir()) == [young]


@pytest.mark.slow
def test_every_run_that_loads_is_locked_until_its_end_is_recorded(
    instance: dg.DagsterInstance, start_gateway: StartGateway, make_settings: Callable[..., Settings]
) -> None:
    """Whoever launched it: Dagster records the end of a run after its resources are closed. The process's next run frees it."""
    settings = make_settings(start_gateway().port, dagster_home=Path(instance.root_directory))
    series = next(s for s in DEFAULT_UNIVERSE if s.name == "AAPL_1d")
    job = build_definitions(settings, [series]).resolve_implicit_global_asset_job_def()

    def load() -> str:
        return job.execute_in_process(
            instance=instance, asset_selection=[asset_key(series)], partition_key="2023"
        ).run_id

    first = load()
    assert (reap_elsewhere(instance), lock_file(instance, first).exists()) == ("[]", True)
    second = load()
    assert reap_elsewhere(instance) == "[]"
    assert (lock_file(instance, first).exists(), lock_file(instance, second).exists()) == (False, True)
