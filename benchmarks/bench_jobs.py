"""Whole loads from the command line against the simulated gateway: requests, bars, wall time, CPU, each beside its rival.

Every load is that of a new user (folders of its own, judged pacing), in a process of its own, alternately with the rival; the
medians of three. Rivals: the loop of the client library's documentation (`client_loop.py`), the same requests sent by it all
at once, and the least time that the rules of IB and the answers allow. Start-up is part of every time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from gateway import DAGSTER, KTRDR, Gateway, User, new_users, run_gateway
from measuring import REPEATS, Spent, alternate, run
from rows import print_row

from ktrdr_pipelines.ib.pacing.rules import BURST_S, BURST_UNITS

LOOP = Path(__file__).with_name("client_loop.py")
OPEN_REQUESTS = 6
"""The default of KTRDR_OPEN_REQUESTS."""
STOCKS = ("AAPL", "MSFT", "SPY", "GOOG", "AMZN", "NVDA", "IBM", "QQQ", "TSLA", "META")
Users = Callable[..., User]


@dataclass(frozen=True, slots=True)
class Job:
    """A window of one series: how a user loads it, and how a script with the client library does."""

    what: str
    symbol: str
    timeframe: str
    start: str
    end: str
    bar_size: str
    duration: str
    requests: int
    """The fewest under the classic limits."""

    @property
    def series(self) -> str:
        return f"{self.symbol}_{self.timeframe}"

    def load(self, user: User) -> Spent:
        window = ("--mode", "full", "--start", self.start, "--end", self.end)
        return run([*KTRDR, "ib-load", self.symbol, self.timeframe, *window], user.environment, user.folder)

    def loop(self, user: User, port: int, at_once: list[list[str]] | None = None) -> Spent:
        """The client library's way; ``at_once``: these requests (end, duration) all together."""
        what = "MIDPOINT" if self.symbol == "EURUSD" else "TRADES"
        command = [
            sys.executable, LOOP, "--port", port, "--symbol", self.symbol, "--bar-size", self.bar_size,
            "--duration", self.duration, "--what", what, "--start", self.start, "--end", self.end,
            "--requests", json.dumps(at_once or []), "--folder", user.folder,
        ]  # fmt: skip
        return run(command, user.environment, user.folder)


HOURS = Job("two years of 1h", "AAPL", "1h", "2022-01-01", "2024-01-01", "1 hour", "1 M", 24)
DAYS = Job("ten years of 1d", "AAPL", "1d", "2014-01-01", "2024-01-01", "1 day", "1 Y", 10)
MINUTES = Job("two months of 1m", "AAPL", "1m", "2024-01-01", "2024-03-01", "1 min", "1 D", 42)
PAIR = Job("half a year of EURUSD 1h", "EURUSD", "1h", "2023-07-01", "2024-01-01", "1 hour", "1 M", 6)
WEEKS = Job("fourteen years of 1w", "AAPL", "1w", "2010-01-01", "2024-01-01", "1 week", "2 Y", 7)


