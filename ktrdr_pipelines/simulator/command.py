"""``ktrdr simulator``: run the simulated gateway from the command line. The gateway itself is in `server.py`.

Heavy modules are imported inside the functions, so that ``ktrdr --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ktrdr_pipelines.simulator.market import Market

DEFAULT_PORT = 4001
"""The project's default port of a gateway (`IB_PORT`), so that ``ktrdr`` finds the simulator without any setting."""


@click.command(name="simulator", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=DEFAULT_PORT,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Serve recorded bars from a folder of SYMBOL_TF.csv files instead of synthetic bars.",
)
@click.option(
    "--faults",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Apply the fault rules in FILE, a YAML or JSON list.",
)
@click.option(
    "--log",
    "log_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append each request to FILE as one line of JSON.",
)
@click.option(
    "--judge/--no-judge", default=True, show_default=True, help="Refuse requests that break IB's pacing rules."
)
@click.option(
    "--now",
    metavar="ISO",
    help="Start the gateway's clock at this instant (2024-03-05T15:00:00Z; a bare date is midnight UTC) instead of now.",
)
@click.option("--freeze", is_flag=True, help="Stop the clock at --now.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Seed of the synthetic prices.",
)
@click.option(
    "--durations",
    type=click.Choice(["sessions", "strict", "calendar"]),
    default="sessions",
    show_default=True,
    help="How the gateway counts durations in D, W, M and Y.",
)
@click.option(
    "--habit",
    "habit_texts",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change one habit of the gateway: periods=first|before, days=open, newest=N, head=early|late|none, empty=no_bars. "
    "Repeatable.",
)
@click.option("--zone", default="America/New_York", show_default=True, help="Time zone of the gateway.")
@click.option("--latency", default=0.0, show_default=True, metavar="SECONDS", help="Delay of each history answer.")
def simulator_command(
    host: str,
    port: int,
    replay: Path | None,
    faults: Path | None,
    log_path: Path | None,
    judge: bool,
    now: str | None,
    freeze: bool,
    seed: int,
    durations: str,
    habit_texts: tuple[str, ...],
    zone: str,
    latency: float,
) -> None:
    """Run a simulated IB gateway until Ctrl-C.

    It uses the real protocol on a real socket, serves synthetic or recorded bars, and refuses invalid, unknown and too
    frequent requests as IB does. Its account is SIM0000001.

    \b
    $ ktrdr simulator --port 4001
    simulated gateway listening on 127.0.0.1:4001, synthetic bars of 53 instruments, account SIM0000001
    """
    import asyncio
    import time

    from ktrdr_pipelines.simulator.faults import read_faults
    from ktrdr_pipelines.simulator.habits import read_habits
    from ktrdr_pipelines.simulator.request_reach import DurationRule

    check_host(host)
    check_zone(zone)
    check_latency(latency)
    rules = read_faults(faults) if faults else []
    clock = make_clock(now, freeze=freeze)
    market = open_market(replay, seed)
    asyncio.run(
        run_gateway(
            market,
            log_path,
            host=host,
            port=port,
            faults=rules,
            clock=clock,
            pace_clock=time.monotonic,
            judge=judge,
            zone=zone,
            durations=DurationRule(durations),
            habits=read_habits(habit_texts),
            latency_s=latency,
        )
    )


def check_host(host: str) -> None:
    """Refuse an empty or unprintable address: an empty one would listen on every address of the machine.

    Raises:
        InputError: it is one of those.
    """
    from ktrdr_pipelines.errors import InputError

    if not host.strip() or not host.isprintable():
        raise InputError(f"{host[:40]!r} is not a valid --host", advice="Leave the option out, or give an address.")


def check_latency(seconds: float) -> None:
    """Refuse a latency outside 0 to 3600 seconds.

    Raises:
        InputError: it is outside, or not a number.
    """
    from ktrdr_pipelines.errors import InputError

    if not 0 <= seconds <= 3600:  # NaN is neither
        raise InputError(f"--latency {seconds} is not between 0 and 3600 seconds")


def check_zone(zone: str) -> None:
    """Refuse an unknown time zone.

    Raises:
        InputError: no such time zone.
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    from ktrdr_pipelines.errors import InputError

    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"unknown time zone {zone[:40]!r}", advice="Write it like America/New_York.") from error


def make_clock(now: str | None, *, freeze: bool) -> Callable[[], float]:
    """The gateway's clock: the system's, or one that starts (and with ``freeze`` stays) at ``now``.

    Raises:
        InputError: ``now`` is not an instant.
    """
    import time

    from ktrdr_pipelines.domain.time import parse_instant
    from ktrdr_pipelines.errors import InputError

    if now is None:
        if freeze:
            raise InputError("--freeze needs --now")
        return time.time
    start = parse_instant(now, "--now").timestamp()
    if freeze:
        return lambda: start
    started = time.monotonic()
    return lambda: start + time.monotonic() - started


def open_market(replay: Path | None, seed: int) -> Market:
    """The recorded market in ``replay``, else the synthetic one.

    Raises:
        InputError: the folder has no recordings.
    """
    if replay is not None:
        from ktrdr_pipelines.simulator.replay import ReplayMarket

        return ReplayMarket(replay)
    from ktrdr_pipelines.simulator.synthetic import SyntheticMarket

    return SyntheticMarket(seed)


async def run_gateway(market: Market, log_path: Path | None, **options: object) -> None:
    """Serve until SIGINT or SIGTERM, then close every connection and return.

    Raises:
        InputError: the address is not available, or the log file cannot be written.
    """
    import asyncio
    import contextlib
    import json
    import signal

    from ktrdr_pipelines.errors import InputError
    from ktrdr_pipelines.simulator.gateway import RequestRecord
    from ktrdr_pipelines.simulator.server import SimulatedGateway

    with contextlib.ExitStack() as stack:
        on_record: Callable[[RequestRecord], None] | None = None
        if log_path is not None:
            try:
                log = stack.enter_context(log_path.open("a", encoding="utf-8"))
            except OSError as error:
                raise InputError(f"cannot write the log {log_path}: {error}") from error

            def write(record: RequestRecord) -> None:
                log.write(json.dumps(record.to_dict()) + "\n")
                log.flush()

            on_record = write
        gateway = SimulatedGateway(market, on_record=on_record, **options)  # type: ignore[arg-type]
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Windows loops have no signal handlers; Ctrl-C arrives there as KeyboardInterrupt.
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, stopping.set)
        async with gateway:
            kind = "recorded bars" if type(market).__name__ == "ReplayMarket" else "synthetic bars"
            click.echo(
                f"simulated gateway listening on {gateway.host}:{gateway.port}, {kind} of {len(market.listings)} instruments,"
                f" account {gateway.gateway.account}"
            )
            await stopping.wait()
