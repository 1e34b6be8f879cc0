"""``ktrdr ib``: commands about the gateway; none loads a bar. They print what `services/gateway/` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ktrdr_pipelines.cli.completion import complete_symbol, complete_timeframe
from ktrdr_pipelines.cli.output import complain, json_option, show

if TYPE_CHECKING:
    from ktrdr_pipelines.services.gateway.question import Problem


@click.group("ib")
def ib_commands() -> None:
    """Status, health and configuration of the gateway; the history it has; the contracts of a symbol.

    \b
    $ ktrdr ib health
    healthy: 6 of 6 checks passed
    """


@ib_commands.command("status")
@json_option
def status(as_json: bool) -> None:
    """Show the connection, client ids in use, the pacing budget and the data farms.

    Connects for a moment. Exit codes: 0 connected, 5 no gateway answers (and 4, 7 as for loads).

    \b
    $ ktrdr ib status
    gateway 127.0.0.1:4001: connected as client 1, simulator account SIM0000001
      gateway time  2026-11-22T20:31:05Z, 0 s behind this machine
      link to IB    ok
      farms         contracts secdefil ok, history ushmds ok, quotes usfarm ok
      client ids    none in use
      pacing        2 of 60 requests of the last ten minutes are used, 0 waiting; next free 2026-11-22T20:31:05Z
    """
    from ktrdr_pipelines.cli.ib_tables import describe_status
    from ktrdr_pipelines.services.gateway.status import gateway_status
    from ktrdr_pipelines.settings import load_settings

    found = gateway_status(load_settings())
    show(found.as_dict(), describe_status(found), as_json=as_json)
    _end_with(found.connection.problem or found.pacing_problem)


@ib_commands.command("health")
@json_option
def health(as_json: bool) -> None:
    """Check what a load needs: the gateway, a contract, the farms, the pacing ledger, the data folder.

    Exit codes: 0 healthy, else that of the first failure (5 no gateway, 4 IB in trouble, 7 disk).

    \b
    $ ktrdr ib health
    healthy: 6 of 6 checks passed
      connection       ok  0.1 s  127.0.0.1:4001 as client 1, simulator account SIM0000001
      gateway time     ok  0.0 s  2026-11-22T20:31:05Z
      contract lookup  ok  0.0 s  EUR CASH IDEALPRO USD EUR.USD simulated pair conId 12087792
      farms            ok  0.0 s  contracts secdefil ok, history ushmds ok, quotes usfarm ok
      pacing ledger    ok  0.0 s  0 of 60 used, next free 2026-11-22T20:31:05Z
      data folder      ok  0.0 s  data can be written
    """
    from ktrdr_pipelines.cli.ib_tables import describe_health
    from ktrdr_pipelines.services.gateway.health import gateway_health
    from ktrdr_pipelines.settings import load_settings

    found = gateway_health(load_settings())
    show(found.as_dict(), describe_health(found), as_json=as_json)
    _end_with(found.problem)


@ib_commands.command("config")
@json_option
def config(as_json: bool) -> None:
    """Show the settings of the gateway, and IB's pacing rules, which are not settings. Sends no request.

    \b
    $ ktrdr ib config
    host                  127.0.0.1
    port                  4001
    client_id             next free
    client_id_ranges      person 1 to 50, daemon 200 to 299
    connect_timeout_s     15.0
    request_timeout_s     120.0
    retry_waits_s         15.0, 30.0, 60.0
    history_limits        classic
    """
    from ktrdr_pipelines.cli.ib_tables import describe_config
    from ktrdr_pipelines.services.gateway.config import gateway_config
    from ktrdr_pipelines.settings import load_settings

    found = gateway_config(load_settings())
    show(found.as_dict(), describe_config(found), as_json=as_json)


@ib_commands.command("ranges")
@click.argument("symbols", nargs=-1, shell_complete=complete_symbol)
@click.option(
    "--timeframe",
    "timeframes",
    multiple=True,
    metavar="TIMEFRAME",
    help="Only this timeframe. Repeatable.",
    shell_complete=complete_timeframe,
)
@json_option
def ranges(symbols: tuple[str, ...], timeframes: tuple[str, ...], as_json: bool) -> None:
    """Show where IB's history of SYMBOLS begins and ends, and what is held. Without SYMBOLS: of the whole universe.

    Costs one request for each symbol. The beginning is IB's head timestamp, which is only a hint.
    Exit codes: 0, or that of the first problem (3 IB refuses, 4 IB in trouble, 5 no gateway).

    \b
    $ ktrdr ib ranges AAPL --timeframe 1h
    series   earliest at IB        latest complete       held from             held to
    AAPL 1h  2004-01-02T14:30:00Z  2026-11-20T20:00:00Z  2024-01-02T14:30:00Z  2024-02-29T20:00:00Z
    """
    from ktrdr_pipelines.domain.instruments import file_symbol
    from ktrdr_pipelines.domain.timeframes import parse_timeframe

    for symbol in symbols:
        file_symbol(symbol)
    for timeframe in timeframes:
        parse_timeframe(timeframe)

    from ktrdr_pipelines.cli.ib_tables import describe_ranges
    from ktrdr_pipelines.services.gateway.ranges import data_ranges
    from ktrdr_pipelines.settings import load_settings

    found = data_ranges(load_settings(), symbols or None, timeframes or None)
    show(found.as_dict(), describe_ranges(found), as_json=as_json)
    _end_with(next((each.problem for each in found.ranges if each.problem), None))


@ib_commands.command("cleanup")
@json_option
def cleanup(as_json: bool) -> None:
    """Disconnect every process of this program from the gateway, and end the Dagster runs of dead processes.

    Each process is interrupted as by Ctrl-C and keeps what it loaded. Other programs stay connected.

    \b
    $ ktrdr ib cleanup
    1 client id given back: 1 (process 4242)
    0 still in use
    0 runs of dead processes ended
    """
    from ktrdr_pipelines.cli.ib_tables import describe_cleanup
    from ktrdr_pipelines.services.gateway.cleanup import cleanup as clean_up
    from ktrdr_pipelines.settings import load_settings

    found = clean_up(load_settings())
    show(found.as_dict(), describe_cleanup(found), as_json=as_json)


@ib_commands.command("symbols")
@click.argument("symbol", shell_complete=complete_symbol)
@json_option
def symbols(symbol: str, as_json: bool) -> None:
    """Show every contract that IB has for SYMBOL. Adds nothing to the universe.

    Exit codes: 0 found, 3 IB has none, 5 no gateway.

    \b
    $ ktrdr ib symbols EURUSD
    EURUSD: 1 contract
        sec type  symbol   exchange  currency  expiry     conId  zone              name
        CASH      EUR.USD  IDEALPRO  USD               12087792  America/New_York  EUR.USD simulated pair
    """
    from ktrdr_pipelines.domain.instruments import file_symbol

    file_symbol(symbol)

    from ktrdr_pipelines.cli.ib_tables import describe_found
    from ktrdr_pipelines.services.gateway.symbols import look_up
    from ktrdr_pipelines.settings import load_settings

    found = look_up(load_settings(), symbol)
    show(found.as_dict(), describe_found(found), as_json=as_json)


def _end_with(problem: Problem | None) -> None:
    """Print the problem as one line and exit with its family's code."""
    if problem is None:
        return
    from ktrdr_pipelines.errors import exit_code_of

    complain(f"{problem.message.rstrip('.')}. {problem.advice}")
    raise SystemExit(exit_code_of(problem.kind))
