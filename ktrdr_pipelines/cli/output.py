"""How commands print: results on stdout, as text or JSON; failures as one line on stderr.

Imports nothing heavy: every command imports it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def show(values: object, lines: Iterable[str], *, as_json: bool) -> None:
    """Print the result on stdout: ``values`` as JSON, or ``lines``."""
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for line in lines:
        click.echo(line)


def json_option(command: Command) -> Command:
    """The option ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")(
        command
    )


def as_one_line(message: object, *, longest: int = 1000) -> str:
    """``message`` on one line, unprintable characters escaped: user input and IB's messages may contain anything."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= longest else text[:longest] + " …"


def complain(message: object) -> None:
    """Print one line on stderr. An ambiguous symbol may have dozens of candidates: the user needs all of them to choose."""
    longest = 20_000 if getattr(message, "candidates", ()) else 1000
    click.echo(f"ktrdr: {as_one_line(message, longest=longest)}", err=True)
