"""Each parameter of each route at its edges: a refusal in the one shape, never a 5xx, and nothing happens.

The tables are the list of what was tried. No gateway answers here: whatever asked one would be a 503.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ktrdr_pipelines.api.app import create_app, guarded
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines_tests.api.conftest import BASE, make_loads, problem_of, settings_in

BAD_SYMBOLS = {
    "empty": "", "blank": " ", "absurdly long": "A" * 10_000, "one too long": "A" * 33, "leading space": " AAPL",
    "trailing space": "AAPL ", "parent folder": "../../etc/passwd", "absolute path": "/etc/passwd", "dots": "..",
    "backslash": "..\\..\\x", "NUL": "AAPL\x00", "newline": "AAPL\n", "unicode": "ÄÖÜ", "look-alike": "ААРL",
    "emoji": "📈", "right-to-left": "\u202eLPAA", "percent": "%2e%2e", "shell": "$(id)", "quote": 'A"B', "wildcard": "*",
}  # fmt: skip
BAD_TIMES = {
    "empty": "", "blank": "        ", "words": "tomorrow", "month 13": "2024-13-01", "day 30 of February": "2024-02-30",
    "hour 25": "2024-01-01T25:00:00Z", "zone +99": "2024-01-01T00:00:00+99:00", "no such zone": "2024-01-01T00:00:00 Mars",
    "before 1970": "1969-12-31T23:59:59Z", "year 1": "0001-01-01", "before all time": "0001-01-01T00:00:00+23:59",
    "after all time": "9999-12-31T23:59:59-23:59", "epoch": "1704067200", "long": "2024-01-01" + " " * 5000,
    "other digits": "٢٠٢٤-01-01", "NUL": "2024-01-01\x00", "path": "../../../x",
}  # fmt: skip
BAD_TIMEFRAMES = {
    "empty": "", "unknown": "7m", "upper case": "1H", "space": "1 h", "number": "60", "long": "1h" * 5000, "unicode": "１h",
    "path": "../1h",
}  # fmt: skip
WRONG_TYPES = {"null": None, "number": 7, "float": 1.5, "true": True, "list": ["AAPL"], "object": {"a": 1}}
GOOD = {"symbol": "AAPL", "timeframe": "1h"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = settings_in(tmp_path_factory.mktemp("api"))
    loads = make_loads(settings)
    loads.start()
    application = guarded(create_app(settings, loads), host="127.0.0.1", token="")
    with TestClient(application, base_url=BASE, raise_server_exceptions=False) as made:
        yield made
    with open_instance(settings) as instance:
        assert not instance.get_runs(limit=1), "a refused load was accepted"
    assert not settings.data_dir.exists(), "a refused question wrote something"


def assert_refused(answer: object, *statuses: int) -> None:
    assert answer.status_code in (statuses or (422,)), answer.text  # type: ignore[attr-defined]
    problem_of(answer)


def bad_choices() -> Iterator[tuple[str, object]]:
    """(field, value) of what cannot choose a contract, wherever one is chosen."""
    for name, values in {
        "sec_type": ("BOND", "stk", " ", "\x00"),
        "exchange": ("smart", "../X", "A" * 17, "ÄX", "."),
        "currency": ("euro", "usd", "US", "€", "USD "),
        "con_id": (-1, 1 << 31, 10**30, "x", ""),
    }.items():
        for value in (*values, None, 1.5, [1], {"a": 1}, "A" * 10_000):
            yield name, value


def bodies_with_one_bad_field() -> Iterator[tuple[str, object]]:
    """(what was tried, body) for POST /data/load, valid but for one field."""
    for what, value in BAD_SYMBOLS.items():
        yield f"symbol {what}", {**GOOD, "symbol": value}
    for what, value in BAD_TIMEFRAMES.items():
        yield f"timeframe {what}", {**GOOD, "timeframe": value}
    for name in ("start", "start_date", "end", "end_date"):
        of_wrong_type = {what: wrong for what, wrong in WRONG_TYPES.items() if wrong is not None}
        yield from ((f"{name} {what}", {**GOOD, name: value}) for what, value in {**BAD_TIMES, **of_wrong_type}.items())
    for name in ("symbol", "timeframe", "mode"):
        for what, wrong in WRONG_TYPES.items():
            yield f"{name} {what}", {**GOOD, name: wrong}
    for name, value in bad_choices():
        yield f"{name} {value!s:.12}", {**GOOD, name: value}


def bodies() -> Iterator[tuple[str, object]]:
    """(what was tried, body) for POST /data/load."""
    yield from bodies_with_one_bad_field()
    yield from {
        "mode unknown": {**GOOD, "mode": "sideways"},
        "mode empty": {**GOOD, "mode": ""},
        "mode upper case": {**GOOD, "mode": "TAIL"},
        "wait a word": {**GOOD, "wait": "yes"},
        "wait a number": {**GOOD, "wait": 1},
        "start after end": {**GOOD, "start": "2024-02-01", "end": "2024-01-01"},
        "start at end": {**GOOD, "start": "2024-02-01", "end": "2024-02-01T00:00:00Z"},
        "start at end in another zone": {**GOOD, "start": "2024-02-01T01:00:00+01:00", "end": "2024-02-01"},
        "start in the future": {**GOOD, "start": "2099-01-01"},
        "end before all partitions": {**GOOD, "mode": "full", "end": "2003-12-31"},
        "window before all partitions": {
            "symbol": "NOSUCH",
            "timeframe": "1d",
            "start": "1970-01-01",
            "end": "1979-06-01",
        },
        "end after 2100": {**GOOD, "end": "2101-01-01"},
        "start given twice": {**GOOD, "start": "2024-01-01", "start_date": "2024-01-02"},
        "end given twice": {**GOOD, "end": "2024-01-01", "end_date": "2024-01-01"},
        "no symbol": {"timeframe": "1h"},
        "no timeframe": {"symbol": "AAPL"},
        "nothing": {},
        "unknown field": {**GOOD, "strat": "2024-01-01"},
        "a list": [GOOD],
        "a word": "AAPL",
        "null": None,
        "number": 5,
    }.items()


@pytest.mark.parametrize("body", [pytest.param(body, id=what) for what, body in bodies()])
def test_a_load_that_cannot_be_meant_is_refused(client: TestClient, body: object) -> None:
    """422, and nothing is queued."""
    assert_refused(client.post("/api/v1/data/load", json=body))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[" * 10_000, b'{"symbol": "\\ud800", "timeframe": "1h"}', b'{"\\ud800": 1}', b"NaN",
     b'{"symbol": "AAPL", "timeframe": "1h", "start": ' + b"9" * 6000 + b"}", b"symbol=AAPL&timeframe=1h", b"\x00"],
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused(client: TestClient, raw: bytes) -> None:
    """Broken, endless, binary, half a character, a form."""
    answer = client.post("/api/v1/data/load", content=raw, headers={"Content-Type": "application/json"})
    assert_refused(answer, 400, 422)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_can_post_is_no_load(client: TestClient, kind: str) -> None:
    """A page's form sends these types without asking first."""
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/api/v1/data/load", content=json.dumps(GOOD).encode(), headers=headers)
    assert_refused(answer, 415, 422)