def least_s(requests: int, answer_s: float) -> float:
    """The least seconds for ``requests`` of one contract, if each answer takes ``answer_s``: fewer than six in two seconds
    (docs/ib_facts.md, 6), and six open at once."""
    return max((requests - 1) // (BURST_UNITS - 1) * BURST_S + answer_s, ceil(requests / OPEN_REQUESTS) * answer_s)


def measure(job: Job, users: Users, answer_s: float, rival: Callable[[User, int], Spent] | None = None) -> list[Spent]:
    """Medians of loads of ``job`` and of ``rival``, alternately, each run with a gateway of its own; counts bars and requests."""

    def ours() -> Spent:
        with run_gateway("--latency", answer_s) as gateway:
            user = users(gateway.port)
            spent = job.load(user)
            check_counts(job, user, gateway)
            return spent

    def theirs() -> Spent:
        assert rival is not None
        with run_gateway("--latency", answer_s) as gateway:
            return rival(users(), gateway.port)

    return alternate(ours, theirs) if rival else alternate(ours)


def check_counts(job: Job, user: User, gateway: Gateway) -> None:
    requests = gateway.history_requests()
    found[job.what] = (len(requests), user.held_bars(job.series))
    for each in requests:
        if each["pacing"]:
            refused.append(f"{job.what}: {each['pacing']}")


def print_cpu(what: str, ours: Spent, rival: Spent | None = None) -> None:
    """For readers of wall times of a machine that had other work."""
    print(f"{what}: CPU {ours.cpu_s:.1f} s" + (f", of the client library's {rival.cpu_s:.1f} s" if rival else ""))


refused: list[str] = []
"""Requests of loads that the gateway refused because they came too fast."""

found: dict[str, tuple[int, int]] = {}
"""Requests and bars of the last load of each job."""


# ------------------------------------------------------------------------------------------------ the four jobs


def measure_jobs(users: Users) -> None:
    """The four jobs under the classic limits, against the loop of the library's documentation; half a second an answer."""
    for job in (HOURS, DAYS, MINUTES, PAIR):
        ours, loop = measure(job, users, 0.5, job.loop)
        requests, bars = found[job.what]
        theirs = json.loads(loop.output)
        print_row(
            f"{job.what}: requests", requests, "requests", against=theirs["requests"], of="documented loop",
            at_most=job.requests,
        )  # fmt: skip
        print_row(
            f"{job.what}: bars in the file", bars, "bars", against=theirs["bars"], of="documented loop",
            at_least=1, reach_unit="times",
        )  # fmt: skip
        print_cpu(job.what, ours, loop)
        print_row(
            f"{job.what}, 0.5 s an answer: wall time", ours.wall_s, "s", against=loop.wall_s, of="documented loop",
            at_most=1, reach_unit="times",
        )  # fmt: skip


def measure_counts(users: Users) -> None:
    """Weeks; then a tail of one bar, and a load with nothing to do."""
    with run_gateway() as gateway:
        user = users(gateway.port)
        WEEKS.load(user)
        print_row(f"{WEEKS.what}: requests", len(gateway.history_requests()), "requests", at_most=WEEKS.requests)
    with run_gateway() as gateway:
        user = users(gateway.port)
        for end, what, reach in (
            ("2023-06-01", "first load", 6),
            ("2023-06-02", "tail of a day", 1),
            ("2023-06-02", "load with nothing to do", 0),
        ):
            before = len(gateway.history_requests())
            Job("", "AAPL", "1h", "2022-12-01", end, "", "", 0).load(user)
            print_row(f"1h, {what}: requests", len(gateway.history_requests()) - before, "requests", at_most=reach)


# ------------------------------------------------------------------------------------------------ against the rules


def measure_bounds(users: Users) -> None:
    for job, answer_s, reach in ((HOURS, 2.0, 22), (MINUTES, 0.0, 20)):
        (ours,) = measure(job, users, answer_s)
        least = least_s(job.requests, answer_s)
        what = f"{job.requests} requests of {job.timeframe}, {answer_s:g} s an answer: wall time"
        print_row(what, ours.wall_s, "s", against=least, of="least by the rules", at_most=reach)
        print_cpu(what, ours)


def measure_ten(users: Users) -> None:
    """Ten series in one run of Dagster's own command, a request each."""
    keys = ",".join(f"ohlcv/{symbol}_1h" for symbol in STOCKS)
    month = Job("", ",".join(STOCKS), "1h", "2024-03-01", "2024-04-01", "1 hour", "1 M", 1)

    def ours() -> Spent:
        with run_gateway("--latency", 2) as gateway:
            user = users(gateway.port)
            user.write_universe([f"{{symbol: {symbol}, timeframes: [1h]}}" for symbol in STOCKS])
            command = [*DAGSTER, "asset", "materialize", "-m", "ktrdr_pipelines.definitions"]
            spent = run([*command, "--select", keys, "--partition", month.start], user.environment, user.folder)
            found["ten"] = len(gateway.history_requests()), sum(user.held_bars(f"{s}_1h") for s in STOCKS)
            return spent

    def theirs() -> Spent:
        with run_gateway("--latency", 2) as gateway:
            return month.loop(users(), gateway.port, [["20240331-20:00:00", "1 M"]])

    mine, loop = alternate(ours, theirs)
    requests, bars = found["ten"]
    print_cpu("ten series", mine, loop)
    print_row("ten series, one request each: requests", requests, "requests", at_most=10)
    print(f"ten series: {bars} bars held; {loop.output.strip()} by the client library")
    print_row(
        "ten series, one request each, 2 s an answer, dagster asset materialize: wall time", mine.wall_s, "s",
        against=loop.wall_s, of="client library, all at once", at_most=15,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ start-up


def measure_current(users: Users) -> None:
    """Few requests under the current limits: nearly all start-up. The client library sends the very same requests at once."""
    for job in (MINUTES, HOURS, DAYS):
        asked: list[list[str]] = []

        def ours(job: Job = job, asked: list[list[str]] = asked) -> Spent:
            with run_gateway() as gateway:
                spent = job.load(users(gateway.port, KTRDR_HISTORY_LIMITS="current"))
                asked[:] = [[each["end"], each["duration"]] for each in gateway.history_requests()]
                return spent

        def theirs(job: Job = job, asked: list[list[str]] = asked) -> Spent:
            with run_gateway() as gateway:
                return job.loop(users(), gateway.port, asked)

        mine, loop = alternate(ours, theirs)
        what = f"{job.what}, current limits, {len(asked)} requests"
        print_cpu(what, mine, loop)
        print_row(f"{what}: wall time", mine.wall_s, "s", against=loop.wall_s, of="client library, all at once")


# ------------------------------------------------------------------------------------------------ each further request


def measure_further(users: Users) -> None:
    """CPU of a load of 50 requests of 390 bars, less that of one of 5, for each of the 45; and so for the client library."""

    def slope(way: Callable[[Job, User, int], Spent], *options: object) -> Spent:
        took = []
        for job in (few, many):
            with run_gateway(*options) as gateway:
                took.append(way(job, users(gateway.port), gateway.port).cpu_s)
        return Spent(0, (took[1] - took[0]) / 45, 0, "")

    few = Job("", "AAPL", "1m", "2024-01-01", "2024-01-09", "1 min", "1 D", 5)
    many = Job("", "AAPL", "1m", "2024-01-01", "2024-03-14", "1 min", "1 D", 50)
    mine, loop = alternate(
        lambda: slope(lambda job, user, _port: job.load(user)),
        lambda: slope(lambda job, user, port: job.loop(user, port), "--no-judge"),
    )
    print_row(
        "each further request of 390 bars: CPU", 1e3 * mine.cpu_s, "ms", against=1e3 * loop.cpu_s, of="documented loop",
        at_most=25,
    )  # fmt: skip


def main() -> None:
    parts: dict[str, Callable[[Any], None]] = {
        "current": measure_current,
        "counts": measure_counts,
        "ten": measure_ten,
        "bounds": measure_bounds,
        "further": measure_further,
        "jobs": measure_jobs,
    }
    with new_users() as users:
        for name in sys.argv[1:] or parts:
            parts[name](users)
    print_row("requests of these loads that broke a pacing rule", len(refused), "requests", at_most=0)
    for each in refused:
        print(each)
    print(f"medians of {REPEATS}")


if __name__ == "__main__":
    main()
