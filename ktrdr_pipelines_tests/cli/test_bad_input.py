"""Whatever is typed, a command ends in one line and a documented exit code: never a traceback, never half a deed.

Two tables. `WRONG` has the message for each kind of mistake. `EDGES` is put into every parameter of every command,
however odd; new commands and parameters are in it by themselves. Both run in this process, a few real processes after them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from ktrdr_pipelines.cli.main import cli, main
from ktrdr_pipelines.cli.output import as_one_line
from ktrdr_pipelines.universe.file import DEFAULT_UNIVERSE, read_universe

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], unused_port: int) -> Say:
    """Run `ktrdr` in this process, in an empty folder and without a gateway: exit code, stdout, stderr."""
    for name, value in {
        "IB_PORT": str(unused_port), "IB_RETRY_WAITS": "", "KTRDR_DATA_DIR": str(tmp_path / "data"),
        "DAGSTER_HOME": str(tmp_path / "home"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ktrdr", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err

    return run


def assert_one_line(code: int, err: str, *words: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("ktrdr: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 1100
    assert code == 2, err
    for word in words:
        assert word in lines[0]


LONG = "A" * 10_000
NO_SYMBOL, NO_TIMEFRAME, NO_DATE = "is not a symbol", "unknown timeframe", "is not a date"
YEARS = "outside the years 1970 to 2100"

WRONG: list[tuple[list[str], str]] = [
    # symbols, of every command that takes one
    *(([*command, symbol, *rest], NO_SYMBOL)
      for command, rest in ((["ib-load"], ["1h"]), (["gaps"], ["1h"]), (["adopt"], ["1h", "x.csv"]), (["calendar"], []),
                            (["ib", "symbols"], []), (["ib", "ranges"], []), (["universe", "add"], ["1h"]),
                            (["universe", "remove"], []))
      for symbol in ("", " ", LONG, "../../etc/passwd", "/etc/passwd", "AAPL\n1h", "ÄÄPL", "AAPL\x00", "\x1b[31mA", "☃")),
    # timeframes
    *(([*command, timeframe, *rest], NO_TIMEFRAME)
      for command, rest in ((["ib-load", "AAPL"], []), (["gaps", "AAPL"], []), (["adopt", "AAPL"], ["x.csv"]),
                            (["universe", "add", "AAPL"], []), (["universe", "remove", "AAPL"], []),
                            (["ib", "ranges", "AAPL", "--timeframe"], []))
      for timeframe in ("", "7m", "1H", "1 h", "60", "１h", "../1h", LONG)),
    # times: wrong shapes, wrong zones, before 1970, too far, in the future, in the wrong order
    *(([*command, option, text], words)
      for command in (["ib-load", "AAPL", "1h"], ["calendar", "AAPL"]) for option in ("--start", "--end")
      for text, words in (
          ("", NO_DATE), ("soon", NO_DATE), ("2024-13-01", NO_DATE), ("2023-02-29", NO_DATE), ("2024-01-01T25:00", NO_DATE),
          ("2024-01-01T10:00+25:00", NO_DATE), ("2024-01-01T10:00 Europe/Berlin", NO_DATE), ("01/02/2024", NO_DATE),
          ("1704067200", NO_DATE), ("２０２４-01-01", NO_DATE), (LONG, NO_DATE), ("nan", NO_DATE),
          ("1969-12-31T23:59:59", YEARS), ("1970-01-01T00:00+01:00", YEARS), ("0001-01-01T00:00+14:00", YEARS),
          ("9999-12-31T23:00-14:00", YEARS), ("2101-01-01", YEARS))),
    *(([*command, "--start", "2099-01-01"], "in the future")
      for command in (["ib-load", "AAPL", "1h"], ["calendar", "AAPL"])),
    *(([*command, "--start", "2024-02-01", "--end", end], "is not before end")
      for command in (["ib-load", "AAPL", "1h"], ["calendar", "AAPL"])
      for end in ("2024-01-01", "2024-02-01", "2024-02-01T01:00+01:00")),
    # windows before all partitions: refused without asking IB, also of a symbol that would have to be looked up
    *((["ib-load", symbol, timeframe, *more, "--end", end], "KTRDR_PARTITION_STARTS")
      for symbol, timeframe, end in (("AAPL", "1h", "2003-12-31"), ("AAPL", "1d", "1980-01-01"), ("NOSUCH", "5s", "2023-06-01"))
      for more in ([], ["--mode", "full"], ["--mode", "backfill", "--dry-run"], ["--start", "1970-01-01", "--dry-run"])),
    # enumerations, numbers, arguments
    (["ib-load", "AAPL", "1h", "--mode", "sideways"], "'tail', 'backfill', 'full'"),
    (["ib-load", "AAPL", "1h", "--mode", ""], "--mode"),
    (["ib-load", "AAPL", "1h", "--strat", "2024-01-01"], "No such option"),
    (["ib-load", "AAPL"], "TIMEFRAME"),
    (["ib-load", "AAPL", "1h", "extra"], "extra"),
    (["gaps", "AAPL"], "SYMBOL and TIMEFRAME"),
    (["gaps", "NOSUCH", "1h"], "not in the universe"),
    (["adopt", "AAPL", "1h", "nosuch.csv"], "no file"),
    (["adopt", "AAPL", "1h", LONG], "no file"),
    (["adopt", "AAPL", "1h", "."], "no file"),
    (["nosuch"], "No such command"),
    ([LONG], "No such command"),
    (["ib", "nosuch"], "No such command"),
    (["ib", "ranges", *(f"A{i}" for i in range(30))], "30 instruments at once"),
    (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
    (["universe", "add", "AAPL"], "TIMEFRAME"),
    (["universe", "add", "TSLA", "1h", "--sec-type", "BOND"], "'STK', 'CASH'"),
    (["universe", "add", "TSLA", "1h", "--con-id", "0"], "--con-id"),
    (["universe", "add", "TSLA", "1h", "--con-id", "x"], "--con-id"),
    (["universe", "add", "TSLA", "1h", "--con-id", "99999999999999"], "--con-id"),
    *((["ib-load", "TSLA", "1h", "--con-id", number], "--con-id") for number in ("0", "-1", "2147483648", "9223372036854775807")),
    *((["universe", "add", "ESZ4", "1h", "--sec-type", "FUT", "--exchange", "CME", "--expiry", month], "202412")
      for month in ("209913", "000000", "202400", "20241232")),
    *((["universe", "add", symbol, "1h", "--sec-type", kind, "--exchange", "X", "--what-to-show", what], has)
      for symbol, kind, what, has in (
          ("GBPUSD", "CASH", "TRADES", "has MIDPOINT, BID, ASK, BID_ASK"), ("BTC", "CRYPTO", "TRADES", "has AGGTRADES, MIDPOINT"),
          ("SPX", "IND", "MIDPOINT", "has TRADES"), ("X", "CFD", "TRADES", "has MIDPOINT"), ("X", "STK", "AGGTRADES", "TRADES"),
          ("ESZ4", "FUT", "ADJUSTED_LAST", "has TRADES"))),
    (["universe", "add", "TSLA", "1h", "--hours", "all"], "'regular', 'extended'"),
    (["universe", "add", "TSLA", "1h", "--what-to-show", "EVERYTHING"], "'TRADES'"),
    (["universe", "add", "TSLA", "1h", "--currency", "euro"], "EUR"),
    (["universe", "add", "TSLA", "1h", "--currency", ""], "--currency"),
    (["universe", "add", "ESZ4", "1h", "--sec-type", "FUT", "--exchange", "CME", "--expiry", "December"], "202412"),
    (["universe", "add", "ESZ4", "1h", "--sec-type", "FUT"], "needs an exchange"),
    (["universe", "add", "GBPUSD", "1h", "--sec-type", "CASH", "--hours", "regular"], "only stocks have regular hours"),
    (["universe", "add", "GBPUS", "1h", "--sec-type", "CASH"], "not a currency pair"),
    (["universe", "add", "AAPL", "1h", "--hours", "extended"], "is in the universe with hours regular"),
    (["universe", "remove", "TSLA"], "not in the universe"),
    (["universe", "remove", "AAPL", "2h"], "AAPL at 1m, 5m, 1h, 1d"),
    (["ui", "--port", "0"], "--port"),
    (["ui", "--port", "65536"], "--port"),
    (["ui", "--port", "http"], "--port"),
    (["ui", "--host", ""], "every address"),
    (["ui", "--host", "192.0.2.1"], "cannot listen"),
    (["ui", "--host", "nosuch.invalid"], "cannot listen"),
    (["ui", "--host", "a" * 300], "cannot listen"),
    *((["serve", "--port", port], "--port") for port in ("0", "65536", "-1", "http", "")),
    *((["serve", "--host", host], "KTRDR_API_TOKEN") for host in ("0.0.0.0", "::", "192.0.2.1", "nosuch.invalid", "", "a" * 300)),
    (["serve", "AAPL"], "AAPL"),
    (["ui", "AAPL"], "AAPL"),
    (["simulator", "AAPL"], "AAPL"),
    *((["simulator", "--port", port], "--port") for port in ("65536", "http", "")),
    (["simulator", "--port", "-1"], "--port"),
    (["simulator", "--seed", "-1"], "--seed"),
    (["simulator", "--seed", str(1 << 32)], "--seed"),
    (["simulator", "--durations", ""], "'sessions'"),
    (["simulator", "--habit", "newest"], "newest"),
    (["simulator", "--habit", "head=never"], "head"),
    (["simulator", "--latency", ""], "--latency"),
    (["simulator", "--latency", "1e400"], "--latency"),
    (["simulator", "--host", ""], "--host"),
    (["simulator", "--host", "192.0.2.1", "--port", "0"], "192.0.2.1"),
    (["simulator", "--replay", "nosuch"], "nosuch"),
    (["simulator", "--faults", "nosuch"], "nosuch"),
    (["simulator", "--log", "no/such/folder/x"], "no/such/folder/x"),
    (["simulator", "--now", "soon"], "'soon' is not a"),
    (["simulator", "--now", ""], "is not a"),
    (["simulator", "--now", "1900-01-01"], "1970"),
    (["simulator", "--freeze"], "--freeze needs --now"),
    (["simulator", "--seed", "x"], "--seed"),
    (["simulator", "--durations", "x"], "'sessions'"),
    (["simulator", "--habit", "nosuch=1"], "nosuch"),
    (["simulator", "--habit", "newest=many"], "newest"),
    (["simulator", "--zone", "Mars/Phobos"], "Mars/Phobos"),
    (["simulator", "--zone", ""], "time zone"),
    (["simulator", "--zone", LONG], "time zone"),
    (["simulator", "--zone", "../../etc/passwd"], "time zone"),
    (["simulator", "--latency", "-1"], "--latency"),
    (["simulator", "--latency", "nan"], "--latency"),
    (["simulator", "--latency", "inf"], "--latency"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[as_one_line(" ".join(a))[:60] for a, _ in WRONG])
def test_invalid_input_is_refused_in_one_line(say: Say, arguments: list[str], words: str, tmp_path: Path) -> None:
    """Exit code 2, one line that says what is wrong, nothing on stdout, no file of bars, the universe as it was."""
    code, out, err = say(*arguments)
    assert_one_line(code, err, words)
    assert out == ""
    assert not list(tmp_path.rglob("*.csv"))
    assert read_universe(tmp_path / "data" / "universe.yaml") == DEFAULT_UNIVERSE


EDGES = ["", "-", "-1", "nan", LONG, "../../etc/passwd", "/dev/full", "a\nb\tc", "\x1b[2J", "\udcff", "日本", "{}"]

DOCUMENTED = {0, 2, 3, 4, 5, 6, 7}


def every_command(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


PARAMETERS = [
    (path, command, parameter)
    for path, command in every_command()
    for parameter in command.params
    # The simulator may start: what is refused of it is in WRONG.
    if not (isinstance(parameter, click.Option) and parameter.is_flag) and path != ("simulator",)
]
SERVERS = ("serve", "ui")
GOOD = {"symbol": "AAPL", "symbols": "AAPL", "timeframe": "1h", "timeframes": "1h", "file": "x.csv", "shell": "bash"}


@pytest.mark.parametrize(
    ("path", "command", "parameter"), PARAMETERS, ids=[f"{' '.join(path)} {p.name}" for path, _, p in PARAMETERS]
)
def test_no_parameter_can_be_given_something_that_ends_in_a_traceback(
    say: Say,
    path: tuple[str, ...],
    command: click.Command,
    parameter: click.Parameter,
    unused_port: int,
    tmp_path: Path,
) -> None:
    """Every edge in every parameter, the others as they should be. Servers find their port taken, so that none starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for edge in EDGES:
            arguments = []
            for other in command.params:
                if isinstance(other, click.Argument):
                    arguments.append(edge if other is parameter else GOOD[str(other.name)])
            options = [parameter.opts[0], edge] if isinstance(parameter, click.Option) else []
            if path[0] in SERVERS and parameter.name != "port":
                options += ["--port", port]
            code, _, err = say(*path, *options, "--", *arguments)
            assert code in DOCUMENTED, (edge, err)
            said = [line for line in err.splitlines() if line.startswith("ktrdr: ")]
            assert len(said) == (code != 0), (edge, err)
            assert all(line.isprintable() and len(line) < 1100 for line in said), (edge, err)
            if code == 0:
                assert path[0] in ("universe", "completion", "ib"), (edge, err)
    assert {file.name for file in tmp_path.rglob("*") if file.suffix == ".csv"} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [b"ib-load", b"\xff\xfe", b"1h"],
        [b"gaps", b"AAPL", b"\xc3\x28"],
        [b"adopt", b"AAPL", b"1h", b"\xff" * 300],
        [b"universe", b"add", "ÄÄ".encode(), b"1h"],
        [b"simulator", b"--zone", b"\xff"],
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_that_are_no_text_are_refused_by_a_real_process(
    arguments: list[bytes], encoding: str, tmp_path: Path
) -> None:
    """Exit code 2 and one line, also where the terminal knows ASCII only."""
    environment = os.environ | {
        "KTRDR_DATA_DIR": str(tmp_path),
        "DAGSTER_HOME": str(tmp_path),
        "PYTHONIOENCODING": encoding,
    }
    command = [os.fsencode(sys.executable), b"-m", b"ktrdr_pipelines.cli", *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"ktrdr: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("content", ["[" * 3000, "series: " + "{a: " * 3000, "series: 2024-13-45", "a: &a [*a]"])
@pytest.mark.parametrize("command", [["universe", "list"], ["gaps"], ["ib-load", "AAPL", "1h", "--dry-run"]])
def test_a_universe_file_that_yaml_chokes_on_is_one_line(
    say: Say, tmp_path: Path, command: list[str], content: str
) -> None:
    """Nested without end, a date that is none, a list within itself."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "universe.yaml").write_text(content)
    code, _, err = say(*command)
    assert_one_line(code, err, "universe.yaml")
