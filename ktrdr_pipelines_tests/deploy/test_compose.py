"""What the files in `deploy/` promise without being run: their form, secrets, addresses, order, likeness to each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines_tests.deploy.compose import (
    DEPLOY,
    ROOT,
    MissingVariable,
    image_environment,
    interpolate,
    read_compose,
)

SECRETS = {"POSTGRES_PASSWORD": "p", "KTRDR_API_TOKEN": "t", "TWS_USERID": "u", "TWS_PASSWORD": "w"}
NEEDED = SECRETS | {"IB_GATEWAY_BIND": "172.17.0.1"}
OURS = ("migrate", "code-server", "daemon", "webserver", "api")


@pytest.fixture
def services() -> dict[str, Any]:
    """With what has to be set, and no more."""
    return interpolate(read_compose(), NEEDED)["services"]  # type: ignore[no-any-return]


def errors_of(document: Any) -> list[str]:
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text(encoding="utf-8"))
    return [f"{'/'.join(map(str, e.path))}: {e.message}" for e in Draft7Validator(schema).iter_errors(document)]


def test_the_compose_file_follows_the_compose_specification() -> None:
    """By its JSON schema, before and after interpolation; a word that is not in it is found."""
    assert errors_of(read_compose()) == []
    assert errors_of(interpolate(read_compose(), NEEDED)) == []
    wrong = read_compose()
    wrong["services"]["api"]["restrat"] = "always"
    assert len(errors_of(wrong)) == 1


def test_the_linter_of_dockerfiles_finds_nothing(tmp_path: Path) -> None:
    """hadolint, with no rule switched off; it finds what is wrong with another file."""
    hadolint = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([hadolint, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd / && pip install dagster\n")
    assert subprocess.run([hadolint, bad], capture_output=True).returncode == 1


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_secret_ends_the_command_with_a_word_of_what_it_is(name: str) -> None:
    """None has a default."""
    with pytest.raises(MissingVariable, match=rf"^{name}: \w+"):
        interpolate(read_compose(), {**NEEDED, name: ""})


def test_secrets_reach_only_the_services_that_need_them(services: dict[str, Any]) -> None:
    """The database's password its users, the token the API, the log-in the gateway; no command and no URL contains one."""
    marked = interpolate(read_compose(), {name: f"<{name}>" for name in NEEDED})["services"]
    holders = {
        name: {service for service, said in marked.items() if f"<{name}>" in said.get("environment", {}).values()}
        for name in SECRETS
    }
    assert holders == {
        "POSTGRES_PASSWORD": {"postgres", *OURS},
        "KTRDR_API_TOKEN": {"api"},
        "TWS_USERID": {"ib-gateway"},
        "TWS_PASSWORD": {"ib-gateway"},
    }
    elsewhere = json.dumps([{k: v for k, v in said.items() if k != "environment"} for said in marked.values()])
    assert [name for name in SECRETS if f"<{name}>" in elsewhere] == []


def test_the_gateway_is_where_the_specification_says(services: dict[str, Any]) -> None:
    """Host 4003 to the gateway's paper port (by the image's relay), `host.docker.internal`, client id 1; all can be set."""
    assert services["ib-gateway"]["ports"] == ["172.17.0.1:4003:4004"]
    for name in ("code-server", "api"):
        said = services[name]["environment"]
        assert (said["IB_HOST"], said["IB_PORT"], said["IB_CLIENT_ID"]) == ("host.docker.internal", "4003", "1")
        assert services[name]["extra_hosts"] == ["host.docker.internal:host-gateway"]
    given = {"IB_HOST": "ib-gateway", "IB_PORT": "4004", "IB_CLIENT_ID": "7"}
    said = interpolate(read_compose(), NEEDED | given)["services"]["api"]["environment"]
    assert {name: said[name] for name in given} == given


def test_every_setting_can_be_given(services: dict[str, Any]) -> None:
    """A setting of the project is set by the files or passed through to the services that load; none is out of reach."""
    names = {str(field.validation_alias.choices[0]) for field in Settings.model_fields.values()}  # type: ignore[union-attr]
    beside = {"KTRDR_UNIVERSE"}  # in the data volume
    api_only = {name for name in names if name.startswith("KTRDR_API_")} | {"KTRDR_DAGSTER_URL"}
    assert api_only <= set(services["api"]["environment"])
    for service in ("code-server", "api"):
        known = set(services[service]["environment"]) | set(image_environment())
        assert names - known - beside - api_only == set()


