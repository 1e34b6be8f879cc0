"""Where settings come from, and that child processes see the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrdr_pipelines.settings import _CONTAINER_MARKS, HOST_OF_CONTAINER, PROJECT_ROOT, as_environment, load_settings


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


def test_in_a_container_the_gateway_is_looked_for_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the container's host, but only where it leads somewhere, and never against what a person set."""
    known = "localhost"
    monkeypatch.setattr("ktrdr_pipelines.settings.HOST_OF_CONTAINER", known)
    monkeypatch.setenv("KTRDR_IN_CONTAINER", "true")
    assert load_settings().ib_host == known
    monkeypatch.setenv("IB_HOST", "gateway.example")
    assert load_settings().ib_host == "gateway.example"
    monkeypatch.delenv("IB_HOST")
    monkeypatch.setenv("KTRDR_IN_CONTAINER", "false")
    assert load_settings().ib_host == "127.0.0.1"
    monkeypatch.setenv("KTRDR_IN_CONTAINER", "true")
    monkeypatch.setattr("ktrdr_pipelines.settings.HOST_OF_CONTAINER", "no-such-host.invalid")
    assert load_settings().ib_host == "127.0.0.1"


def test_a_container_is_known_by_the_marks_of_docker_and_podman(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a setting: a file that the container's maker leaves at its root; a blank setting is none."""
    monkeypatch.setattr("ktrdr_pipelines.settings.HOST_OF_CONTAINER", "localhost")
    mark = tmp_path / "mark"
    monkeypatch.setattr("ktrdr_pipelines.settings._CONTAINER_MARKS", (tmp_path / "other", mark))
    monkeypatch.setenv("KTRDR_IN_CONTAINER", "")
    assert load_settings().ib_host == "127.0.0.1"
    mark.touch()
    assert load_settings().ib_host == "localhost"
    assert HOST_OF_CONTAINER == "host.docker.internal"
    assert [str(path) for path in _CONTAINER_MARKS] == ["/.dockerenv", "/run/.containerenv"]