@pytest.mark.parametrize("value", ["maybe", "", "2", "null"])
def test_wait_is_yes_or_no(client: TestClient, value: str) -> None:
    """In the query as in the body; given twice it must agree."""
    assert_refused(client.post(f"/api/v1/data/load?wait={value}", json=GOOD))
    assert_refused(client.post("/api/v1/data/load?wait=true", json={**GOOD, "wait": False}))


@pytest.mark.parametrize("symbol", [pytest.param(s, id=what) for what, s in BAD_SYMBOLS.items() if s])
@pytest.mark.parametrize("route", ["/api/v1/data/{}/1h", "/api/v1/data/{}/1h/gaps"])
def test_a_symbol_in_the_path_never_becomes_one(client: TestClient, route: str, symbol: str) -> None:
    """Refused or not found, encoded or not; no file outside of the data folder is named."""
    quoted = "".join(f"%{byte:02X}" for byte in symbol.encode())
    answer = client.get(route.format(quoted))
    assert_refused(answer, 404, 422)
    assert "root:" not in answer.text


@pytest.mark.parametrize("timeframe", [pytest.param(t, id=what) for what, t in BAD_TIMEFRAMES.items() if t])
def test_a_timeframe_in_the_path_is_one_of_the_table(client: TestClient, timeframe: str) -> None:
    """Everything else is refused or not found."""
    quoted = "".join(f"%{byte:02X}" for byte in timeframe.encode())
    assert_refused(client.get(f"/api/v1/data/AAPL/{quoted}"), 404, 422)
    assert_refused(client.get(f"/api/v1/data/AAPL/{quoted}/gaps"), 404, 422)


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", [pytest.param(t, id=what) for what, t in BAD_TIMES.items()])
def test_a_window_of_bars_has_two_times(client: TestClient, name: str, value: str) -> None:
    """As for loads."""
    assert_refused(client.get("/api/v1/data/AAPL/1h", params={name: value}))


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=50001", "limit=ten", "limit=", "limit=1e3", "limit=" + "9" * 5000, "format=xml", "format=",
     "format=JSON", "start=2024-02-01&end=2024-01-01", "start=2024-01-01&end=2024-01-01"],
)  # fmt: skip
def test_a_page_of_bars_is_bounded(client: TestClient, query: str) -> None:
    """Sizes and formats outside of what is offered."""
    assert_refused(client.get(f"/api/v1/data/AAPL/1h?{query}"))


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "offset=-1", "offset=x", "limit=", "offset=99999999999999999999"]
)
def test_a_page_of_series_is_bounded(client: TestClient, query: str) -> None:
    """The list of what is held."""
    assert_refused(client.get(f"/api/v1/data?{query}"))


