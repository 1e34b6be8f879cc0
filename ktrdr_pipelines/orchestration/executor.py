"""Dagster's in-process executor, for runs that know their process: whoever starts them, they can be reaped when it is killed.

Runs of our own doors get their owner at birth (`orchestration/runs/launch.py`); those of `dagster asset materialize`, the UI
and the daemon are made by Dagster and get it here, before anything is executed. What an owner is for is in
`orchestration/runs/dead_runs.py`. In process: that saves four seconds a run and lets one connection serve all series of a run.
"""

from collections.abc import Iterator

import dagster as dg
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor

from ktrdr_pipelines.orchestration.runs.dead_runs import owner_tag, reaping


class OwnedExecutor(InProcessExecutor):
    """Tags the run with this process, and reaps dead runs while it executes."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        plan_context.instance.add_run_tags(plan_context.run_id, owner_tag(plan_context.run_id))
        with reaping(plan_context.instance):
            yield from super().execute(plan_context, execution_plan)


@dg.executor(name="in_process")
def owned_executor(_: dg.InitExecutorContext) -> OwnedExecutor:
    """Execute all steps in the process of the run."""
    return OwnedExecutor(retries=RetryMode.ENABLED)
