"""Promises of `dagster.yaml`: one configuration wherever Dagster runs, and places in the queue that backfills never take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ktrdr_pipelines.orchestration.runs.tags import BACKFILL_WORK, RETRY_TAGS, WORK_TAG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The project's `dagster.yaml`."""
    return yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text())


def test_an_installed_package_has_the_same_configuration(config: dict[str, Any]) -> None:
    """`orchestration/home/dagster.yaml` is `dagster_home/dagster.yaml`."""
    packaged = ROOT / "ktrdr_pipelines" / "orchestration" / "home" / "dagster.yaml"
    assert yaml.safe_load(packaged.read_text()) == config


def test_backfills_never_have_all_places(config: dict[str, Any]) -> None:
    """Both kinds of backfills together leave places to tails and to what a user starts."""
    runs = config["concurrency"]["runs"]
    limits = {(each["key"], each.get("value")): each["limit"] for each in runs["tag_concurrency_limits"]}
    assert set(limits) == {("dagster/backfill", None), (WORK_TAG, BACKFILL_WORK)}
    assert sum(limits.values()) <= runs["max_concurrent_runs"] - 2


def test_long_loads_survive(config: dict[str, Any]) -> None:
    """5,040 requests with half of the budget take 28 hours; 100,000 partitions × series take 1,000 s to plan."""
    monitoring = config["run_monitoring"]
    assert monitoring["max_runtime_seconds"] >= 28 * 3600
    assert monitoring["start_timeout_seconds"] >= 1000


def test_only_what_failed_without_a_reason_is_tried_again(config: dict[str, Any]) -> None:
    """The same for runs with our tags and for those of the UI."""
    retries = config["run_retries"]
    assert retries == {"enabled": True, "max_retries": 1, "retry_on_asset_or_op_failure": False}
    assert RETRY_TAGS["dagster/max_retries"] == str(retries["max_retries"])
    assert RETRY_TAGS["dagster/retry_on_asset_or_op_failure"] == "false"
