"""Promises of the routes that show what is held: exactly the bars of the file, in pages, and nothing is changed by looking."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from ktrdr_pipelines.services.inspection import inspect_one
from ktrdr_pipelines_tests.api.conftest import OpenApi, make_loads, problem_of, serving, settings_in

ROUTE = "/api/v1/data/AAPL/1d"
HEADER = "timestamp,open,high,low,close,volume\n"
ROWS = [f"2022-{month:02}-{day:02}T00:00:00Z,10.5,11.25,9.75,10.125,{month * 1000 + day}\n"
        for month in range(1, 13) for day in (3, 4, 5, 6, 7)]  # fmt: skip


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A file made elsewhere, with sixty bars, some of them on days that no calendar has."""
    path = tmp_path / "data" / "AAPL_1d.csv"
    path.parent.mkdir()
    path.write_text(HEADER + "".join(ROWS))
    return path


@pytest.mark.parametrize("limit", [7, 59, 60, 50_000])
@pytest.mark.parametrize("shape", ["json", "csv", "arrow"])
def test_pages_put_together_are_the_file(open_api: OpenApi, csv: Path, limit: int, shape: str) -> None:
    """Whatever the size of a page, following next_start gives every bar once; the file is as it was."""
    client = open_api()
    found: list[str] = []
    start: str | None = "1970-01-01"
    while start is not None:
        answer = client.get(ROUTE, params={"start": start, "limit": limit, "format": shape})
        assert answer.status_code == 200
        if shape == "csv":
            assert answer.text.startswith(HEADER)
            page = answer.text.removeprefix(HEADER).splitlines(keepends=True)
        else:
            bars = (
                answer.json()["bars"]
                if shape == "json"
                else [
                    {**bar, "timestamp": bar["timestamp"].strftime("%Y-%m-%dT%H:%M:%SZ")}
                    for bar in pa.ipc.open_stream(io.BytesIO(answer.content)).read_all().to_pylist()
                ]
            )
            page = [
                f"{b['timestamp']},{b['open']},{b['high']},{b['low']},{b['close']},{b['volume']:.0f}\n" for b in bars
            ]
        assert 0 < len(page) <= limit
        found += page
        start = answer.headers.get("x-next-start")
        if shape == "json":
            assert answer.json()["next_start"] == start
    assert found == ROWS
    assert csv.read_text() == HEADER + "".join(ROWS)
    assert [each.name for each in csv.parent.iterdir()] == [csv.name]


@pytest.mark.parametrize(
    ("start", "end", "count"),
    [("2022-03-03", "2022-03-05", 2), ("2022-03-03T00:00:01Z", "2022-03-05T00:00:01Z", 2), (None, "2022-01-03", 0),
     ("2022-12-07", None, 1), ("2022-12-08", None, 0), ("2022-03-03T01:00:00+01:00", "2022-03-04", 1), (None, None, 60)],
)  # fmt: skip
def test_a_window_includes_its_start_and_not_its_end(
    open_api: OpenApi, csv: Path, start: str | None, end: str | None, count: int
) -> None:
    """As at every entry point."""
    query = {name: value for name, value in (("start", start), ("end", end)) if value}
    answer = open_api().get(ROUTE, params=query).json()
    assert (answer["count"], len(answer["bars"]), answer["next_start"]) == (count, count, None)


@pytest.mark.parametrize("shape", ["json", "csv", "arrow"])
def test_a_gap_is_reported_and_does_not_look_like_no_data(open_api: OpenApi, csv: Path, shape: str) -> None:
    """Missing bars of the window are counted, page by page; a window without any has no notice."""
    client = open_api()

    def notice(**query: object) -> str:
        answer = client.get(ROUTE, params={**query, "format": shape})
        header: str = answer.headers.get("x-notice", "")
        if shape == "json":
            assert "; ".join(answer.json()["notices"]) == header
        return header

    csv.write_text(HEADER + "".join(f"2022-01-{day:02}T00:00:00Z,1,2,1,1,5\n" for day in (3, 4, 7, 10)))
    assert notice(start="2022-01-03", end="2022-01-05") == ""
    assert notice().startswith("AAPL 1d 2022-01-03..2022-01-10T00:00:01Z: 2 expected bars are not held; ")
    assert "247 expected bars" in notice(start="2021-01-01", end="2021-12-25")
    assert notice(limit=2).startswith("AAPL 1d 2022-01-03..2022-01-07: 2 expected")
    assert notice(start="2022-01-07", limit=2) == ""
    csv.unlink()
    assert notice() == "nothing is held of AAPL 1d; POST /api/v1/data/load loads it"
    assert "5 expected bars" in notice(start="2022-01-03", end="2022-01-08")
    assert notice(start="2022-01-08", end="2022-01-10") == ""


def test_nothing_held_is_an_empty_page_and_an_unknown_symbol_is_not_found(open_api: OpenApi) -> None:
    """Two different answers: the second may be a slip of the pen."""
    client = open_api()
    assert client.get(ROUTE).json()["count"] == 0
    assert problem_of(client.get("/api/v1/data/APPL/1d"))["kind"] == "not_found"


@pytest.mark.parametrize("shape", ["json", "csv", "arrow"])
def test_a_row_that_is_no_bar_is_left_out_with_a_word(open_api: OpenApi, csv: Path, shape: str) -> None:
    """Never fewer bars without saying so."""
    csv.write_text(HEADER + "".join(ROWS[:5]) + "2022-02-03T00:00:00Z,10,9,11,10,1\n")
    answer = open_api().get(ROUTE, params={"format": shape})
    assert "1 refused; line 7" in answer.headers["x-notice"]
    if shape == "json":
        assert answer.json()["count"] == 5
        assert "1 refused" in " ".join(answer.json()["notices"])


