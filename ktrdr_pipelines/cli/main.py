"""The `ktrdr` command: parse, call a service, print. Commands import heavy modules themselves, so that `ktrdr --help` is quick.

A known failure is one line on stderr and an exit code (`errors.py`, README); a traceback is a bug.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ktrdr_pipelines.cli.completion import (
    complete_listed_timeframe,
    complete_symbol,
    complete_timeframe,
    completion,
)
from ktrdr_pipelines.cli.ib_commands import ib_commands
from ktrdr_pipelines.cli.output import as_one_line, complain, json_option, show
from ktrdr_pipelines.cli.universe_commands import universe_commands
from ktrdr_pipelines.errors import KtrdrError

if TYPE_CHECKING:
    from ktrdr_pipelines.services.progress import Progress

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="ktrdr-pipelines", prog_name="ktrdr")
def cli() -> None:
    """Historical bars from Interactive Brokers, as one clean CSV per series.

    \b
    ktrdr ib-load AAPL 1h --mode tail      fill from the last held bar to now
    ktrdr gaps                             what is held and what is missing
    ktrdr adopt AAPL 1h old.csv            add the bars of another program's file
    ktrdr universe add TSLA 1h             add a series, also in the UI
    ktrdr ib health                        check what a load needs
    ktrdr simulator                        run a simulated gateway to try it with
    ktrdr prune                            remove old runs and logs from Dagster's records
    ktrdr ui                               the Dagster UI and its daemon
    ktrdr serve                            the REST API
    """


@cli.command("ib-load")
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@click.option(
    "--mode",
    type=click.Choice(["tail", "backfill", "full"]),
    default="tail",
    show_default=True,
    help="tail: from the last held bar to now. backfill: older than the first held bar, one longest request back or to "
    "--start. full: every gap between start and now. With no CSV each is a full initialisation.",
)
@click.option(
    "--start",
    metavar="TIME",
    help="Included. ISO 8601; a time without a zone is UTC, a bare date its midnight UTC.",
)
@click.option("--end", metavar="TIME", help="Not included. Without it: now.")
@click.option(
    "--sec-type", default="", metavar="KIND", help="STK, CASH, FUT, CONTFUT, IND, CRYPTO or CFD; for a new symbol."
)
@click.option("--exchange", default="", metavar="CODE", help="IB's code of its (primary) exchange; for a new symbol.")
@click.option("--currency", default="", metavar="CODE", help="Its currency; for a new symbol.")
@click.option("--con-id", type=click.IntRange(1, (1 << 31) - 1), help="IB's contract id; for a new symbol.")
@click.option("--dry-run", is_flag=True, help="Show gaps, requests and when they could be done; ask and write nothing.")
@json_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def ib_load(
    symbol: str,
    timeframe: str,
    mode: str,
    start: str | None,
    end: str | None,
    sec_type: str,
    exchange: str,
    currency: str,
    con_id: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load the missing bars of SYMBOL at TIMEFRAME.

    \b
    $ ktrdr ib-load AAPL 1h --mode full --start 2024-01-01
    AAPL 1h 2024-01-01..2024-03-05T15:04:05Z: success
      304 bars fetched in 3 requests, 0 retries, 0 s waiting for pacing
      1 gap found, 3 partitions complete, 0 bars absent at IB
      data/AAPL_1h.csv

    Exit codes: 0 success, 2 invalid input, 3 IB refuses, 4 transient trouble (try again), 5 no gateway,
    6 invalid bars, 7 disk, 70 a bug of this program, 130 interrupted.
    """
    # Only the parsing: invalid input is refused before the second that the other imports take.
    from ktrdr_pipelines.domain.load_request import Choice, LoadRequest

    choice = Choice(sec_type, exchange, currency, con_id or 0)
    request = LoadRequest.parse(symbol, timeframe, mode, start=start, end=end, choice=choice, now=datetime.now(UTC))

    from ktrdr_pipelines.cli.tables import describe_dry_run, describe_load

    if dry_run:
        from ktrdr_pipelines.services.dry_run import plan_series

        dry = plan_series(request)
        show(dry.as_dict(), describe_dry_run(dry), as_json=as_json)
        return

    from ktrdr_pipelines.services.load import load_series
    from ktrdr_pipelines.services.progress import Progress, show_notice

    progress: Progress = Progress(enabled=not quiet and not as_json)
    with progress:
        result = load_series(request, progress=progress)
    if as_json or result.report.segments_fetched or not result.report.failures:
        show(
            result.as_dict() | {"run_ids": result.run_ids, "dry_run": False},
            describe_load(result.report),
            as_json=as_json,
        )
    if not as_json and (result.report.segments_fetched or not result.report.failures):
        for run_id in result.run_ids[-1:]:
            show_notice(f"Dagster run {run_id}")
    if result.report.failures:
        for failure in result.report.failures:
            complain(failure.error)
        raise SystemExit(result.report.failures[0].error.exit_code)


