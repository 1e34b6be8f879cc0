"""Documents and code agree: what they cite exists, and `docs/reference.md` is what the code makes."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from ktrdr_pipelines.cli.main import cli
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings
from ktrdr_pipelines.simulator.faults import KINDS
from ktrdr_pipelines.simulator.habits import VALUES

PACKAGE, TESTS = PROJECT_ROOT / "ktrdr_pipelines", PROJECT_ROOT / "ktrdr_pipelines_tests"
README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (PROJECT_ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


# -- what users read


@pytest.mark.slow
def test_the_reference_is_what_the_code_makes() -> None:
    """`make reference` would change nothing."""
    spec = importlib.util.spec_from_file_location("make_reference", PROJECT_ROOT / "tools" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make_reference().splitlines()
    found = module.TARGET.read_text(encoding="utf-8").splitlines()
    assert found == made, "run `make reference`"


def test_the_readme_is_short_and_names_only_real_settings() -> None:
    """Under 2,000 words; its table of settings is a part of the settings."""
    assert len(README.split()) < 2000
    names = {str(field.validation_alias.choices[0]) for field in Settings.model_fields.values()}  # type: ignore[union-attr]
    section = README.split("## Settings")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([A-Z_]+)`", section, re.MULTILINE))
    assert listed and listed <= names


def commands() -> list[str]:
    """Every command that does something, without `ktrdr`."""
    return [
        each
        for name, command in cli.commands.items()
        for each in ([f"{name} {inner}" for inner in command.commands] if isinstance(command, click.Group) else [name])
    ]


def test_every_timeframe_and_command_is_in_the_readme() -> None:
    """What can be typed is in the README."""
    assert [name for name in TIMEFRAMES if not re.search(rf"\b{name}\b", README)] == []
    assert [name for name in commands() if f"`ktrdr {name}" not in README] == []


def test_every_command_has_its_exit_codes() -> None:
    """In the guide's table by command."""
    rows = re.findall(r"^\| (`[a-z].*?) \|", GUIDE.split("## Exit codes by command")[1].split("\n## ")[0], re.MULTILINE)
    named = set(re.findall(r"`([a-z-]+(?: [a-z]+)?)`", " ".join(rows)))
    assert sorted(set(commands()) - named) == []


def test_every_fault_and_habit_of_the_simulator_is_in_the_guide() -> None:
    """What a file of faults and `--habit` can contain."""
    assert [kind for kind in KINDS if f"`{kind}`" not in GUIDE] == []
    assert [habit for habit in VALUES if f"`{habit}=" not in GUIDE] == []


# -- citations: what is named exists

SECTIONED = re.compile(r"\b(\w+\.md)`{0,2}\)?,\s+(?:sections?\s+)?((?:\d+(?:,\s*|,?\s+and\s+|\s+to\s+)?)+)")
TITLED = re.compile(r"\b(\w+\.md)`{0,2},\s+[\"“]([^\"”]+)[\"”]")
IN_README = re.compile(r"\bREADME, ([A-Z][\w ]+)")
MARKDOWN = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*\w[\w-]*\.md)\b")
MODULE = re.compile(r"`((?:[\w.-]+/)*\w+\.py)(?:`|::)|(?<![\w./`-])((?:[\w-]+/)+\w+\.py)\b")
FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
LOOSE = re.compile(
    r"\b(?:ib_facts|dagster_facts|dependency_facts)\b(?!\.md)|\bdependency_facts\.md|\bproject facts\b"
    r"|(?<!/\w{4} )(?<!/\w{5} )\bissue \d+\b|\bdesign, section \d|\.\./shared|\blayout_map\b|\banchors\.md"
)
"""Sources that a reader cannot find: a name without its file, a file outside the repository, an issue of an unnamed repository
(`owner/name issue 5` is one that can be found)."""
MEMBER = re.compile(r"`{1,2}([a-z_]+)\.(?:[a-z_]+\.)*?(?:([a-z_]+)\.)?([A-Z]\w*)")
ELSEWHERE = {"ib_insync", "ib_async", "ibapi"}
"""Other programs whose files are named."""
ALIASES = {"dg", "np", "pa", "pd", "sa"}
STATE = {"data", "demo", "dagster_home", "dist", "mutants", "source"}
"""Folders whose content is made by running the program."""


@cache
def prose() -> list[tuple[Path, str]]:
    """(file, its docstrings, comments and string literals, or the whole text of a document)."""
    found = []
    for folder in (PACKAGE, TESTS, PROJECT_ROOT / "tools", PROJECT_ROOT / "benchmarks", PROJECT_ROOT / "deploy"):
        for path in sorted(folder.rglob("*")):
            if path.suffix == ".py":
                found.append((path, "\n".join(texts_of(path.read_text(encoding="utf-8")))))
            elif path.suffix == ".md":
                found.append((path, path.read_text(encoding="utf-8")))
    for path in (*sorted(PROJECT_ROOT.glob("*.md")), *sorted((PROJECT_ROOT / "docs").rglob("*.md"))):
        found.append((path, path.read_text(encoding="utf-8")))
    for name in ("Makefile", ".importlinter", "pyproject.toml", ".pre-commit-config.yaml", "data/README.md"):
        found.append((PROJECT_ROOT / name, (PROJECT_ROOT / name).read_text(encoding="utf-8")))
    return found


