"""How commands print: answers on stdout, for programs or for people; failures as one line on stderr.

Light: imported before it is known which command runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def show(values: object, lines: Iterable[str], *, as_json: bool) -> None:
    """The answer on stdout, for programs or for people."""
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for line in lines:
        click.echo(line)


def json_option(command: Command) -> Command:
    """``--json``, as every command that answers has it."""
    return click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object on stdout.")(
        command
    )


def as_one_line(message: object, *, longest: int = 1000) -> str:
    """``message`` as a terminal can show it on one line: what people typed and what IB said may hold anything."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= longest else text[:longest] + " …"


def complain(message: object) -> None:
    """One line on stderr. All candidates of an ambiguous symbol are in it, dozens for a future: a person has to choose."""
    longest = 20_000 if getattr(message, "candidates", ()) else 1000
    click.echo(f"ktrdr: {as_one_line(message, longest=longest)}", err=True)