@cli.command("gaps")
@click.argument("symbol", required=False, shell_complete=complete_symbol)
@click.argument("timeframe", required=False, shell_complete=complete_listed_timeframe)
@json_option
def gaps(symbol: str | None, timeframe: str | None, as_json: bool) -> None:
    """Show what is held, what is missing and why, and what is absent at IB.

    Without SYMBOL and TIMEFRAME: one line for each series of the universe. Sends no request and changes nothing.

    Missing, in both views, is every complete bar since the first partition (KTRDR_PARTITION_STARTS) that is neither held nor
    absent at IB. Older ones are before the first held bar; `ktrdr ib-load --mode backfill` requests them.

    \b
    $ ktrdr gaps AAPL 1h
    AAPL 1h: 287 bars
      held     2024-01-02T14:30:00Z to 2024-02-29T20:00:00Z, data/AAPL_1h.csv
      missing  36,035 bars, 35,236 of them older
        from                  to                    bars    where                      why
        2004-01-02T14:30:00Z  2023-12-29T21:00:00Z  35,236  before the first held bar  never asked
        ...
      absent at IB  3 bars in 1 range
        2024-01-09T15:00:00Z..2024-01-09T18:00:00Z, 3 bars
          asked 2024-03-05T15:04:05Z for 22 D to 2024-02-01T00:00:00Z: 151 bars, 137 of them in the window
    """
    from ktrdr_pipelines.domain.instruments import file_symbol
    from ktrdr_pipelines.domain.timeframes import parse_timeframe

    if symbol is not None:
        if timeframe is None:
            raise click.UsageError("gaps needs SYMBOL and TIMEFRAME, or neither.")
        file_symbol(symbol)
        parse_timeframe(timeframe)

    from ktrdr_pipelines.cli.tables import describe_holding, describe_universe
    from ktrdr_pipelines.services.inspection import Unreadable, inspect_one, inspect_universe

    if symbol is not None and timeframe is not None:
        held = inspect_one(symbol, timeframe)
        show(held.as_dict(), describe_holding(held), as_json=as_json)
        return
    found = list(inspect_universe())
    unreadable = [item for item in found if isinstance(item, Unreadable)]
    show({"series": [item.as_dict() for item in found]}, describe_universe(found), as_json=as_json)
    for item in unreadable:
        complain(f"{item.series}: {item.error}")
    if unreadable:
        raise SystemExit(unreadable[0].error.exit_code)


@cli.command("adopt")
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--assume-utc", is_flag=True, help="Read timestamps without a time zone as UTC.")
@json_option
def adopt(symbol: str, timeframe: str, file: Path, assume_utc: bool, as_json: bool) -> None:
    """Add the bars of FILE, a CSV of another program, to the series SYMBOL TIMEFRAME.

    Columns: timestamp (or date, datetime, or a first column without a name), open, high, low, close, volume, in any order.
    A bar that is held already is kept. Invalid rows and rows outside the trading hours are shown and dropped. FILE is not
    changed, except if it is the series' own CSV: then it is converted in place, and the original is kept beside it.

    \b
    $ ktrdr adopt AAPL 1d old/aapl.csv
    AAPL 1d: 250 rows adopted from old/aapl.csv, 1 row dropped; 250 held now
        line 17: high 189.2 is below open 190.1: 2024-01-26,190.1,189.2,...
    """
    from ktrdr_pipelines.domain.instruments import file_symbol
    from ktrdr_pipelines.domain.timeframes import parse_timeframe

    file_symbol(symbol)
    parse_timeframe(timeframe)

    from ktrdr_pipelines.cli.tables import describe_adoption
    from ktrdr_pipelines.services.inspection import adopt_file

    adoption = adopt_file(symbol, timeframe, file, assume_utc=assume_utc)
    show(adoption.as_dict(), describe_adoption(adoption), as_json=as_json)


