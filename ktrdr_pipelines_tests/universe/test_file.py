"""The universe file: read, refused with a reason, added to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrdr_pipelines.domain.instruments import Hours, Instrument, Series, forex, stock
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.universe.file import (
    DEFAULT_UNIVERSE,
    add_series,
    entry_for,
    parse_universe,
    read_universe,
    remove_series,
)


def test_without_a_file_there_is_a_small_default(tmp_path: Path) -> None:
    """Five instruments at four timeframes."""
    assert len(list(read_universe(tmp_path / "universe.yaml"))) == 20


def test_what_an_entry_leaves_out_takes_the_defaults_of_its_kind() -> None:
    """Stocks: SMART, USD, TRADES, regular hours. Pairs: IDEALPRO, MIDPOINT, all hours."""
    universe = parse_universe(
        "series:\n- {symbol: AAPL, timeframes: [1h], hours: extended}\n- {symbol: EUR.USD, sec_type: CASH, timeframes: [1M]}\n"
    )
    first, second = list(universe)
    assert first == Series(stock("AAPL", hours=Hours.EXTENDED), TIMEFRAMES["1h"])
    assert second == Series(forex("EURUSD"), TIMEFRAMES["1mo"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("series: [", "not YAML at line"),
        ("series:\n- {symbol: AAPL, timeframes: [7m]}", "unknown timeframe '7m'"),
        ("series:\n- {symbol: AAPL, timeframes: []}", "timeframes"),
        ("series:\n- {symbol: AAPL}", "timeframes"),
        ("series:\n- {symbol: AAPL, timeframes: [1h], colour: red}", "colour"),
        (
            "series:\n- {symbol: AAPL, timeframes: [1h, 1d]}\n- {symbol: AAPL, timeframes: [1d]}",
            "AAPL 1d is listed twice",
        ),
        ("series:\n- {symbol: AAPL, timeframes: [1mo, 1M]}", "listed twice"),
        ("series:\n- {symbol: ../x, timeframes: [1h]}", "is not a symbol"),
        ("series:\n- {symbol: ESZ4, sec_type: FUT, timeframes: [1h]}", "needs an exchange"),
        ("- AAPL", "top level"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_the_place(text: str, words: str) -> None:
    """One error that names the file, the place and the reason."""
    with pytest.raises(InputError) as caught:
        parse_universe(text, "data/universe.yaml")
    assert words in str(caught.value)
    assert "data/universe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "instrument",
    [
        stock("TSLA"),
        stock("SAP", exchange="IBIS", currency="EUR"),
        stock("BRK B", primary_exchange="NYSE", hours=Hours.EXTENDED),
        forex("USDJPY"),
        Instrument("ESZ4", "FUT", "CME", "USD", ib_symbol="ES", expiry="202412", hours=Hours.EXTENDED),
        Instrument("BTC", "CRYPTO", "PAXOS", "USD", what_to_show="AGGTRADES", hours=Hours.EXTENDED, con_id=479624278),
    ],
)
def test_an_added_series_is_read_back_as_it_was(tmp_path: Path, instrument: Instrument) -> None:
    """Adding writes an entry that means the same instrument, keeps the others, and adding again changes nothing."""
    path = tmp_path / "data" / "universe.yaml"
    series = Series(instrument, TIMEFRAMES["1h"])
    add_series(path, series)
    text = path.read_text()
    assert series in set(read_universe(path))
    assert set(DEFAULT_UNIVERSE) <= set(read_universe(path))
    found = read_universe(path).find(instrument.symbol, TIMEFRAMES["1h"])
    assert found is not None
    assert found.instrument.con_id == instrument.con_id
    add_series(path, series)
    assert path.read_text() == text


def test_a_new_timeframe_joins_the_instruments_entry(tmp_path: Path) -> None:
    """One entry per instrument, its timeframes in order of length."""
    path = tmp_path / "universe.yaml"
    add_series(path, Series(stock("AAPL"), TIMEFRAMES["15m"]))
    (entry,) = [e for e in read_universe(path).entries if e.symbol == "AAPL"]
    assert entry.timeframes == ["1m", "5m", "15m", "1h", "1d"]


def test_symbols_are_found_as_people_type_them() -> None:
    """Lower case, and pairs with a dot or a slash."""
    for typed in ("eurusd", "EUR.USD", "eur/usd"):
        found = DEFAULT_UNIVERSE.find_instrument(typed)
        assert found == forex("EURUSD")
    assert DEFAULT_UNIVERSE.find_instrument("NOSUCH") is None


def test_an_entry_says_only_what_is_particular() -> None:
    """A plain US stock needs a symbol and timeframes."""
    entry = entry_for(stock("AAPL"), ["1h"])
    assert entry.model_dump(exclude_defaults=True, exclude_none=True) == {"symbol": "AAPL", "timeframes": ["1h"]}


MINE = """# mine
series:
  # big ones
  - symbol: AAPL   # the apple
    timeframes: [1h]   # hourly

  # the other
  - symbol: MSFT
    timeframes:
      - 1h
      - 1d
  - symbol: EURUSD  # euro
    sec_type: CASH
    timeframes: [1m, 1h]
