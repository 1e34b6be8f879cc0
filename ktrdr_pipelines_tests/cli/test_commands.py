"""Promises of the commands around a load: the universe, questions to the gateway, help, completion, the UI that follows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from ktrdr_pipelines.cli import universe_commands as universe_commands
from ktrdr_pipelines.cli.ui_reload import UniverseWatch
from ktrdr_pipelines.domain.instruments import SECURITY_TYPES, Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import SHOWN_OF, add_series, read_universe
from ktrdr_pipelines_tests.cli.test_bad_input import Say, every_command, say
from ktrdr_pipelines_tests.conftest import StartGateway

__all__ = ["say"]

STAMPS = ("2024-01-02T15:00:00Z", "2024-01-02T16:00:00Z")
CSV = "timestamp,open,high,low,close,volume\n" + "".join(f"{stamp},1.0,2.0,0.5,1.5,100\n" for stamp in STAMPS)
HEAVY = {"dagster", "pandas", "numpy", "pandera", "ib_insync", "sqlalchemy", "pydantic", "rich", "yaml", "asyncio"}


# -- help ----------------------------------------------------------------------------------------------------------------


def test_help_of_no_command_imports_anything_heavy() -> None:
    """Every help page of every command, in one fresh process: what they import together stays light and little."""
    pages = [[*path, "--help"] for path, _ in every_command()] + [["--help"], ["ib", "--help"], ["universe", "--help"]]
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom ktrdr_pipelines.cli.main import cli\n"
        f"for page in {pages!r}:\n"
        "    try: cli.main(page)\n    except SystemExit as end: assert not end.code\n"
        "print('\\n' + ' '.join(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert not imported & HEAVY
    assert len(imported) < 200


@pytest.mark.parametrize(
    "command", [c for _, c in every_command()], ids=[" ".join(path) for path, _ in every_command()]
)
def test_each_command_shows_an_example_and_its_output(command: click.Command) -> None:
    """A line that can be typed, and under it what comes."""
    lines = (command.help or "").splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(("$ ktrdr ", '$ eval "$(ktrdr ')))
    assert lines[at + 1].strip()


def test_choices_that_help_names_are_those_that_exist() -> None:
    """They are written twice, since their modules are too heavy for a help page."""
    assert universe_commands.SECURITY_TYPES == SECURITY_TYPES
    assert set(universe_commands.WHAT_TO_SHOW) == {what for shown in SHOWN_OF.values() for what in shown}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(say: Say, shell: str) -> None:
    """It asks `ktrdr` itself what may come next."""
    code, out, err = say("completion", shell)
    assert (code, err) == (0, "")
    assert f"_KTRDR_COMPLETE={shell}_complete" in out


UNIVERSE_TO_COMPLETE = "series:\n- {symbol: BRK B, timeframes: [1h, 1w]}\n- {symbol: AAPL, timeframes: [1d]}\n"


@pytest.mark.parametrize(
    ("words", "at", "wanted"),
    [
        ("ktrdr univ", 1, ["universe"]),
        ("ktrdr ib-load AAPL 1h --mode b", 5, ["backfill"]),
        ("ktrdr ib-load ", 2, ["BRK\\ B", "AAPL"]),
        ("ktrdr calendar aa", 2, ["AAPL"]),
        ("ktrdr ib ranges AAPL b", 4, ["BRK\\ B"]),
        ("ktrdr ib-load AAPL 30", 3, ["30s", "30m"]),
        ("ktrdr ib ranges --timeframe 8", 4, ["8h"]),
        ("ktrdr gaps BRK\\ B ", 3, ["1h", "1w"]),
        ("ktrdr universe remove AAPL ", 4, ["1d"]),
        ("ktrdr universe add NEW 1mo", 4, ["1mo"]),
    ],
)
def test_a_shell_gets_what_may_come_next(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, at: int, wanted: list[str]
) -> None:
    """As the bash script asks: commands, options, symbols of the universe, timeframes. A universe file that cannot be read is
    nothing to complete, and no noise on the line that is being typed."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "universe.yaml").write_text(UNIVERSE_TO_COMPLETE)
    monkeypatch.setenv("_KTRDR_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(at))
    _, out, err = say()
    assert (out.splitlines(), err) == ([f"plain,{each}" for each in wanted], "")
    (tmp_path / "data" / "universe.yaml").write_text("series: [")
    _, out, err = say()
    assert err == ""
    assert "AAPL" not in out


@pytest.mark.slow
def test_completing_imports_nothing_heavy(tmp_path: Path) -> None:
    """It happens with every press of the key."""
    code = (
        "import sys\nfrom ktrdr_pipelines.cli.main import cli\n"
        "try: cli.main(prog_name='ktrdr')\nexcept SystemExit: pass\n"
        "heavy = {'dagster', 'pandas', 'numpy', 'pandera', 'ib_insync', 'sqlalchemy', 'fastapi', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    asked = {"_KTRDR_COMPLETE": "bash_complete", "COMP_WORDS": "ktrdr gaps MS", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked | {"KTRDR_DATA_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["plain,MSFT", "[]"]


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_has_not_failed(tmp_path: Path, unused_port: int) -> None:
    """SIGTERM from a container's engine, where Dagster is another service; Ctrl-C at a terminal, while the server's own Dagster
    starts: exit code 0, no message of an interruption."""
    settings = {"KTRDR_DATA_DIR": str(tmp_path), "DAGSTER_HOME": str(tmp_path), "KTRDR_IN_CONTAINER": "false"}
    for number, url in ((signal.SIGTERM, "http://webserver.invalid:3000"), (signal.SIGINT, "")):
        with subprocess.Popen(
            [sys.executable, "-m", "ktrdr_pipelines.cli", "serve", "--port", str(unused_port)],
            env=os.environ | settings | {"KTRDR_DAGSTER_URL": url}, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as server:  # fmt: skip
            assert server.stderr is not None
            assert any("startup complete" in line for line in server.stderr)
            server.send_signal(number)
            rest = server.stderr.read()
            assert (server.wait(60), "ktrdr: " in rest) == (0, False), rest


def test_a_contract_that_the_universe_does_not_name_is_refused(say: Say, tmp_path: Path) -> None:
    """Like any other contradiction: the universe's words would be kept and those of the person lost without a word."""
    code, out, err = say("universe", "add", "AAPL", "1w", "--con-id", "900003")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in ("AAPL is in the universe", "con_id", "900003"))
    assert not (tmp_path / "data" / "universe.yaml").exists()


# -- the universe ----------------------------------------------------------------------------------------------------------


def test_a_series_is_added_listed_and_removed_and_its_files_stay(say: Say, tmp_path: Path) -> None:
    """Without a gateway where the kind is said. Removing names the files that stay; they count again when it is added again."""
    code, out, _ = say("universe", "add", "tsla", "1h", "1d", "--sec-type", "STK", "--hours", "extended")
    assert code == 0
    assert out.splitlines()[:2] == ["added TSLA 1h", "added TSLA 1d"]
    file = tmp_path / "data" / "TSLA_1h.csv"
    file.write_text(CSV)
    _, out, _ = say("universe", "list", "--json")
    listed = {(each["symbol"], each["timeframe"]): each for each in json.loads(out)["series"]}
    assert len(listed) == 22
    assert listed["TSLA", "1h"]["hours"] == "extended"
    assert listed["TSLA", "1h"]["what_to_show"] == "TRADES"
    assert [listed["TSLA", "1h"][name] for name in ("rows", "first", "last")] == [2, *STAMPS]
    assert listed["EURUSD", "1d"]["rows"] == 0
    assert file.read_text() == CSV  # looked at, not adopted
    code, out, _ = say("universe", "remove", "TSLA", "1h")
    assert (code, out.splitlines()[:2]) == (0, ["removed TSLA 1h", f"  kept {file}"])
    assert file.read_text() == CSV
    universe = read_universe(tmp_path / "data" / "universe.yaml")
    assert [str(each) for each in universe if each.instrument.symbol == "TSLA"] == ["TSLA 1d"]
    code, out, _ = say("universe", "add", "TSLA", "1h", "1d")
    assert (code, out.splitlines()[:2]) == (0, ["added TSLA 1h", "TSLA 1d is already there"])


def test_a_series_whose_file_cannot_be_read_does_not_hide_the_others(say: Say, tmp_path: Path) -> None:
    """It is listed as such, reported in one line, and the exit code is its family's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "AAPL_1h.csv").write_text("<html>\n")
    code, out, err = say("universe", "list")
    assert code == 6
    assert len(out.splitlines()) == 21
    assert "cannot be read" in out
    assert err.startswith("ktrdr: AAPL 1h: ")
    assert err.count("\n") == 1


def test_a_name_without_a_choice_is_looked_up(
    say: Say, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ib symbols` shows what it means and keeps nothing; `universe add` pins it; an unknown one is refused by both."""
    monkeypatch.setenv("IB_PORT", str(start_gateway().port))
    code, out, _ = say("ib", "symbols", "gbp.usd")
    assert code == 0
    assert "CASH" in out
    assert not (tmp_path / "data" / "universe.yaml").exists()
    assert say("universe", "add", "gbp.usd", "1h")[0] == 0
    found = read_universe(tmp_path / "data" / "universe.yaml").find("GBPUSD", TIMEFRAMES["1h"])
    assert found is not None
    assert found.instrument.con_id
    before = (tmp_path / "data" / "universe.yaml").read_text()
    for arguments in (["ib", "symbols", "NOSUCH"], ["universe", "add", "NOSUCH", "1h"]):
        code, _, err = say(*arguments)
        assert (code, err.count("\n")) == (3, 1)
        assert "NOSUCH" in err
    assert (tmp_path / "data" / "universe.yaml").read_text() == before


# -- questions to the gateway ----------------------------------------------------------------------------------------------


def test_questions_to_a_gateway_are_answered(
    say: Say, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status, health, configuration, ranges and clean-up, for people and for programs."""
    gateway = start_gateway()
    monkeypatch.setenv("IB_PORT", str(gateway.port))
    for arguments, words, key in (
        (["status"], f"127.0.0.1:{gateway.port}: connected as client", "connection"),
        (["health"], "healthy: ", "healthy"),
        (["config"], "requests in ten minutes", "pacing_rules"),
        (["ranges", "AAPL", "--timeframe", "1d"], "AAPL 1d", "ranges"),
        (["cleanup"], "0 client ids given back", "disconnected"),
    ):
        code, out, err = say("ib", *arguments)
        assert (code, err) == (0, ""), arguments
        assert words in out
        code, out, _ = say("ib", *arguments, "--json")
        assert code == 0
        assert key in json.loads(out)


@pytest.mark.parametrize("arguments", [["status"], ["health"], ["ranges", "AAPL"], ["symbols", "AAPL"]])
def test_without_a_gateway_the_answer_says_so_and_the_exit_code_too(say: Say, arguments: list[str]) -> None:
    """5, and one line with what to do."""
    code, _, err = say("ib", *arguments)
    assert (code, err.count("\n")) == (5, 1)
    assert "no gateway at 127.0.0.1" in err
    assert "ktrdr simulator" in err


# -- the UI follows the universe file --------------------------------------------------------------------------------------


class Refusing(threading.Thread):
    """A web server in front of which nothing can be reloaded: accepts and hangs up."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.asked = 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.asked += 1  # before anybody can know that it hung up
            with connection:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):  # what is closed unread is a reset to the other side, and only at times
                    pass


def test_only_a_universe_that_means_something_else_is_reloaded(
    make_settings: Callable[..., Settings], unused_port: int
) -> None:
    """A comment changes nothing, a broken file is reported once, a failed reload is reported once and tried again."""
    settings = make_settings(unused_port)
    path = settings.universe_path
    add_series(path, Series(stock("TSLA"), TIMEFRAMES["1h"]))
    server = Refusing()
    watch = UniverseWatch(settings, "127.0.0.1", server.port)
    assert watch.look() is None
    good = path.read_text()
    path.write_text(good + "# mine\n")
    assert watch.look() is None
    path.write_text("series: [")
    said = watch.look()
    assert said is not None
    assert "as before" in said
    assert watch.look() is None
    assert server.asked == 0
    path.write_text(good.replace("TSLA", "NVDA"))
    said = watch.look()
    assert said is not None
    assert "did not reload" in said
    assert watch.look() is None
    assert server.asked == 2
    server.socket.close()


def test_a_corrected_contract_is_reloaded(make_settings: Callable[..., Settings], unused_port: int) -> None:
    """The series is the same, the contract that its bars are asked for is another."""
    settings = make_settings(unused_port)
    path = settings.universe_path
    add_series(path, Series(replace(stock("AMBG"), con_id=900001), TIMEFRAMES["1d"]))
    server = Refusing()
    watch = UniverseWatch(settings, "127.0.0.1", server.port)
    path.write_text(path.read_text().replace("900001", "900002"))
    assert "did not reload" in str(watch.look())
    assert server.asked == 1
    server.socket.close()


def ask(url: str, query: str) -> Any:
    request = urllib.request.Request(
        f"{url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def wait_for(attempt: Callable[[], bool], running: subprocess.Popen[Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.poll() is None:
        try:
            if attempt():
                return True
        except OSError:
            pass
        threading.Event().wait(0.2)
    return False


@pytest.mark.slow
@pytest.mark.long
def test_a_series_added_while_the_ui_runs_appears_there_and_sensors_see_it(tmp_path: Path, unused_port: int) -> None:
    """The real web server, daemon and code server: nothing is restarted."""
    environment = os.environ | {
        "IB_PORT": "1", "KTRDR_DATA_DIR": str(tmp_path / "data"), "DAGSTER_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    ktrdr = [sys.executable, "-m", "ktrdr_pipelines.cli"]
    url = f"http://127.0.0.1:{unused_port}"
    with (tmp_path / "ui.log").open("wb") as log:
        running = subprocess.Popen(
            [*ktrdr, "ui", "--port", str(unused_port)], env=environment, cwd=tmp_path, stdout=log, stderr=log
        )

    def shown() -> set[str]:
        return {"/".join(node["assetKey"]["path"]) for node in ask(url, "{assetNodes{assetKey{path}}}")["assetNodes"]}

    try:
        assert wait_for(lambda: "ohlcv/AAPL_1h" in shown(), running, 90), (tmp_path / "ui.log").read_text()
        assert "ohlcv/TSLA_2h" not in shown()
        add = [*ktrdr, "universe", "add", "TSLA", "2h", "--sec-type", "STK"]
        subprocess.run(add, env=environment, cwd=tmp_path, check=True, capture_output=True)
        assert wait_for(lambda: "ohlcv/TSLA_2h" in shown(), running, 30), (tmp_path / "ui.log").read_text()
        tick = ask(
            url,
            'mutation{sensorDryRun(selectorData:{repositoryName:"__repository__",repositoryLocationName:"ktrdr_pipelines",'
            'sensorName:"tail_fill"},cursor:""){... on DryRunInstigationTick{evaluationResult{skipReason error{message}}}}}',
        )
        assert "2h: 1 series need a first load" in tick["sensorDryRun"]["evaluationResult"]["skipReason"]
        # What Dagster printed last comes a moment before ours.
        assert wait_for(lambda: "+TSLA 2h" in (tmp_path / "ui.log").read_text(), running, 30)
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)