@pytest.mark.parametrize("byte", ["\0", "\x01", "\x1b", "\x7f", "\x85", "\u2028"])
def test_a_row_with_any_byte_in_it_is_reported_in_a_header(tmp_path: Path, csv: Path, byte: str) -> None:
    """A machine that crashed leaves NULs; a header takes none, and the connection would be closed. On a socket, as served."""
    bad = f"2022-02-03T00:00:00Z,10,9{byte},11,10,1\n".encode()
    csv.write_bytes((HEADER + "".join(ROWS[:5])).encode() + bad)
    settings = settings_in(tmp_path)
    with serving(settings, make_loads(settings)) as base:
        answer = httpx.get(f"{base}/data/AAPL/1d?limit=1", timeout=30)
    assert answer.status_code == 200
    assert "1 refused; line 7" in answer.headers["x-notice"]
    assert "1 refused" in answer.json()["notices"][0]


def test_a_file_that_is_none_is_a_failure_and_not_an_empty_answer(open_api: OpenApi, csv: Path) -> None:
    """On each route that reads it; the list goes on with the others."""
    csv.write_text("<html>no bars</html>\n")
    client = open_api()
    for route in (ROUTE, f"{ROUTE}/gaps"):
        answer = client.get(route)
        assert (answer.status_code, problem_of(answer)["kind"]) == (502, "data")
    listed = {(each["symbol"], each["timeframe"]): each for each in client.get("/api/v1/data").json()["series"]}
    assert listed["AAPL", "1d"]["rows"] is None
    assert "AAPL_1d.csv" in listed["AAPL", "1d"]["problem"]
    assert listed["AAPL", "1h"]["rows"] == 0


BROKEN = {
    "no YAML": "series: [",
    "nested": "[" * 3000,
    "no such day": "series: 2024-13-45",
    "unknown field": "series:\n- {symbol: AAPL, timeframes: [1d], colour: red}\n",
    "no kind": "series:\n- {symbol: AAPL, timeframes: [7m]}\n",
    "not text": "\0",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_universe_file_is_the_servers_trouble_and_not_the_questions(
    open_api: OpenApi, csv: Path, content: str
) -> None:
    """A 5xx in the one shape that names the file: the caller cannot mend it."""
    (csv.parent / "universe.yaml").write_text(content)
    client = open_api()
    for route in ("/api/v1/data", ROUTE, f"{ROUTE}/gaps", "/api/v1/ib/symbols/discovered", "/api/v1/ib/ranges"):
        answer = client.get(route)
        assert (answer.status_code, problem_of(answer)["kind"]) == (503, "configuration"), route
        assert "universe.yaml" in problem_of(answer)["message"]


def test_the_list_shows_what_is_held(open_api: OpenApi, csv: Path) -> None:
    """Every series of the universe, in pages."""
    client = open_api()
    whole = client.get("/api/v1/data").json()
    assert whole["total"] == len(whole["series"]) == 20
    assert whole["next_offset"] is None
    held = [each for each in whole["series"] if each["rows"]]
    assert [(e["symbol"], e["timeframe"], e["rows"], e["first"], e["last"]) for e in held] == [
        ("AAPL", "1d", 60, "2022-01-03T00:00:00Z", "2022-12-07T00:00:00Z")
    ]
    page = client.get("/api/v1/data?limit=3&offset=18").json()
    assert page["series"] == whole["series"][18:]
    assert client.get("/api/v1/data?limit=3").json()["next_offset"] == 3


@pytest.mark.slow
def test_gaps_are_those_of_the_command(open_api: OpenApi, csv: Path, tmp_path: Path) -> None:
    """The same at both entry points."""
    settings = settings_in(tmp_path)
    answer = open_api(settings).get("/api/v1/data/AAPL/1d/gaps").json()
    expected = json.loads(json.dumps(inspect_one("AAPL", "1d", settings).as_dict()))
    assert answer["missing"] == expected["missing"]
    assert (
        answer["held"]
        == expected["held"]
        == {"rows": 60, "first": "2022-01-03T00:00:00Z", "last": "2022-12-07T00:00:00Z"}
    )


@pytest.mark.parametrize("symbol", ["EURUSD", "EUR%2FUSD", "EUR/USD", "EUR.USD", "eur%2fusd"])
def test_every_way_to_write_a_pair_finds_its_bars_and_its_gaps(open_api: OpenApi, csv: Path, symbol: str) -> None:
    """As loads do; a slash is part of the name."""
    (csv.parent / "EURUSD_1d.csv").write_text(HEADER + "2022-01-03T00:00:00Z,1,2,1,1,0\n")
    client = open_api()
    answer = client.get(f"/api/v1/data/{symbol}/1d")
    assert (answer.status_code, answer.json()["symbol"], answer.json()["count"]) == (200, "EURUSD", 1)
    assert client.get(f"/api/v1/data/{symbol}/1d/gaps").json()["held"]["rows"] == 1
    assert problem_of(client.get("/api/v1/data/EUR%2FXXX/1d"))["kind"] == "not_found"


def test_a_range_that_is_named_twice_is_answered_once(open_api: OpenApi) -> None:
    """However a timeframe is written; without a gateway each row has the reason."""
    answer = open_api().get("/api/v1/ib/ranges?symbols=AAPL,AAPL&timeframes=1d,1d,1M&timeframes=1mo,1d")
    assert [(row["symbol"], row["timeframe"]) for row in answer.json()["ranges"]] == [("AAPL", "1d"), ("AAPL", "1mo")]
