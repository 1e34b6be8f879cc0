"""Replay: recorded files served unchanged, joined for longer sizes, refused for shorter ones."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.gateway import Gateway
from ktrdr_pipelines.simulator.market import BAR_SIZES, ContractQuery, find_listings
from ktrdr_pipelines.simulator.replay import ReplayMarket

from .talk import Talk, history

HEADER = "timestamp,open,high,low,close,volume\n"
GOOG = (0, "GOOG", "STK", "", 0.0, "", "", "SMART", "", "USD", "", "", False)
EURUSD = (0, "EUR", "CASH", "", 0.0, "", "", "IDEALPRO", "", "USD", "", "", False)

DAYS = ["2013-02-25", "2013-02-26", "2013-02-27", "2013-02-28", "2013-03-01"]


def at(*parts):
    return int(datetime(*parts, tzinfo=UTC).timestamp())


def write(path, rows):
    path.write_text(HEADER + "".join(f"{stamp},{','.join(map(repr, values))}\n" for stamp, *values in rows))


@pytest.fixture
def folder(tmp_path):
    """Five days of GOOG, and two days of hourly EURUSD from Sunday evening on."""
    write(
        tmp_path / "GOOG_1d.csv",
        [(f"{day}T00:00:00Z", 100.5 + i, 103.25, 99.0, 101.0 + i, 1000 + i) for i, day in enumerate(DAYS)],
    )
    start = datetime(2018, 1, 7, 22, tzinfo=UTC)
    hours = [start + timedelta(hours=h) for h in range(48)]
    write(
        tmp_path / "EURUSD_1h.csv",
        [
            (f"{t:%Y-%m-%dT%H:%M:%SZ}", 1.1 + h / 1e5, 1.2 + h / 1e5, 1.0, 1.10003 + h / 1e5, 7)
            for h, t in enumerate(hours)
        ],
    )
    return tmp_path


def get(market, symbol, size, start, end, what="TRADES", regular=True):
    (listing,) = find_listings(market, ContractQuery(symbol=symbol), end)
    return market.bars(listing, BAR_SIZES[size], start, end, what=what, regular=regular)


def test_instruments_are_inferred_from_file_names(folder):
    """Two currencies are a pair on IDEALPRO, anything else a stock; file names are read back to symbols."""
    write(folder / "BRK_B_1d.csv", [("2013-02-25T00:00:00Z", 1.0, 1.0, 1.0, 1.0, 1)])
    found = {x.local_symbol: (x.sec_type, x.currency, x.default_exchange) for x in ReplayMarket(folder).listings}
    assert found == {
        "EUR.USD": ("CASH", "USD", "IDEALPRO"),
        "GOOG": ("STK", "USD", "SMART"),
        "BRK B": ("STK", "USD", "SMART"),
    }


def test_recorded_bars_are_served_exactly(folder):
    """Every price and volume of the file, to the last digit, and dates for daily bars."""
    talk = Talk(Gateway(ReplayMarket(folder)))
    (answer,) = talk.send(*history(1, GOOG, end="20130301-22:00:00", size="1 day", duration="1 W"))
    rows = [answer[i : i + 6] for i in range(5, len(answer), 8)]
    assert rows == [
        [day.replace("-", ""), repr(100.5 + i), "103.25", "99.0", repr(101.0 + i), str(1000 + i)]
        for i, day in enumerate(DAYS)
    ]


def test_pairs_have_no_volume_on_the_wire(folder):
    """Recorded volume of a pair is not sent: IB has none for quotes."""
    talk = Talk(Gateway(ReplayMarket(folder)))
    (answer,) = talk.send(*history(1, EURUSD, end="20180110-00:00:00", duration="1 M", what="MIDPOINT", rth=False))
    assert answer[4] == "48"
    assert answer[5:13] == [str(at(2018, 1, 7, 22)), "1.1", "1.2", "1.0", "1.10003", "-1", "-1.000", "-1"]


def test_longer_sizes_are_joined_and_shorter_ones_missing(folder):
    """Hours make four hours, days and weeks; there are no minutes."""
    market = ReplayMarket(folder)
    window = (at(2018, 1, 1), at(2018, 1, 20))
    four = get(market, "EUR", "4 hours", *window, "MIDPOINT")
    assert four.stamp[:3].tolist() == [at(2018, 1, 7, 22), at(2018, 1, 8, 1), at(2018, 1, 8, 5)]
    assert four.open[1] == pytest.approx(1.10003)
    days = get(market, "EUR", "1 day", *window, "MIDPOINT")
    assert days.stamp.tolist() == [at(2018, 1, 8), at(2018, 1, 9)]
    assert days.close[0] == pytest.approx(1.10003 + 23 / 1e5)
    assert get(market, "EUR", "1 min", *window, "MIDPOINT") is None
    weeks = get(market, "GOOG", "1W", at(2013, 1, 1), at(2013, 6, 1))
    assert (weeks.stamp.tolist(), weeks.volume.tolist()) == ([at(2013, 3, 1)], [5010])


def test_a_file_of_the_size_wins_over_joining(folder):
    """Recorded hours and recorded days are both served as they are."""
    write(folder / "EURUSD_1d.csv", [("2018-01-08T00:00:00Z", 9.0, 9.0, 9.0, 9.0, 1)])
    days = get(ReplayMarket(folder), "EUR", "1 day", at(2018, 1, 1), at(2018, 1, 20), "MIDPOINT")
    assert days.close.tolist() == [9.0]


def test_a_month_that_ends_long_after_the_recording_is_empty(folder):
    """Sessions follow the calendar after the last recorded day: old bars do not answer a request for today."""
    (answer,) = Talk(Gateway(ReplayMarket(folder))).send(*history(1, GOOG, end="", size="1 day", duration="1 M"))
    assert "HMDS query returned no data" in answer[4]


def test_a_forming_bar_differs_from_the_recorded_one(folder):
    """With an end inside the last bar, that bar is forming and differs from the complete one."""
    market = ReplayMarket(folder)
    early = get(market, "EUR", "1 hour", at(2018, 1, 8), at(2018, 1, 8, 3, 30), "MIDPOINT", regular=False)
    later = get(market, "EUR", "1 hour", at(2018, 1, 8), at(2018, 1, 8, 4), "MIDPOINT", regular=False)
    assert early.stamp.tolist() == later.stamp.tolist()
    assert early.close[:-1].tolist() == later.close[:-1].tolist()
    assert early.high[-1] < later.high[-1]


def test_head_is_the_open_of_the_first_recorded_session(folder):
    """Not the midnight of its date, which would be hours too early."""
    market = ReplayMarket(folder)
    heads = {x.local_symbol: market.head(x, "TRADES", regular=True) for x in market.listings}
    assert heads == {"GOOG": at(2013, 2, 25, 14, 30), "EUR.USD": at(2018, 1, 7, 22)}


def test_regular_hours_of_recorded_stocks(folder):
    """Of a recording with extended hours only the regular ones answer useRTH."""
    stamps = [f"2013-02-25T{h:02d}:00:00Z" for h in range(9, 24)]
    write(folder / "MSFT_1h.csv", [(stamp, 1.0, 1.0, 1.0, 1.0, 1) for stamp in stamps])
    market = ReplayMarket(folder)
    window = (at(2013, 2, 25), at(2013, 2, 26, 2))
    assert len(get(market, "MSFT", "1 hour", *window, regular=False)) == 15
    assert len(get(market, "MSFT", "1 hour", *window, regular=True)) == 6  # 14:00 began before the open


def test_instruments_file_overrides_what_was_inferred(folder):
    """A listing's fields may be given beside the recordings."""
    given = {"GOOG": {"currency": "EUR", "primary_exchange": "IBIS", "con_id": 42, "long_name": "Given"}}
    (folder / "instruments.json").write_text(json.dumps(given))
    (listing,) = find_listings(ReplayMarket(folder), ContractQuery(con_id=42, exchange="IBIS"), 0)
    assert (listing.currency, listing.long_name, listing.exchanges) == ("EUR", "Given", ("SMART", "IBIS"))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("GOOG_1d.csv", "date,close\n2013-02-25,1\n", "date,close"),
        ("GOOG_1d.csv", HEADER + "2013-02-25,1,1,1,1,1\n", "2013-02-25"),
        ("GOOG_1d.csv", HEADER + "2013-02-25T00:00:00Z,a,1,1,1,1\n", "a"),
        ("GOOG_1d.csv", HEADER + "2013-02-25T00:00:00Z,1,1,1,1,1\n" * 2, "timestamps"),
        ("instruments.json", "{", ""),
        ("instruments.json", "[]", ""),
        ("instruments.json", '{"GOOG": {"colour": 1}}', "colour"),
    ],
)
def test_invalid_recordings_are_input_errors(folder, name, text, named):
    """The error names the file and the invalid part."""
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.*{named}"):
        get(ReplayMarket(folder), "GOOG", "1 day", at(2013, 1, 1), at(2014, 1, 1))


def test_empty_or_missing_folder_is_an_input_error(tmp_path):
    """The error names the folder."""
    with pytest.raises(InputError, match=tmp_path.name):
        ReplayMarket(tmp_path)
    with pytest.raises(InputError, match="none"):
        ReplayMarket(tmp_path / "none")