def test_nothing_is_open_to_other_machines_unless_asked_for(services: dict[str, Any]) -> None:
    """UI and API are published on the host's loopback; nothing else of ours is published, the database neither."""
    published = {name: said["ports"] for name, said in services.items() if "ports" in said and name != "ib-gateway"}
    assert published == {"webserver": ["127.0.0.1:3000:3000"], "api": ["127.0.0.1:8000:8000"]}


def test_every_service_comes_back_and_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    """Restart policies, health checks, and an order by health; no service waits for the gateway, which waits for a log-in."""
    lasting = {name: said for name, said in services.items() if name != "migrate"}
    assert {said["restart"] for said in lasting.values()} == {"unless-stopped"}
    assert [name for name, said in lasting.items() if not said["healthcheck"].get("test")] == []
    order = {
        name: {on: c["condition"] for on, c in said.get("depends_on", {}).items()} for name, said in services.items()
    }
    done, healthy = "service_completed_successfully", "service_healthy"
    assert order == {
        "postgres": {},
        "migrate": {"postgres": healthy},
        "code-server": {"migrate": done},
        "daemon": {"code-server": healthy},
        "webserver": {"code-server": healthy},
        "api": {"migrate": done},
        "ib-gateway": {},
    }


def test_all_of_ours_share_data_and_home(services: dict[str, Any]) -> None:
    """Files, client ids and logs are one; mounted files exist and named volumes are declared."""
    declared = read_compose()["volumes"]
    for name in OURS:
        mounts = [mount.split(":") for mount in services[name]["volumes"]]
        assert {"/var/lib/ktrdr/data", "/var/lib/ktrdr/dagster_home"} <= {target for _, target, *_ in mounts}
        for source, *_ in mounts:
            assert (DEPLOY / source).is_file() if source.startswith("./") else source in declared


def test_dagster_runs_here_as_everywhere_except_for_its_records() -> None:
    """`deploy/dagster.yaml` is `dagster_home/dagster.yaml` with PostgreSQL."""
    ours = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    assert list(ours.pop("storage")) == ["postgres"]
    assert ours == yaml.safe_load((ROOT / "dagster_home" / "dagster.yaml").read_text())


def test_the_image_starts_and_checks_what_the_compose_file_does(services: dict[str, Any]) -> None:
    """The Dockerfile's CMD and HEALTHCHECK are the code server's; its user is no root; its extras exist."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = text.splitlines()
    commands = [json.loads(line.split("CMD ", 1)[1]) for line in lines if line.lstrip().startswith("CMD ")]
    code_server = services["code-server"]
    assert commands == [code_server["healthcheck"]["test"][1:], code_server["command"]]
    assert "USER 10001:10001" in lines[lines.index("FROM python:${PYTHON}-slim-bookworm") :]
    words = text.split()
    extras = {words[i + 1] for i, word in enumerate(words) if word == "--extra"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"deploy"} <= extras <= set(project["optional-dependencies"]) - {"dev", "demo"}


def test_a_package_without_its_project_brings_what_a_home_and_the_ui_need(tmp_path: Path) -> None:
    """As in the image, where nothing but the package is installed: `ktrdr ui` finds its workspace, and a home that is begun there
    is configured as the project's own. What is brought along is in the wheel, and the same as the project's files."""
    shutil.copytree(ROOT / "ktrdr_pipelines", tmp_path / "site" / "ktrdr_pipelines")
    code = "from ktrdr_pipelines.orchestration.runs.instance import provided_file as f; print(f('workspace.yaml')); "
    code += "print(f('dagster_home/dagster.yaml'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    brought = [Path(line) for line in found.stdout.splitlines()]
    assert [path.is_relative_to(tmp_path) for path in brought] == [True, True], found.stderr
    for path, ours in zip(brought, ("workspace.yaml", "dagster_home/dagster.yaml"), strict=True):
        assert yaml.safe_load(path.read_text()) == yaml.safe_load((ROOT / ours).read_text())
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "ktrdr_pipelines"
    ]
    package = tmp_path / "site" / "ktrdr_pipelines"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert packed == {*brought, package / "py.typed"}


def test_no_secret_and_no_data_can_get_into_the_image() -> None:
    """The build sees what the Dockerfile copies and nothing else, and all that is there."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert kept == copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
