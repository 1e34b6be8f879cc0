"""The `ktrdr` command: parse, call, print. What it does is done elsewhere; heavy imports happen inside the commands, so that
`ktrdr --help` is quick.

A known failure is one line on stderr and an exit code (`errors.py`, README); a traceback is for bugs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import click

from ktrdr_pipelines.errors import KtrdrError

if TYPE_CHECKING:
    from ktrdr_pipelines.progress import Progress
    from ktrdr_pipelines.report import LoadReport

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="ktrdr-pipelines", prog_name="ktrdr")
def cli() -> None:
    """Historical bars from Interactive Brokers, as one clean CSV per series.

    \b
    ktrdr ib-load AAPL 1h --mode tail      fill from the last held bar to now
    ktrdr simulator                        a pretend gateway to try it with
    ktrdr ui                               everything in the browser
    """


@cli.command("ib-load")
@click.argument("symbol")
@click.argument("timeframe")
@click.option(
    "--mode",
    type=click.Choice(["tail", "backfill", "full"]),
    default="tail",
    show_default=True,
    help="tail: from the last held bar to now. backfill: older than the first held bar, one longest request back or to "
    "--start. full: every gap between start and now. With no CSV each is a full initialisation.",
)
@click.option("--start", metavar="TIME", help="Included. ISO 8601; a bare date is its midnight UTC.")
@click.option("--end", metavar="TIME", help="Not included. Without it: now.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def ib_load(
    symbol: str, timeframe: str, mode: str, start: str | None, end: str | None, as_json: bool, quiet: bool
) -> None:
    """Load the missing bars of SYMBOL at TIMEFRAME.

    \b
    $ ktrdr ib-load AAPL 1h --mode full --start 2024-01-01
    AAPL 1h 2024-01-01..2024-03-05T15:04:05Z: success
      304 bars fetched in 3 requests, 0 retries, 0 s waiting for pacing
      1 gap, 3 partitions complete, 0 bars proven not to exist
      data/AAPL_1h.csv

    Exit codes: 0 all is there, 2 wrong input, 3 IB refuses, 4 IB in trouble (try again), 5 no gateway,
    6 bad data, 7 disk, 70 a bug of this program, 130 interrupted.
    """
    from ktrdr_pipelines.series import file_symbol, parse_range, parse_timeframe

    # Wrong input is told before the second that the imports below take.
    file_symbol(symbol)
    parse_timeframe(timeframe)
    parse_range(start, end)

    from ktrdr_pipelines.loading import load_series
    from ktrdr_pipelines.progress import Progress, show_notice

    progress: Progress = Progress(enabled=not quiet and not as_json)
    with progress:
        result = load_series(symbol, timeframe, mode, start=start, end=end, progress=progress)
    if as_json:
        import json

        click.echo(json.dumps(result.as_dict() | {"run_ids": result.run_ids}, indent=2))
    elif result.report.segments_fetched or not result.report.failures:
        _print_report(result.report)
        for run_id in result.run_ids[-1:]:
            show_notice(f"Dagster run {run_id}")
    if result.report.failures:
        for failure in result.report.failures:
            click.echo(f"ktrdr: {failure.error}", err=True)
        raise SystemExit(result.report.failures[0].error.exit_code)


def _print_report(report: LoadReport) -> None:
    def count(n: int, noun: str) -> str:
        return f"{n:,} {noun}" + ("" if n == 1 else "s")

    click.echo(f"{report.series} {report.window}: {report.status}")
    click.echo(
        f"  {count(report.fetched_bars, 'bar')} fetched in {count(report.ib_requests_made, 'request')}, "
        f"{count(report.retries, 'retry').replace('retrys', 'retries')}, {report.pacing_wait_s:.0f} s waiting for pacing"
    )
    missing = f", {count(report.missing_bars, 'bar')} STILL MISSING" if report.missing_bars else ""
    click.echo(
        f"  {count(report.gaps_analyzed, 'gap')}, {count(len(report.completed), 'partition')} complete, "
        f"{count(report.proven_empty, 'bar')} proven not to exist{missing}"
    )
    for notice in report.notices:
        click.echo(f"  note: {notice}")
    click.echo(f"  {report.merged_file}")


@cli.command("ui")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True, help="Port of the web page.")
def ui(host: str, port: int) -> None:
    """Open the Dagster UI and its daemon on the project's data.

    \b
    $ ktrdr ui --port 3000
    Dagster UI at http://127.0.0.1:3000/assets (Ctrl-C ends it)
    """
    from ktrdr_pipelines.webui import serve_ui

    raise SystemExit(serve_ui(host, port))


def _add_simulator() -> None:
    from ktrdr_pipelines.simulator.command import simulator_command

    cli.add_command(simulator_command)


_add_simulator()


def main() -> NoReturn:
    """Entry point: known failures become one line and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.Abort:
        code = 130
        click.echo("ktrdr: interrupted; what was loaded is kept", err=True)
    except KeyboardInterrupt:
        code = 130
        click.echo("ktrdr: interrupted; what was loaded is kept", err=True)
    except click.ClickException as wrong:
        code = 2
        click.echo(f"ktrdr: {wrong.format_message()} See `ktrdr --help`.", err=True)
    except KtrdrError as error:
        code = error.exit_code
        click.echo(f"ktrdr: {error}", err=True)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