# the end
"""


def test_adding_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    """A new instrument comes after the others, a new timeframe into its entry; everything else stays to the letter."""
    path = tmp_path / "universe.yaml"
    path.write_text(MINE)
    add_series(path, Series(forex("GBPUSD"), TIMEFRAMES["1h"]))
    assert path.read_text().startswith(MINE)
    assert read_universe(path).find("GBPUSD", TIMEFRAMES["1h"]) is not None
    path.write_text(MINE)
    add_series(path, Series(stock("AAPL"), TIMEFRAMES["1d"]), Series(stock("MSFT"), TIMEFRAMES["5m"]))
    changed = MINE.replace("[1h]   # hourly", "[1h, 1d]   # hourly").replace("      - 1h\n", "      - 5m\n      - 1h\n")
    assert path.read_text() == changed
    assert not (tmp_path / "universe.yaml.bak").exists()


@pytest.mark.parametrize(
    ("symbol", "timeframes", "gone"),
    [
        ("AAPL", None, "  - symbol: AAPL   # the apple\n    timeframes: [1h]   # hourly\n"),
        ("MSFT", None, "  - symbol: MSFT\n    timeframes:\n      - 1h\n      - 1d\n"),
        ("MSFT", ["1h"], "      - 1h\n"),
        ("EURUSD", None, "  - symbol: EURUSD  # euro\n    sec_type: CASH\n    timeframes: [1m, 1h]\n"),
        ("EURUSD", ["1m"], "1m, "),
    ],
)
def test_removing_takes_out_its_own_lines_only(
    tmp_path: Path, symbol: str, timeframes: list[str] | None, gone: str
) -> None:
    """Other entries and the comments between them stay to the letter; exactly these series are gone from the universe."""
    path = tmp_path / "universe.yaml"
    path.write_text(MINE)
    before = read_universe(path)
    instrument = before.find_instrument(symbol)
    assert instrument is not None
    wanted = None if timeframes is None else [TIMEFRAMES[name] for name in timeframes]
    removed = remove_series(path, instrument, wanted)
    assert path.read_text() == MINE.replace(gone, "", 1)
    assert set(read_universe(path)) == set(before) - set(removed)
    assert removed == [s for s in before if s.instrument == instrument and (wanted is None or s.timeframe in wanted)]


@pytest.mark.parametrize(
    "text",
    [
        "series: [{symbol: AAPL, timeframes: [1h]}, {symbol: MSFT, timeframes: [1h]}]  # in one line\n",
        "series:\n- &a {symbol: AAPL, timeframes: &t [1h]}  # in one line\n- {symbol: MSFT, timeframes: *t}\n",
    ],
)
def test_a_layout_that_cannot_be_edited_is_kept_beside_the_new_file(tmp_path: Path, text: str) -> None:
    """The universe is right, and no comment is lost."""
    path = tmp_path / "universe.yaml"
    path.write_text(text)
    remove_series(path, stock("AAPL"))
    assert list(read_universe(path)) == [Series(stock("MSFT"), TIMEFRAMES["1h"])]
    assert (tmp_path / "universe.yaml.bak").read_text() == text


def test_the_last_series_can_be_removed_and_one_be_added_again(tmp_path: Path) -> None:
    """An empty universe is a universe, and not the default one."""
    path = tmp_path / "universe.yaml"
    path.write_text("series:\n- {symbol: AAPL, timeframes: [1h]}\n")
    remove_series(path, stock("AAPL"))
    assert list(read_universe(path)) == []
    add_series(path, Series(stock("AAPL"), TIMEFRAMES["1d"]))
    assert list(read_universe(path)) == [Series(stock("AAPL"), TIMEFRAMES["1d"])]


def test_removing_what_is_not_there_changes_nothing(tmp_path: Path) -> None:
    """Neither an instrument nor a timeframe; the message says what there is."""
    path = tmp_path / "universe.yaml"
    path.write_text(MINE)
    with pytest.raises(InputError, match="TSLA is not in the universe"):
        remove_series(path, stock("TSLA"))
    with pytest.raises(InputError, match="AAPL 1d is not in the universe, which has AAPL at 1h"):
        remove_series(path, stock("AAPL"), [TIMEFRAMES["1h"], TIMEFRAMES["1d"]])
    assert path.read_text() == MINE


def test_two_instruments_of_one_name_are_refused(tmp_path: Path) -> None:
    """Their bars would share a file; the universe stays as it was."""
    path = tmp_path / "universe.yaml"
    path.write_text(MINE)
    with pytest.raises(InputError, match="AAPL 1h is listed twice"):
        add_series(path, Series(stock("AAPL", currency="EUR", exchange="IBIS"), TIMEFRAMES["1h"]))
    assert path.read_text() == MINE


def test_a_universe_that_was_named_has_to_exist(tmp_path: Path) -> None:
    """Only the default place may be empty."""
    with pytest.raises(InputError, match="does not exist"):
        read_universe(tmp_path / "typo.yaml", must_exist=True)
