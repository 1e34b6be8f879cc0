"""Promises of the commands about coverage: `ktrdr gaps`, `ktrdr adopt`, `ktrdr ib-load --dry-run`, and what bad files come to.

Each command is a process of its own, against a simulated gateway where it needs one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from ktrdr_pipelines.calendars import expected_bars
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.simulator.faults import FaultRule
from ktrdr_pipelines.simulator.server import GatewayThread, run_in_thread
from ktrdr_pipelines.simulator.synthetic import SyntheticMarket
from ktrdr_pipelines_tests.cli.test_main import assert_refused
from ktrdr_pipelines_tests.conftest import Ktrdr, StartGateway
from ktrdr_pipelines_tests.fakes import window
from ktrdr_pipelines_tests.load_forks import Ended

pytestmark = pytest.mark.slow

JANUARY = ["AAPL", "1h", "--mode", "full", "--start", "2024-01-01", "--end", "2024-02-01"]


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    """One gateway for all of this module."""
    with run_in_thread(SyntheticMarket(), judge=False) as running:
        yield running


@pytest.fixture(scope="module")
def loaded_once() -> dict[str, Path]:
    """Filled by `january`: where the one real load went."""
    return {}


@pytest.fixture
def january(
    ktrdr: Ktrdr,
    gateway: GatewayThread,
    tmp_path: Path,
    loaded_once: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """January 2024 of AAPL 1h, loaded by `ktrdr ib-load`; the folders of data and of Dagster are this test's own."""
    if "folder" not in loaded_once:
        done = ktrdr("ib-load", *JANUARY, port=gateway.port)
        assert done.returncode == 0, done.stderr
        folder = tmp_path_factory.mktemp("january")
        shutil.copytree(tmp_path / "data", folder / "data")
        # Without the ledger: another test's requests are not this one's to wait for.
        shutil.copytree(tmp_path / "home", folder / "home", ignore=shutil.ignore_patterns("ib"))
        loaded_once["folder"] = folder
    for name in ("data", "home"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(loaded_once["folder"] / name, tmp_path / name)
    return tmp_path / "data" / "AAPL_1h.csv"


def photograph(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def said(done: Ended) -> str:
    """What it printed, after a success."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


# --- bad files ---------------------------------------------------------------------------------------------------------


def edit(*changes: Callable[[list[bytes]], object]) -> Callable[[bytes], bytes]:
    """A change of the lines of a file; line numbers as people count them."""

    def apply(data: bytes) -> bytes:
        lines = data.split(b"\n")
        for change in changes:
            change(lines)
        return b"\n".join(lines)

    return apply


def swap(lines: list[bytes]) -> None:
    lines[9], lines[10] = lines[10], lines[9]


def spoil(lines: list[bytes]) -> None:
    stamp, _, rest = lines[9].split(b",", 2)
    lines[9] = stamp + b",nan," + rest


def contradict(lines: list[bytes]) -> None:
    stamp, volume = lines[9].split(b",")[0], lines[9].rsplit(b",", 1)[1]
    lines.insert(10, stamp + b",1,1,1,1," + volume)


def add_column(lines: list[bytes]) -> None:
    lines[:-1] = [line + (b",vwap" if i == 0 else b",7.5") for i, line in enumerate(lines[:-1])]


BAD_FILES = {
    "a duplicate": (edit(lambda lines: lines.insert(10, lines[9])), ["1 equal duplicates removed"], 0),
    "two bars with one stamp": (edit(contradict), ["2 refused", "line 10:", "line 11:", "same timestamp"], 1),
    "a swapped line": (edit(swap), ["not in order: sorted"], 0),
    "a NaN": (edit(spoil), ["1 refused", "line 10: ", "nan"], 1),
    "a foreign column": (edit(add_column), ["columns left out: vwap"], 0),
    "CRLF and a BOM": (lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"), ["0 refused"], 0),
    "a missing last newline": (lambda data: data[:-1], ["1 refused", "cut off"], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_an_edited_file_is_put_right_and_completed(
    ktrdr: Ktrdr, gateway: GatewayThread, january: Path, case: str
) -> None:
    """One message with the bad rows, a copy of the file as it was, and after the load exactly the bars of before."""
    spoilt, words, bars_fetched = BAD_FILES[case]
    good = january.read_bytes()
    january.write_bytes(spoilt(good))
    bad = january.read_bytes()
    assert bad != good
    result = json.loads(said(ktrdr("ib-load", *JANUARY, "--json", port=gateway.port)))
    assert january.read_bytes() == good
    assert (result["status"], result["fetched_bars"], result["missing_bars"]) == ("success", bars_fetched, 0)
    (copy,) = january.parent.glob("AAPL_1h.csv.bak-*")
    assert copy.read_bytes() == bad
    text = "\n".join(result["notices"])
    assert copy.name in text
    for word in words:
        assert word in text


def test_a_garbage_sidecar_is_built_anew_and_no_bar_is_asked_for(ktrdr: Ktrdr, unused_port: int, january: Path) -> None:
    """The message names the copy that was kept; nothing is missing, so no gateway is needed."""
    good, sidecar = january.read_bytes(), january.with_name("AAPL_1h.meta.json")
    sidecar.write_text("{ garbage")
    out = said(ktrdr("ib-load", *JANUARY, port=unused_port))
    (copy,) = january.parent.glob("AAPL_1h.meta.json.corrupt-*")
    assert copy.read_text() == "{ garbage"
    assert copy.name in out
    assert january.read_bytes() == good
    assert json.loads(sidecar.read_text())["partitions"]["2024-01-01"]["rows"] == 147


def test_a_sidecar_of_a_newer_program_is_left_alone(ktrdr: Ktrdr, unused_port: int, january: Path) -> None:
    """Exit code 7, the advice to update, and not a byte of the data folder changes."""
    january.with_name("AAPL_1h.meta.json").write_text('{"version": 99}')
    before = photograph(january.parent)
    assert_refused(
        ktrdr("ib-load", *JANUARY, port=unused_port), 7, "newer version", "Update ktrdr", "AAPL_1h.meta.json"
    )
    after = photograph(january.parent)  # a lock file comes and goes
    assert {k: v for k, v in before.items() if not k.endswith(".lock")}.items() <= after.items()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("timeframes: [1h, 7m]", ["unknown timeframe '7m'", "1h"]),
        ("timeframes: [1h, 1d, 1h]", ["AAPL 1h is listed twice", "Remove one"]),
        ("timeframes: [1h]\n    colour: red", ["series.0.colour", "README"]),
    ],
)
def test_a_universe_file_that_cannot_be_meant_is_one_line(
    ktrdr: Ktrdr, unused_port: int, tmp_path: Path, entry: str, words: list[str]
) -> None:
    """Exit code 2, the file, the entry; the file stays as it is."""
    path = tmp_path / "data" / "universe.yaml"
    path.parent.mkdir()
    path.write_text(f"series:\n  - symbol: AAPL\n    {entry}\n")
    before = photograph(tmp_path)
    assert_refused(ktrdr("ib-load", *JANUARY, port=unused_port), 2, "universe.yaml", *words)
    assert photograph(tmp_path) == before


# --- dry run -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_requests_that_the_load_then_makes(
    ktrdr: Ktrdr, start_gateway: StartGateway, unused_port: int, tmp_path: Path
) -> None:
    """Needs no gateway, writes nothing; the load asks for the very durations and ends that were shown."""
    arguments = ["ib-load", "MSFT", "1d", "--mode", "full", "--start", "2020-01-01", "--end", "2023-01-01", "--json"]
    shown = json.loads(said(ktrdr(*arguments, "--dry-run", port=unused_port)))
    assert photograph(tmp_path) == {}
    assert (shown["dry_run"], shown["missing_bars"], shown["budget"]["used"]) == (True, 756, 0)
    assert [(g["bars"], g["reason"]) for g in shown["gaps"]] == [(756, "nothing held")]
    assert [r["duration"] for r in shown["requests"]] == ["1 Y"] * 3
    assert shown["done_at"] == shown["requests"][-1]["send_at"]
    gateway = start_gateway()
    done = json.loads(said(ktrdr(*arguments, port=gateway.port)))
    assert (done["dry_run"], done["fetched_bars"], done["requests_planned"]) == (False, 756, 3)
    sent = [(r.duration, r.end) for r in gateway.requests if r.duration]
    # They are open at once, so their order is not promised.
    assert sorted(sent[:3]) == sorted(
        (r["duration"], r["end_date_time"].replace("-", "").replace("T", "-").rstrip("Z")) for r in shown["requests"]
    )


def test_a_dry_run_over_an_edited_file_changes_nothing(ktrdr: Ktrdr, unused_port: int, january: Path) -> None:
    """Forty lines deleted and a byte-order mark: the gap and one request are shown, the file stays as it was edited."""
    lines = january.read_bytes().splitlines(keepends=True)
    january.write_bytes(b"\xef\xbb\xbf" + b"".join(lines[:49] + lines[89:]))
    before = photograph(january.parent.parent)
    out = said(ktrdr("ib-load", *JANUARY, "--dry-run", port=unused_port))
    assert "40 bars missing, 1 request" in out
    assert "between held bars" in out
    assert "107 rows, 0 refused" in out
    assert photograph(january.parent.parent) == before


def test_a_dry_run_asks_where_history_starts_only_if_it_is_not_known(
    ktrdr: Ktrdr, gateway: GatewayThread, unused_port: int, tmp_path: Path
) -> None:
    """No CSV and no start: IB's head timestamp is asked for (and said), and whether there are older bars; the head is remembered
    for the next time, which is said as well. Without a gateway that is exit code 5."""
    assert_refused(ktrdr("ib-load", "SPY", "1d", "--dry-run", port=unused_port), 5, "ktrdr simulator")
    out = said(ktrdr("ib-load", "SPY", "1d", "--dry-run", port=gateway.port))
    assert "asked of IB (2 requests); the load makes 1 of them again" in out
    (kept,) = (tmp_path / "home" / "ib").glob("symbols_*.json")
    asked = [r.kind for r in gateway.requests].count("head")
    out = said(ktrdr("ib-load", "SPY", "1d", "--dry-run", port=gateway.port))
    assert "asked of IB (1 request); the load makes 1 of them again" in out
    assert [r.kind for r in gateway.requests].count("head") == asked
    kept.unlink()
    assert not (tmp_path / "data").exists()


def name_few_series(folder: Path) -> None:
    """A universe of two series: the default one has minutes of twenty years, which take seconds."""
    (folder / "universe.yaml").write_text(
        "series:\n  - {symbol: AAPL, timeframes: [1h]}\n  - {symbol: MSFT, timeframes: [1h]}\n"
    )


# --- gaps --------------------------------------------------------------------------------------------------------------


def test_gaps_shows_reasons_and_damage(ktrdr: Ktrdr, january: Path) -> None:
    """Deleted rows are gone, later months never asked, and the partition whose rows are not those written is named."""
    name_few_series(january.parent)
    lines = january.read_bytes().splitlines(keepends=True)
    january.write_bytes(b"".join(lines[:49] + lines[89:]))
    before = photograph(january.parent)
    found = json.loads(said(ktrdr("gaps", "AAPL", "1h", "--json")))
    assert found["held"] == {"rows": 107, "first": "2024-01-02T14:30:00Z", "last": "2024-01-31T20:00:00Z"}
    assert [(m["where"], m["why"]) for m in found["missing"]] == [
        ("before the first held bar", "never asked"),
        ("between held bars", "gone since it was loaded"),
        ("after the last held bar", "never asked"),
    ]
    assert found["missing_bars"]["gone since it was loaded"] == 40
    assert found["damage"] == ["2024-01-01: its 107 rows are not the 147 rows last written"]
    assert photograph(january.parent) == before
    rows = [line.split() for line in said(ktrdr("gaps")).splitlines()]
    assert len(rows) == 1 + 2
    assert rows[1][:5] == ["AAPL", "1h", "107", "2024-01-02T14:30:00Z", "2024-01-31T20:00:00Z"]
    older = found["missing"][0]["bars"]
    assert rows[1][5:7] == [f"{sum(found['missing_bars'].values()):,}", f"{older:,}"]
    # The list counts as the series by itself; of what was never loaded everything is missing.
    listed = {each["symbol"]: each for each in json.loads(said(ktrdr("gaps", "--json")))["series"]}
    assert listed["AAPL"]["missing_bars"]["gone since it was loaded"] == 40
    assert listed["AAPL"]["missing"][0] == found["missing"][0]
    brief = listed["MSFT"]
    alone = json.loads(said(ktrdr("gaps", "MSFT", "1h", "--json")))
    assert brief["never_loaded"] is alone["never_loaded"] is True
    assert found["never_loaded"] is False
    assert brief["missing_bars"] == alone["missing_bars"]
    assert brief["missing_bars"]["never asked"] > 30_000
    assert rows[2] == [
        "MSFT",
        "1h",
        "0",
        "-",
        "-",
        f"{brief['missing_bars']['never asked']:,}",
        "-",
        "never",
        "loaded",
        "0",
    ]


def test_gaps_shows_what_failed(ktrdr: Ktrdr, start_gateway: StartGateway) -> None:
    """The month whose request failed is missing because its last run failed; its neighbour is held."""
    gateway = start_gateway([FaultRule(kind="error", code=162, text="Unbekannter Fehler", nth=(2,))])
    arguments = ["ib-load", "AAPL", "1h", "--start", "2024-01-01", "--end", "2024-03-01"]
    assert ktrdr(*arguments, port=gateway.port).returncode == 4
    found = json.loads(said(ktrdr("gaps", "AAPL", "1h", "--json")))
    reasons = [(m["why"], m["start"][:7], m["end"][:7]) for m in found["missing"]]
    assert ("failed in its last run", "2024-02", "2024-02") in reasons


def test_gaps_goes_on_after_a_series_that_cannot_be_read(ktrdr: Ktrdr, january: Path) -> None:
    """The others are listed, the bad one named on stderr, exit code 6."""
    name_few_series(january.parent)
    january.with_name("MSFT_1h.csv").write_text("<html>")
    done = ktrdr("gaps")
    assert_refused(done, 6, "MSFT 1h", "MSFT_1h.csv", "HTML")
    assert len(done.stdout.splitlines()) == 1 + 2
    assert "cannot be read" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gaps", "AAPL"], ["SYMBOL and TIMEFRAME"]),
        (["gaps", "AAPL", "7m"], ["unknown timeframe '7m'"]),
        (["gaps", "NOSUCH", "1h"], ["NOSUCH is not in the universe", "ktrdr ib-load NOSUCH 1h"]),
        (["adopt", "AAPL", "1h", "nowhere.csv"], ["no file nowhere.csv"]),
        (["adopt", "AAPL", "1h"], ["FILE"]),
    ],
)
def test_questions_that_cannot_be_meant(ktrdr: Ktrdr, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    """Exit code 2 and one line; no folder appears."""
    assert_refused(ktrdr(*arguments), 2, *words)
    assert photograph(tmp_path) == {}


# --- adopt -------------------------------------------------------------------------------------------------------------


def test_adopting_a_foreign_file_takes_the_good_rows_and_shows_the_others(
    ktrdr: Ktrdr, january: Path, tmp_path: Path
) -> None:
    """Rows of another layout join what is held; bad ones are shown with line and reason, the foreign file stays."""
    lines = january.read_text().splitlines()
    january.write_text("\n".join(lines[:100]) + "\n")
    foreign = tmp_path / "old.csv"
    rows = [line.replace("T", " ").replace("Z", "+00:00") for line in lines[90:]]
    foreign.write_text("\n".join(["date,open,high,low,close,volume", *rows, "2024-02-01 14:30:00+00:00,1,0.5,1,1,1"]))
    before = foreign.read_bytes()
    out = said(ktrdr("adopt", "AAPL", "1h", "old.csv"))
    assert "48 rows adopted from old.csv, 1 row dropped; 147 held now" in out
    assert "line 60: high is below open" in out
    assert january.read_text().splitlines() == lines
    assert foreign.read_bytes() == before


def test_partitions_that_an_adopted_file_completes_are_dagsters_at_once(ktrdr: Ktrdr, tmp_path: Path) -> None:
    """A whole year is reported complete; the year of which a day is missing is not."""
    opens = expected_bars(Series(stock("AAPL"), TIMEFRAMES["1d"]), window("2022-01-01", "2024-01-01")).opens
    days = np.datetime_as_string(opens.astype("datetime64[s]"), unit="D")
    rows = [f"{day},10,12,9,11,5" for day in days if day != "2022-06-15"]
    (tmp_path / "old.csv").write_text("\n".join(["date,open,high,low,close,volume", *rows, ""]))
    out = said(ktrdr("adopt", "AAPL", "1d", "old.csv"))
    assert "500 rows adopted" in out
    assert "1 complete partition reported to Dagster" in out
    with dg.DagsterInstance.from_config(str(tmp_path / "home")) as instance:
        assert instance.get_materialized_partitions(dg.AssetKey(["ohlcv", "AAPL_1d"])) == {"2023"}


def test_adopting_naive_stamps_needs_a_word(ktrdr: Ktrdr, tmp_path: Path) -> None:
    """Without a zone nothing is taken (exit code 6); with --assume-utc it is, and the JSON says what."""
    (tmp_path / "old.csv").write_text("date,open,high,low,close,volume\n2024-01-02 14:30:00,10,12,9,11,5\n")
    assert_refused(ktrdr("adopt", "AAPL", "1h", "old.csv"), 6, "no time zone", "--assume-utc")
    assert not (tmp_path / "data" / "AAPL_1h.csv").exists()
    result = json.loads(said(ktrdr("adopt", "AAPL", "1h", "old.csv", "--assume-utc", "--json")))
    assert (result["rows_adopted"], result["rows_held"], result["dropped"]) == (1, 1, [])
    held = (tmp_path / "data" / "AAPL_1h.csv").read_text().splitlines()
    assert held[1:] == ["2024-01-02T14:30:00Z,10.0,12.0,9.0,11.0,5"]