@pytest.mark.parametrize(
    "query",
    [f"symbols={quoted}" for quoted in ("", ",", "AAPL,", "..%2F..", "%00", "A" * 100, "%F0%9F%93%88", "AAPL;MSFT")]
    + ["timeframes=7m", "timeframes=", "symbols=AAPL&timeframes=1h,", "symbols=" + ",".join(f"A{i}" for i in range(21))]
    + ["&".join("symbols=A" for _ in range(101))],
)
def test_ranges_are_asked_for_symbols_and_timeframes(client: TestClient, query: str) -> None:
    """Nothing is asked of IB for names that are none, or for more than the budget allows at once."""
    assert_refused(client.get(f"/api/v1/ib/ranges?{query}"))


@pytest.mark.parametrize("body", [{"symbol": s} for s in BAD_SYMBOLS.values()] + [{}, {"symbol": None}, {"symbol": 5},
                                  {"symbol": "AAPL", "x": 1}, [], "AAPL",
                                  *({"symbol": "AAPL", name: value} for name, value in bad_choices())])  # fmt: skip
def test_discovery_is_asked_for_a_symbol(client: TestClient, body: object) -> None:
    """As for loads."""
    assert_refused(client.post("/api/v1/ib/symbols/discover", json=body))


@pytest.mark.parametrize("value", ["", "STK", "Stock", "shares", "x" * 1000, "%00"])
def test_an_unknown_kind_of_instrument_is_refused(client: TestClient, value: str) -> None:
    """Not answered with an empty list, which would read as "there are none"."""
    assert_refused(client.get(f"/api/v1/ib/symbols/discovered?instrument_type={value}"))


