"""A request for a load is parsed once and travels without loss."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_pipelines.domain.load_request import Choice, LoadRequest, Mode
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines_tests.fakes import utc

_instants = st.datetimes(datetime(1971, 1, 1), datetime(2099, 1, 1), timezones=st.timezones())  # noqa: DTZ001
_choices = st.builds(
    Choice,
    sec_type=st.sampled_from(["", "STK", "CASH", "CONTFUT"]),
    exchange=st.sampled_from(["", "SMART", "IBIS2"]),
    currency=st.sampled_from(["", "USD"]),
    con_id=st.integers(0, 2**31),
)


@given(
    st.sampled_from(["AAPL", "BRK B", "eur.usd", "EUR/USD"]),
    st.sampled_from([*TIMEFRAMES, "1M"]),
    st.sampled_from(list(Mode)),
    st.none() | _instants,
    st.none() | st.timedeltas(timedelta(seconds=2), timedelta(days=365)),
    _choices,
)
def test_a_request_comes_back_from_its_config(
    symbol: str, timeframe: str, mode: Mode, start: datetime | None, length: timedelta | None, choice: Choice
) -> None:
    """Through JSON, as run config is stored; every instant means the same second."""
    end = (start or utc("2024-01-01")).astimezone(UTC) + length if length else None
    request = LoadRequest.parse(symbol, timeframe, mode, start=start, end=end, choice=choice)
    assert LoadRequest.from_config(json.loads(json.dumps(request.to_config()))) == request
    for given_time, parsed in ((start, request.start), (end, request.end)):
        assert (given_time is None) == (parsed is None)
        if given_time is not None and parsed is not None:
            assert timedelta(0) <= parsed - given_time < timedelta(seconds=1)


def test_one_meaning_is_one_request() -> None:
    """However it is written: text, date, another zone, fractions of a second."""
    wanted = LoadRequest("AAPL", TIMEFRAMES["1mo"], Mode.TAIL, utc("2024-01-02"), utc("2024-03-05T14:30:00"))
    for start, end in (
        ("2024-01-02", "2024-03-05T14:30:00Z"),
        (date(2024, 1, 2), datetime(2024, 3, 5, 14, 30, tzinfo=UTC)),
        ("2024-01-02T01:00:00+01:00", "2024-03-05 14:29:59.5"),
    ):
        assert LoadRequest.parse("AAPL", "1M", "tail", start=start, end=end) == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"symbol": ""},
        {"timeframe": "7m"},
        {"mode": "half"},
        {"start": "yesterday"},
        {"start": datetime(2024, 1, 1)},  # noqa: DTZ001
        {"start": 5},
        {"start": "2024-02-01", "end": "2024-01-01"},
        {"start": "2024-07-01"},
    ],
)
def test_invalid_input_is_refused(wrong: dict[str, object]) -> None:
    """Before anything is asked or opened."""
    valid: dict[str, object] = {"symbol": "AAPL", "timeframe": "1h", "mode": "tail"}
    with pytest.raises(InputError):
        LoadRequest.parse(**{**valid, **wrong}, now=utc("2024-06-15"))  # type: ignore[arg-type]
