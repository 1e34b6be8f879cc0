"""``ktrdr universe``: which series exist. Prints what `services/membership.py` returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from ktrdr_pipelines.cli.completion import complete_listed_timeframe, complete_symbol, complete_timeframe
from ktrdr_pipelines.cli.output import complain, json_option, show

if TYPE_CHECKING:
    from ktrdr_pipelines.services.membership import Change, Listed

SECURITY_TYPES = ("STK", "CASH", "FUT", "CONTFUT", "IND", "CRYPTO", "CFD")
WHAT_TO_SHOW = ("TRADES", "MIDPOINT", "BID", "ASK", "BID_ASK", "ADJUSTED_LAST", "AGGTRADES")
# Copies: their modules are too heavy for --help. A test compares them.


@click.group("universe")
def universe_commands() -> None:
    """Show and change which series exist. Each series is an asset in the UI, and the sensors keep it up to date.

    \b
    $ ktrdr universe add TSLA 1h 1d
    added TSLA 1h
    added TSLA 1d
      data/universe.yaml
      a running `ktrdr ui` shows this within seconds
    """


@universe_commands.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """Show every series of the universe with its hours, what to show, and the bars held. Sends no request.

    \b
    $ ktrdr universe list
    series     kind               hours     shows     bars  held from             held to
    AAPL 1h    STK SMART USD      regular   TRADES     287  2024-01-02T14:30:00Z  2024-02-29T20:00:00Z
    EURUSD 1h  CASH IDEALPRO USD  extended  MIDPOINT     0  -                     -
    """
    from ktrdr_pipelines.services.membership import list_series

    found = list_series()
    show({"series": [each.as_dict() for each in found]}, _describe_list(found), as_json=as_json)
    problems = [each for each in found if each.problem]
    for each in problems:
        complain(f"{each.series}: {each.problem}")
    if problems and problems[0].problem:
        raise SystemExit(problems[0].problem.exit_code)


@universe_commands.command("add")
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframes", nargs=-1, required=True, metavar="TIMEFRAME...", shell_complete=complete_timeframe)
@click.option("--sec-type", type=click.Choice(SECURITY_TYPES), help="Kind of instrument; with it IB is not searched.")
@click.option("--exchange", metavar="NAME", help="IB's name of the exchange, SMART for stocks.")
@click.option("--primary-exchange", metavar="NAME", help="Where a stock is listed, if its symbol is ambiguous.")
@click.option("--currency", metavar="CODE", help="Three letters; default: USD.")
@click.option("--ib-symbol", metavar="NAME", help="IB's symbol, if SYMBOL is your own name (ES for ESZ4).")
@click.option("--expiry", metavar="YYYYMM", help="Contract month of a future.")
@click.option("--con-id", type=click.IntRange(1, 2**31 - 1), metavar="N", help="IB's contract id.")
@click.option("--hours", type=click.Choice(["regular", "extended"]), help="Trading hours of a stock; default: regular.")
@click.option("--what-to-show", type=click.Choice(WHAT_TO_SHOW), help="IB's whatToShow: what the bars are made of.")
@json_option
def add(symbol: str, timeframes: tuple[str, ...], as_json: bool, **options: object) -> None:
    """Add SYMBOL at each TIMEFRAME to the universe. Loads no bars: `ktrdr ib-load` or the UI does.

    A symbol that is not in the universe is searched at IB, as by `ktrdr ib symbols`, unless an option names the contract.
    Comments and layout of the file are kept. A running `ktrdr ui` shows the new series within seconds.
    Exit codes: 0, 2 invalid input, 3 IB has no such symbol, 5 no gateway, 7 disk.

    \b
    $ ktrdr universe add ESZ4 1h --sec-type FUT --exchange CME --ib-symbol ES --expiry 202412
    added ESZ4 1h
      data/universe.yaml
      a running `ktrdr ui` shows this within seconds
    """
    _check(symbol, timeframes)
    for name in ("exchange", "primary_exchange", "currency", "ib_symbol", "expiry"):
        _check_word(name, options[name])

    from ktrdr_pipelines.services.membership import add_to_universe

    change = add_to_universe(symbol, timeframes, options)
    show(change.as_dict(), _describe_change(change), as_json=as_json)


@universe_commands.command("remove")
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframes", nargs=-1, metavar="[TIMEFRAME]...", shell_complete=complete_listed_timeframe)
@json_option
def remove(symbol: str, timeframes: tuple[str, ...], as_json: bool) -> None:
    """Remove SYMBOL from the universe, at each TIMEFRAME or at all. Its files are kept, and used again if it is added again.

    \b
    $ ktrdr universe remove AAPL 1h
    removed AAPL 1h
      kept data/AAPL_1h.csv
      kept data/AAPL_1h.meta.json
      data/universe.yaml
      a running `ktrdr ui` shows this within seconds
    """
    _check(symbol, timeframes)

    from ktrdr_pipelines.services.membership import remove_from_universe

    change = remove_from_universe(symbol, timeframes)
    show(change.as_dict(), _describe_change(change), as_json=as_json)


def _check(symbol: str, timeframes: Iterable[str]) -> None:
    from ktrdr_pipelines.domain.instruments import file_symbol
    from ktrdr_pipelines.domain.timeframes import parse_timeframe

    file_symbol(symbol)
    for timeframe in timeframes:
        parse_timeframe(timeframe)


def _check_word(name: str, value: object) -> None:
    """Only a word as IB writes them may get into the universe file."""
    import re

    from ktrdr_pipelines.errors import InputError

    pattern = {"currency": "[A-Z]{3}", "expiry": r"[0-9]{6}([0-9]{2})?"}.get(
        name, "[A-Za-z0-9][A-Za-z0-9 .&/+'-]{0,31}"
    )
    if value is not None and not re.fullmatch(pattern, str(value)):
        option = name.replace("_", "-")
        example = {"currency": "EUR", "expiry": "202412", "ib_symbol": "ES"}.get(name, "NASDAQ")
        raise InputError(f"{str(value)[:40]!r} is not a valid --{option}", advice=f"Write it like {example}.")


def _describe_list(found: Iterable[Listed]) -> list[str]:
    from ktrdr_pipelines.cli.text import lay_out
    from ktrdr_pipelines.domain.time import format_instant

    rows: list[tuple[str, ...]] = [("series", "kind", "hours", "shows", "bars", "held from", "held to")]
    for each in found:
        i = each.series.instrument
        kind = " ".join(part for part in (i.sec_type, i.exchange, i.currency, i.expiry) if part)
        ends = [format_instant(at) if at else "-" for at in (each.first, each.last)]
        bars = "cannot be read" if each.problem else f"{each.rows:,}"
        rows.append((str(each.series), kind, str(i.hours), i.what_to_show, bars, *ends))
    return lay_out(rows, indent=0)


def _describe_change(change: Change) -> list[str]:
    return [
        *(f"added {series}" for series in change.added),
        *(f"{series} is already there" for series in change.already),
        *(f"removed {series}" for series in change.removed),
        *(f"  kept {path}" for path in change.kept),
        f"  {change.path}",
        *(["  a running `ktrdr ui` shows this within seconds"] if change.added or change.removed else []),
    ]
