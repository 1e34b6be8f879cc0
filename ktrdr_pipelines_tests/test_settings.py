"""Where settings come from, and that child processes see the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrdr_pipelines.settings import PROJECT_ROOT, as_environment, load_settings


def test_the_dagster_home_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pacing ledger lives there: two of them would be two budgets for one login."""
    monkeypatch.chdir(tmp_path)
    assert load_settings().dagster_home == PROJECT_ROOT / "dagster_home"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "mine"))
    assert load_settings().dagster_home == tmp_path / "mine"


def test_the_current_folders_env_file_counts_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.env` here, then the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("IB_PORT=7497\nIB_HOST=gateway.example\n")
    monkeypatch.setenv("IB_HOST", "other.example")
    assert (load_settings().ib_port, load_settings().ib_host) == (7497, "other.example")


def test_children_see_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed over as environment variables they are read back equal, wherever the child is started."""
    monkeypatch.chdir(tmp_path)
    settings = load_settings(
        ib_port=7496, ib_retry_waits_s=(1.0, 2.0), data_dir=Path("bars"), universe_file=Path("mine.yaml"),
        partition_starts={"1m": "2015-01-01"}, history_limits="current",
    )  # fmt: skip
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    assert load_settings() == settings
    assert settings.data_dir == tmp_path / "bars"