@cli.command("calendar")
@click.argument("symbol", shell_complete=complete_symbol)
@click.option("--start", help="Start of the comparison, ISO 8601; default: a year ago.")
@click.option("--end", help="End of the comparison, not included; default: now.")
@click.option(
    "--apply",
    is_flag=True,
    help="Use IB's schedule instead of the built-in calendar, for every series of that calendar.",
)
@json_option
def calendar(symbol: str, start: str | None, end: str | None, apply: bool, as_json: bool) -> None:
    """Compare the trading calendar of SYMBOL with IB's schedule.

    Sends one request for each year, within the pacing rules, and a second one if sessions are missing from IB's schedule.
    Corrections are files in the data folder, under calendars/; delete a file to undo them.

    \b
    $ ktrdr calendar AAPL --start 2024-12-01 --end 2025-02-01
    AAPL follows NYSE, regular hours: 41 sessions from 2024-12-02 to 2025-01-31 compared, 2 requests
      2025-01-09: 09 14:30..21:00 by the calendar, closed by IB
      not applied (--apply uses IB's schedule)
    """
    from ktrdr_pipelines.domain.instruments import file_symbol
    from ktrdr_pipelines.domain.time import parse_range

    file_symbol(symbol)
    parse_range(start, end, now=datetime.now(UTC))

    from ktrdr_pipelines.cli.tables import describe_calendar_check
    from ktrdr_pipelines.services.calendar_check import check_calendar

    check = check_calendar(symbol, start=start, end=end, apply=apply)
    show(check.as_dict(), describe_calendar_check(check), as_json=as_json)


@cli.command("prune")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@json_option
def prune(dry_run: bool, as_json: bool) -> None:
    """Remove runs, logs and ticks that nothing needs from Dagster's records. A daily job of `ktrdr ui` does the same.

    Bars are not touched, and every partition keeps its status. Kept are runs in progress, jobs of your own, successful runs of
    sensors and schedules for 3 days, failed ones for 30, yours for a year (KTRDR_KEEP_... in the settings), and as long as a
    partition shows as failed the run that failed.

    \b
    $ ktrdr prune --dry-run
    1,204 of 2,071 finished runs to remove
    312 partitions recorded again without their run
    """
    from ktrdr_pipelines.services.prune import prune_records

    found = prune_records(dry_run=dry_run, log=lambda text: None if as_json else click.echo(text, err=True))
    show(found.as_dict(), found.describe(), as_json=as_json)


@cli.command("ui")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True, help="Port of the web page.")
def ui(host: str, port: int) -> None:
    """Run the Dagster UI and its daemon on the project's data.

    \b
    $ ktrdr ui --port 3000
    Dagster UI at http://127.0.0.1:3000/assets (Ctrl-C ends it)
    """
    from ktrdr_pipelines.cli.ui import serve_ui

    raise SystemExit(serve_ui(host, port))


@cli.command("serve")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; any but loopback needs a token."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port of the REST API.")
def serve(host: str, port: int) -> None:
    """Serve the REST API, described at /docs. Needs the extra `api`.

    \b
    $ ktrdr serve --port 8000
    REST API at http://127.0.0.1:8000/api/v1, described at http://127.0.0.1:8000/docs (Ctrl-C ends it)
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise click.ClickException("the REST API needs the extra `api`: pip install 'ktrdr-pipelines[api]'.") from None

    from ktrdr_pipelines.api.app import serve as serve_api

    raise SystemExit(serve_api(host, port))


def _add_commands() -> None:
    from ktrdr_pipelines.simulator.command import simulator_command

    for command in (ib_commands, universe_commands, simulator_command, completion):
        cli.add_command(command)


_add_commands()


def main() -> NoReturn:
    """Entry point: known failures become one line and an exit code."""
    # A start makes a million objects that stay. Looking through them for garbage again and again is a fifth of its time.
    gc.set_threshold(50_000)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as with Ctrl-C: open requests are cancelled
    try:
        code = cli.main(prog_name="ktrdr", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
        complain("interrupted; what was loaded is kept")
    except click.exceptions.NoArgsIsHelpError as wrong:
        code = 0
        click.echo(wrong.ctx.get_help() if wrong.ctx else "")
    except click.ClickException as wrong:
        code = 2
        where = getattr(wrong, "ctx", None)
        command = where.command_path if where is not None else "ktrdr"
        complain(f"{as_one_line(wrong.format_message(), longest=500)} See `{command} --help`.")
    except KtrdrError as error:
        code = error.exit_code
        complain(error)
    except BrokenPipeError:  # `ktrdr gaps | head`: the reader has closed
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        gc.freeze()  # likewise at the interpreter's end, when the last line is printed: half a second
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