def texts_of(source: str) -> Iterator[str]:
    """Comments (neighbouring lines together), docstrings and other strings of a Python module."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(block)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def as_line(text: str) -> str:
    return " ".join(text.split())


@cache
def modules() -> dict[str, list[Path]]:
    """Every Python file of the repository by its base name."""
    found: dict[str, list[Path]] = {}
    for folder in ("ktrdr_pipelines", "ktrdr_pipelines_tests", "tools", "benchmarks"):
        for path in (PROJECT_ROOT / folder).rglob("*.py"):
            found.setdefault(path.name, []).append(path)
    return found


def module_exists(name: str, path: Path) -> bool:
    """Whether ``name`` (``module.py``, ``package/module.py``) is a module of the repository, seen from ``path``."""
    if name.split("/")[0] in ELSEWHERE:
        return True
    if "/" not in name:
        # A bare name is a neighbour, or a name that only one place has.
        return (path.parent / name).exists() or name in modules()
    return any(str(found).endswith(f"/{name}") for found in modules().get(name.rsplit("/", 1)[1], ()))


@cache
def documents() -> dict[str, Path]:
    """Documents that are cited by their bare name."""
    return {path.name: path for path in (PROJECT_ROOT / "docs").glob("*.md")} | {
        path.name: path for path in PROJECT_ROOT.glob("*.md")
    }


@cache
def headings(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


@cache
def members(name: str) -> set[str]:
    """What the modules of that base name define at top level."""
    found: set[str] = set()
    for path in modules().get(f"{name}.py", ()):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.ClassDef() | ast.FunctionDef():
                    found.add(node.name)
                case ast.Assign():
                    found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name_)):
                    found.add(name_)
                case _:
                    pass
    return found


def wrong_members(text: str) -> Iterator[str]:
    """Classes and constants named with their module (``timeframes.TIMEFRAMES``) that it does not have."""
    for module, inner, name in MEMBER.findall(text):
        holder = inner or module
        if holder in ALIASES or module in ALIASES:
            continue
        if f"{holder}.py" in modules():
            if name not in members(holder):
                yield f"{holder}.{name}"
        elif importlib.util.find_spec(module) is None:
            yield f"{holder}.{name}"


def wrong_sections(text: str) -> Iterator[str]:
    """Citations like ``docs/ib_facts.md, 3`` or ``docs/guide.md, "Universe"`` without such a section."""
    for name, numbers in SECTIONED.findall(text):
        if (target := documents().get(name)) is not None:
            have = {found.group(1) for heading in headings(target) if (found := re.match(r"(\d+)\.", heading))}
            yield from (f"{name}, {number}" for number in re.findall(r"\d+", numbers) if number not in have)
    for name, title in TITLED.findall(text):
        if (target := documents().get(name)) is not None and not any(title in heading for heading in headings(target)):
            yield f'{name}, "{title}"'
    for title in IN_README.findall(text):
        if not any(title.startswith(heading) for heading in headings(PROJECT_ROOT / "README.md")):
            yield f"README, {title}"


def wrong_paths(path: Path, text: str) -> Iterator[str]:
    """Documents, modules and folders that do not exist."""
    for name in MARKDOWN.findall(text):
        if (
            name.split("/")[0] not in STATE
            and name not in documents()
            and not any((base / name).exists() for base in (PROJECT_ROOT, path.parent))
        ):
            yield name
    for name in (quoted or plain for quoted, plain in MODULE.findall(text)):
        if not module_exists(name, path):
            yield name
    for name in FOLDER.findall(text):
        places = (PROJECT_ROOT, path.parent, PACKAGE, TESTS, *PACKAGE.glob("*/"))
        if (
            name.split("/")[0] not in STATE
            and not name.startswith("docs/")
            and not any((p / name).is_dir() for p in places)
        ):
            yield name


@pytest.mark.slow
def test_every_citation_leads_somewhere() -> None:
    """Every document, section, module and package that a docstring, comment, message or document names is in the repository."""
    wrong = []
    for path, text in prose():
        line = as_line(text)
        if path != Path(__file__).resolve():
            found = {*wrong_sections(line), *wrong_paths(path, line), *wrong_members(line), *LOOSE.findall(line)}
            wrong += [f"{path.relative_to(PROJECT_ROOT)}: {name}" for name in sorted(found)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see docs/ib_facts.md, 3 and 99", ["ib_facts.md, 99"]),
        ("see `docs/ib_facts.md`, sections 1 to 77", ["ib_facts.md, 77"]),
        ('see `docs/guide.md`, "No such title"', ['guide.md, "No such title"']),
        ("see `docs/none.md`", ["docs/none.md"]),
        ("see `nowhere.py` and `planning/nowhere.py`", ["nowhere.py", "planning/nowhere.py"]),
        ("see `load.Load` and `timeframes.TIMEFRAMES` and `timeframes.NONE`", ["load.Load", "timeframes.NONE"]),
        ("see `planning/requests.py`, `nowhere/`, (docs/ib_facts.md, 5).", ["nowhere/"]),
    ],
)
def test_a_wrong_citation_is_found(text: str, expected: list[str]) -> None:
    """Each kind of citation, once wrong."""
    assert [*wrong_sections(text), *wrong_paths(TESTS, text), *wrong_members(text)] == expected
