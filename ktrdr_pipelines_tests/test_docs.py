"""The README tells the truth: settings, exit codes and timeframes that exist are listed, and none that do not."""

from __future__ import annotations

import re

import click

from ktrdr_pipelines import errors
from ktrdr_pipelines.cli.main import cli
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings
from ktrdr_pipelines.simulator.faults import KINDS
from ktrdr_pipelines.simulator.habits import VALUES

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")


def setting_names() -> set[str]:
    return {str(field.validation_alias.choices[0]) for field in Settings.model_fields.values()}  # type: ignore[union-attr]


def test_every_setting_is_documented_and_no_other() -> None:
    """The table of settings and the settings are the same set."""
    section = README.split("## Settings")[1].split("## Files")[0]
    assert set(re.findall(r"^\| `([A-Z_]+)`", section, re.MULTILINE)) == setting_names()


def test_every_exit_code_is_documented() -> None:
    """Each family of errors ends a command with a code that the table explains."""
    section = README.split("### Exit codes")[1].split("## Settings")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    families = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.KtrdrError)]
    assert {family.exit_code for family in families} | {0, 130} == listed


def test_every_timeframe_and_command_is_named() -> None:
    """What can be typed stands in the README."""
    for name in TIMEFRAMES:
        assert re.search(rf"\b{name}\b", README), name
    for name, command in cli.commands.items():
        assert f"`ktrdr {name}" in README, name
        for inner in command.commands if isinstance(command, click.Group) else ():
            assert f"ktrdr {name} {inner}" in README, inner


def test_every_command_says_its_exit_codes() -> None:
    """In the table by command, whole groups or each of their commands."""
    rows = re.findall(r"^\| (`[a-z].*?) \|", README.split("### Exit codes")[1].split("## Settings")[0], re.MULTILINE)
    named = set(re.findall(r"`([a-z-]+(?: [a-z]+)?)`", " ".join(rows)))
    for name, command in cli.commands.items():
        inner = [f"{name} {each}" for each in command.commands] if isinstance(command, click.Group) else [name]
        # `universe add`, `remove`: a row names the group once.
        assert all(each in named or each.partition(" ")[2] in named for each in inner), name


def test_every_fault_and_habit_of_the_simulator_is_named() -> None:
    """What a file of faults and `--habit` can say stands in the README."""
    for kind in KINDS:
        assert f"`{kind}`" in README, kind
    for habit in VALUES:
        assert f"`{habit}=" in README, habit


def test_every_room_of_the_house_is_on_the_map() -> None:
    """The table of where to go names modules that are there."""
    section = README.split("## The way of a bar")[1].split("## Commands")[0]
    for name in re.findall(r"`((?:\w+/)?\w+\.py|\w+/)`", section):
        package = PROJECT_ROOT / "ktrdr_pipelines"
        assert (package / name).exists() or list(package.glob(f"*/{name}")), name