@pytest.mark.parametrize("run_id", ["x", "%2e%2e%2f.lock", ".lock", "0" * 5000, "00000000-0000-0000-0000-000000000000"])
def test_an_unknown_load_is_not_found(client: TestClient, run_id: str) -> None:
    """An id is looked up, never opened."""
    assert_refused(client.get(f"/api/v1/data/load/{run_id}"), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/api", 404), ("GET", "/api/v1", 404), ("GET", "/api/v1/ib", 404),
     ("GET", "/api/v2/ib/status", 404),
     ("GET", "/api/v1/data/AAPL", 404), ("GET", "/api/v1/data/../../etc/passwd", 404), ("DELETE", "/api/v1/data", 405),
     ("GET", "/api/v1/ib/cleanup", 405), ("PUT", "/api/v1/data/load", 405), ("TRACE", "/api/v1/ib/status", 405),
     ("BREW", "/api/v1/ib/status", 405)],
)  # fmt: skip
def test_what_is_no_route_has_the_same_shape(client: TestClient, method: str, path: str, status: int) -> None:
    """404 and 405 look like every other refusal."""
    assert_refused(client.request(method, path), status)


def test_a_bug_shows_nothing_of_its_inside(tmp_path: Path) -> None:
    """A bug is a 500 of the same shape that shows nothing of its inside."""
    settings = settings_in(tmp_path)
    application = create_app(settings, make_loads(settings))

    @application.get("/bug")
    def bug() -> None:
        raise ZeroDivisionError("the inside")

    with TestClient(
        guarded(application, host="127.0.0.1", token=""), base_url=BASE, raise_server_exceptions=False
    ) as client:
        answer = client.get("/bug")
    assert_refused(answer, 500)
    assert "inside" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "unknown", "known"),
    [
        ("GET", "/api/v1/ib/ranges?symbol=AAPL", "'symbol'", "symbols, timeframes"),
        ("GET", "/api/v1/data/AAPL/1d?strat=2024-01-01", "'strat'", "start, end, limit, format"),
        ("GET", "/api/v1/data/AAPL/1d/gaps?start=2024-01-01", "'start'", "none"),
        ("GET", "/api/v1/data?Limit=1", "'Limit'", "limit, offset"),
        ("GET", "/api/v1/data/load/x?wait=1", "'wait'", "none"),
        ("POST", "/api/v1/data/load?mode=full", "'mode'", "wait"),
        *(("GET", f"/api/v1/ib/{name}?x=1", "'x'", "none") for name in ("status", "health", "config")),
        ("POST", "/api/v1/ib/cleanup?x", "'x'", "none"),
        ("POST", "/api/v1/ib/symbols/discover?symbol=AAPL", "'symbol'", "none"),
        ("GET", "/api/v1/ib/symbols/discovered?type=stock", "'type'", "instrument_type"),
    ],
)
def test_a_parameter_that_the_route_does_not_know_is_refused(
    client: TestClient, method: str, path: str, unknown: str, known: str
) -> None:
    """Else a slip of the pen would be answered as another question, and ask IB for the whole universe."""
    answer = client.request(method, path, json=GOOD if method == "POST" else None)
    assert_refused(answer, 422)
    refusal = problem_of(answer)
    assert unknown in refusal["message"]
    assert refusal["advice"] == f"This route knows {known}."


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (lambda client: client.get("/api/v1/data/AAPL/1d?start=tomorrow"), "2024-03-05T14:30:00Z"),
        (lambda client: client.post("/api/v1/data/load", json={**GOOD, "end": "5.3.2024"}), "2024-03-05T14:30:00Z"),
        (lambda client: client.post("/api/v1/data/load", json={**GOOD, "symbol": "$"}), "at most 32 letters"),
        (lambda client: client.get("/api/v1/ib/ranges?timeframes=7m"), "1h,1d"),
        (lambda client: client.get("/api/v1/ib/ranges?symbols=,"), "AAPL,MSFT"),
        (lambda client: client.post("/api/v1/data/load", json={**GOOD, "currency": "euro"}), "currency"),
    ],
)
def test_no_message_is_a_regular_expression(
    client: TestClient, answer: Callable[[TestClient], object], refusal: str
) -> None:
    """The refusal explains what to write."""
    message = problem_of(answer(client))["message"]
    assert refusal in message
    assert "pattern" not in message
    assert "\\d" not in message
