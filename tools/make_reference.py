"""`make reference`: write `docs/reference.md` from the code: commands, settings, exit codes, timeframes, REST routes, IB's codes.

With ``--check`` nothing is written; exit code 1 if the file differs from the code. A test checks the same.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from pydantic.fields import FieldInfo

from ktrdr_pipelines import errors
from ktrdr_pipelines.cli.main import cli
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.ib.codes import CODES
from ktrdr_pipelines.settings import PROJECT_ROOT, Settings

TARGET = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
WIDTH = 100
HEAD = """# Reference

Made from the code by `make reference`; do not edit. How things fit together is in `docs/guide.md`.
"""
OTHER_EXITS = {
    0: "Success. For a load: everything requested is in the file.",
    1: "Unexpected error with a traceback: a bug, please report it.",
    130: "Interrupted with Ctrl-C. What was loaded is kept.",
}


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; pipes and line breaks in cells are escaped."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, each with its full name."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in sorted(command.commands.items()):
            yield from walk(inner, f"{path} {name}")


def describe_commands() -> str:
    """What ``--help`` prints, command by command."""
    parts = ["## Commands"]
    for path, command in walk(cli, "ktrdr"):
        # The name is the whole path: a context without a parent has no other way to show it.
        with click.Context(command, info_name=path, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"]) as context:  # fmt: skip  # noqa: E501
            parts += [f"### `{path}`", f"```text\n{command.get_help(context).rstrip()}\n```"]
    return "\n\n".join(parts)


def describe_default(field: FieldInfo) -> str:
    """A default as a user would set it; paths of the project relative to it; empty where the description has it."""
    value = field.get_default()
    if field.default_factory is not None or value in (None, "", {}):
        return ""
    if isinstance(value, Path):
        return f"`{value.relative_to(PROJECT_ROOT)}/` of the project" if value.is_relative_to(PROJECT_ROOT) else ""
    if isinstance(value, tuple):
        return f"`{','.join(format(part, 'g') for part in value)}`"
    if isinstance(value, bool | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def describe_settings() -> str:
    rows = [
        (f"`{field.validation_alias.choices[0]}`", describe_default(field), field.description or "")  # type: ignore[union-attr]
        for field in Settings.model_fields.values()
    ]
    return (
        "## Settings\n\nFrom the environment, else from `.env` in the current folder, else from the project's own `.env`.\n\n"
        + table(("name", "default", "meaning"), rows)
    )


def first_sentence(described: type) -> str:
    """Of a docstring."""
    return " ".join((inspect.getdoc(described) or "").split()).split(". ")[0].rstrip(".") + "."


def describe_exit_codes() -> str:
    """Every exit code, with the first line of its family's docstring."""
    families = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.KtrdrError)]
    rows = {code: [meaning] for code, meaning in OTHER_EXITS.items()}
    for family in families:
        if family is not errors.KtrdrError:
            rows.setdefault(family.exit_code, []).append(f"{first_sentence(family)} (`{family.family}`)")
    listed = [(code, " ".join(meanings)) for code, meanings in sorted(rows.items())]
    return (
        "## Exit codes\n\nA load of which some windows failed ends with the code of the first failure; the others are loaded. "
        "In brackets the `kind` of the error in REST answers.\n\n" + table(("code", "meaning"), listed)
    )


def describe_timeframes() -> str:
    rows = [(f"`{t.name}`", t.ib_bar_size, t.partition, t.classic, t.current) for t in TIMEFRAMES.values()]
    return "## Timeframes\n\n`1M` is read as `1mo`. The longest request depends on `KTRDR_HISTORY_LIMITS`.\n\n" + table(
        ("timeframe", "IB bar size", "partition", "longest request, classic", "current"), rows
    )


def describe_routes() -> str:
    from ktrdr_pipelines import api
    from ktrdr_pipelines.api.app import PREFIX

    rows = []
    for module in pkgutil.iter_modules(api.__path__):
        if module.name.startswith("routes_"):
            for route in importlib.import_module(f"{api.__name__}.{module.name}").router.routes:
                methods = ", ".join(sorted(route.methods))
                rows.append((f"`{methods} {PREFIX}{route.path}`", route.summary or ""))
    return "## REST routes\n\n`/docs` of a running `ktrdr serve` describes every field.\n\n" + table(
        ("route", "what it does"), sorted(rows)
    )


def describe_codes() -> str:
    """IB's codes as `ib/codes.py` has them."""
    rows = [
        (
            ", ".join(map(str, row.codes)),
            f"`{row.pattern.pattern}`" if row.pattern else "any",
            row.meaning,
            row.error.family if row.error else "",
            row.advice,
            row.source,
        )
        for row in CODES
    ]
    return (
        "## IB's message codes\n\nRows of one code are tried in order; an error without a row may be retried.\n\n"
        + table(("code", "text", "meaning", "error", "advice", "source"), rows)
    )


def make_reference() -> str:
    """The whole document."""
    parts = (
        describe_commands,
        describe_settings,
        describe_exit_codes,
        describe_timeframes,
        describe_routes,
        describe_codes,
    )
    return "\n\n".join([HEAD.strip(), *(part() for part in parts)]) + "\n"


def main() -> int:
    os.environ["COLUMNS"] = str(WIDTH)
    made = make_reference()
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text(encoding="utf-8") != made)
    TARGET.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
