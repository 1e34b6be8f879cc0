"""Shell completion: symbols and timeframes of the universe, and the command that prints the completion script.

Runs at every press of the key, so it imports nothing heavy and reads only the universe file. An unreadable file completes to
nothing. Script and protocol are click's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ktrdr_pipelines.universe.file import Universe

_VARIABLE = "_KTRDR_COMPLETE"


def complete_symbol(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Symbols of the universe that begin with ``incomplete``, ignoring case."""
    symbols = dict.fromkeys(series.instrument.symbol for series in _read_universe() or ())
    return list(_beginning_with(incomplete, symbols))


def complete_timeframe(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Timeframes that begin with ``incomplete``."""
    from ktrdr_pipelines.domain.timeframes import TIMEFRAMES

    return list(_beginning_with(incomplete, TIMEFRAMES))


def complete_listed_timeframe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Timeframes of the symbol argument in the universe; all timeframes if it has none there."""
    universe, symbol = _read_universe(), context.params.get("symbol")
    instrument = universe.find_instrument(symbol) if universe and symbol else None
    listed = [series.timeframe.name for series in universe or () if series.instrument == instrument]
    return list(_beginning_with(incomplete, listed)) or complete_timeframe(context, parameter, incomplete)


def _beginning_with(incomplete: str, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name.upper().startswith(incomplete.upper()):
            # bash takes a word as it stands, the other shells quote it.
            yield name.replace(" ", "\\ ") if os.environ.get(_VARIABLE, "").startswith("bash") else name


def _read_universe() -> Universe | None:
    from ktrdr_pipelines.errors import KtrdrError
    from ktrdr_pipelines.settings import load_settings
    from ktrdr_pipelines.universe.file import universe_of

    try:
        return universe_of(load_settings())
    except KtrdrError:  # the command itself reports it
        return None


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL: commands, options and their values, symbols and timeframes.

    bash (4.4 or newer): put the line below into ~/.bashrc. zsh: the same with zsh, into ~/.zshrc, after compinit.
    fish: ktrdr completion fish > ~/.config/fish/completions/ktrdr.fish

    \b
    $ eval "$(ktrdr completion bash)"
    $ ktrdr ib-load AAPL 1h --mode <Tab><Tab>
    backfill  full      tail
    $ ktrdr gaps AAPL <Tab><Tab>
    1d  1h  1m  5m
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"No completion for {shell}.")
    click.echo(kind(context.find_root().command, {}, "ktrdr", _VARIABLE).source())
