"""Every message of IB's that we know leads to what the facts say, and none that we do not know passes for an answer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.errors import BugError, GatewayUnreachable, KtrdrError, PacingError, PermanentError, TransientError
from ktrdr_pipelines.ib.codes import (
    CODES,
    Kind,
    Outage,
    Outcome,
    RequestLost,
    classify,
    in_nightly_reset,
    name_farm,
)
from ktrdr_pipelines.ib.wire.outages import Outages

NOON = datetime(2024, 3, 5, 17, 0, tzinfo=UTC)


def is_ignored(outcome: Outcome) -> bool:
    """The message is logged, and nothing else follows."""
    row = outcome.row
    return row.kind is Kind.NOTICE and not (outcome.begins or row.ends or row.needs_resubscribe)


SERVICE = "Historical Market Data Service error message:"
KNOWN_CODES = sorted({code for row in CODES for code in row.codes})

# IB's texts, verbatim where they were seen, and what follows. Written from the facts, not from the table in the code.
CASES = [
    (162, SERVICE + "Historical data request pacing violation", Kind.FAILED, PacingError),
    (162, SERVICE + "HMDS query returned no data: AAPL@SMART Trades", Kind.EMPTY, None),
    (162, SERVICE + "API historical data query cancelled: 28", Kind.CANCELLED, TransientError),
    (162, SERVICE + "invalid step: 31 D and 1 secs", Kind.FAILED, BugError),
    (162, SERVICE + "No market data permissions for NYSE STK", Kind.FAILED, PermanentError),
    (162, SERVICE + "Trading TWS session is connected from a different IP address", Kind.FAILED, TransientError),
    (162, SERVICE + "No historical market data for EUR/CASH@IDEALPRO Last 60", Kind.FAILED, TransientError),
    (162, "Fehlermeldung: HMDS-Abfrage ergab keine Daten", Kind.FAILED, TransientError),
    (162, "", Kind.FAILED, TransientError),
    (165, "Historical Market Data Service query message: HMDS server connection was successful.", Kind.NOTICE, None),
    (166, "HMDS Expired Contract Violation", Kind.FAILED, PermanentError),
    (200, "No security definition has been found for the request", Kind.FAILED, PermanentError),
    (200, "The contract description specified for AAPL is ambiguous.", Kind.FAILED, PermanentError),
    (321, "Error validating request.-'bN' : cause - Historical data bar size setting is invalid.", Kind.FAILED, BugError),
    (321, "Error validating request.-'cI' : cause - The API interface is currently in Read-Only mode.", Kind.NOTICE, None),
    (322, "Error processing request:-'wd' : cause - Only 50 simultaneous API historical data requests allowed.",
     Kind.FAILED, PacingError),
    (322, "Error processing request:-'wd' : cause - Duplicate ticker ID", Kind.FAILED, TransientError),
    (326, "Unable to connect as the client id is already in use.", Kind.FAILED, RequestLost),
    (354, "Requested market data is not subscribed.", Kind.FAILED, PermanentError),
    (366, "No historical data query found for ticker id:5", Kind.CANCELLED, TransientError),
    (420, "Invalid real-time query: pacing violation", Kind.FAILED, PacingError),
    (100, "Max rate of messages per second has been exceeded", Kind.FAILED, PacingError),
    (502, "Couldn't connect to TWS", Kind.FAILED, GatewayUnreachable),
    (504, "Not connected", Kind.FAILED, GatewayUnreachable),
    (1300, "TWS socket port has been reset", Kind.FAILED, GatewayUnreachable),
    (10090, "Part of requested market data is not subscribed.", Kind.FAILED, PermanentError),
    (10187, "Failed to request historical ticks: No market data permissions", Kind.FAILED, PermanentError),
    (10197, "No market data during competing live session", Kind.FAILED, TransientError),
    (10314, "End Date/Time: The date, time, or time-zone entered is invalid.", Kind.FAILED, BugError),
    (10339, "Setting end date/time for continuous future security type is not allowed.", Kind.FAILED, BugError),
    (2174, "You submitted request with date-time attributes without explicit time zone.", Kind.FAILED, BugError),
]  # fmt: skip


@pytest.mark.parametrize(("code", "text", "kind", "error"), CASES)
def test_message_leads_to_what_the_facts_say(code: int, text: str, kind: Kind, error: type[KtrdrError] | None) -> None:
    """Each known message has the kind and the error family of the facts, under its own code."""
    outcome = classify(code, text, now=NOON)
    assert (outcome.row.kind, outcome.row.error) == (kind, error)
    assert outcome.is_known
    assert outcome.is_empty == (kind is Kind.EMPTY)


@pytest.mark.parametrize("row", CODES, ids=lambda row: f"{row.codes[0]}-{row.meaning}")
def test_every_row_is_complete(row) -> None:
    """Each row has its source and meaning, and what the user can do wherever it can fail a request."""
    assert row.source.strip()
    assert row.meaning.strip()
    assert row.codes
    if row.kind in (Kind.FAILED, Kind.CANCELLED):
        assert row.error is not None
        assert row.advice
    if row.error is not None:
        assert issubclass(row.error, KtrdrError)
        assert row.error is not KtrdrError


# The table of the facts (section 8), line by line: codes, a text that narrows them (None: any), what follows.
FACTS: list[tuple[tuple[int, ...], str | None, Callable[[Outcome], bool]]] = [
    ((162,), "pacing violation", lambda o: o.row.error is PacingError and o.row.pauses_login),
    ((162,), "HMDS query returned no data: X", lambda o: o.is_empty),
    ((162,), "query cancelled", lambda o: o.row.kind is Kind.CANCELLED and o.row.error.is_transient),
    ((366,), None, lambda o: o.row.kind is Kind.CANCELLED and o.row.error.is_transient),
    ((162,), "invalid step", lambda o: o.row.error is BugError),
    ((321,), None, lambda o: o.row.error is BugError),
    ((162,), "No market data permissions for X", lambda o: o.row.error is PermanentError and "Subscri" in o.row.advice),
    ((354, 10090, 10187), None, lambda o: o.row.error is PermanentError and "Subscri" in o.row.advice),
    (
        (162,),
        "connected from a different IP address",
        lambda o: o.row.error.is_transient and o.row.pauses_login and "log out" in o.row.advice,
    ),
    ((10197,), None, lambda o: o.row.error.is_transient and o.row.pauses_login and "log out" in o.row.advice),
    ((162,), "anything else", lambda o: o.row.error is TransientError and "language to English" in o.row.advice),
    ((165,), None, lambda o: not o.ends_request and not o.begins),
    ((166,), None, lambda o: o.row.error is PermanentError),
    ((200,), None, lambda o: o.row.error is PermanentError and "symbol" in o.row.advice),
    ((326,), None, lambda o: o.row.next_client_id),
    ((420,), None, lambda o: o.row.error is PacingError and o.row.pauses_login),
    ((502, 504, 1300), None, lambda o: o.row.reconnect and o.row.error is GatewayUnreachable),
    ((1100,), None, lambda o: not o.ends_request and o.begins == {Outage.LINK}),
    ((1101,), None, lambda o: not o.ends_request and o.row.ends == {Outage.LINK} and o.row.needs_resubscribe),
    ((1102,), None, lambda o: not o.ends_request and o.row.ends == {Outage.LINK} and not o.row.needs_resubscribe),
    ((2103, 2104, 2108), None, is_ignored),
    ((2105,), None, lambda o: not o.ends_request and o.begins == {Outage.HISTORY}),
    ((2106, 2107), None, lambda o: not o.ends_request and o.row.ends == {Outage.HISTORY}),
    ((2157,), None, lambda o: not o.ends_request and o.begins == {Outage.DEFINITIONS}),
    ((2158,), None, lambda o: not o.ends_request and o.row.ends == {Outage.DEFINITIONS}),
    ((2174, 10339), None, lambda o: o.row.error is BugError and o.ends_request),
]
TONGUES = [
    "",
    "Der Dienst f\u00fcr historische Marktdaten meldet: Abfrage ergab keine Daten",
    "\u6ca1\u6709\u6570\u636e",
    "query returned nothing",
]


@pytest.mark.parametrize(
    ("codes", "text", "follows"), FACTS, ids=lambda part: str(part) if isinstance(part, tuple) else ""
)
def test_the_table_of_the_facts_applies_in_every_language(
    codes: tuple[int, ...], text: str | None, follows: Callable[[Outcome], bool]
) -> None:
    """Each line of it, with its source; a code that needs no text means the same in German, in Chinese and without words."""
    for code in codes:
        for words in TONGUES if text is None else [text, SERVICE + text.upper()]:
            outcome = classify(code, words, now=NOON)
            assert follows(outcome), (code, words)
            assert outcome.is_known
            assert "facts" in outcome.row.source


@pytest.mark.parametrize("words", TONGUES)
def test_unknown_texts_are_no_evidence_of_an_empty_window(words: str) -> None:
    """Whatever the code: "no data" in another language is a failure, and the advice is what the user can do about it."""
    for code in {*KNOWN_CODES, 161, 2101, 99999}:
        assert not classify(code, words, now=NOON).is_empty
    assert "Set the gateway's language to English" in str(classify(162, words, now=NOON).to_error())


def test_rows_of_one_code_end_with_the_one_for_any_text() -> None:
    """No text of a known code falls through the table, and no row is hidden behind one that takes every text."""
    for code in KNOWN_CODES:
        rows = [row for row in CODES if code in row.codes]
        assert [row.pattern is None for row in rows] == [False] * (len(rows) - 1) + [True]


def test_every_error_family_occurs() -> None:
    """The table uses each family of the exception tree that a message of IB's can belong to, and each makes its own exit code."""
    families = {row.error for row in CODES if row.error} - {RequestLost}
    assert issubclass(RequestLost, TransientError)
    assert families == {PacingError, PermanentError, TransientError, BugError, GatewayUnreachable}
    assert len({error.exit_code for error in families - {PacingError}}) == 4


@settings(max_examples=60, deadline=None)
@given(code=st.integers(-1000, 100_000), text=st.text(max_size=80), during_history=st.booleans())
def test_only_one_phrase_of_one_code_proves_emptiness(code: int, text: str, during_history: bool) -> None:
    """Whatever IB sends, only 162 with "query returned no data" is read as "there is nothing"; all else fails or is ignored."""
    outcome = classify(code, text, now=NOON, during_history=during_history)
    assert not outcome.is_empty
    error = outcome.to_error("loading AAPL 1h")
    assert isinstance(error, KtrdrError)
    assert error.code == code
    assert type(error) is not KtrdrError
    if outcome.row.kind is Kind.FAILED:
        assert outcome.row.error is not None


@given(
    before=st.text(max_size=30),
    after=st.text(max_size=30),
    phrase=st.sampled_from(["pacing violation", "different IP"]),
)
def test_a_complaint_beside_no_data_is_a_complaint(before: str, after: str, phrase: str) -> None:
    """A text with both "no data" and something alarming is the alarm."""
    for text in (
        f"{before} {phrase} query returned no data {after}",
        f"{before} query returned no data, {phrase} {after}",
    ):
        assert classify(162, text, now=NOON).row.kind is Kind.FAILED


def test_only_a_request_for_bars_can_prove_a_window_empty() -> None:
    """The same words in answer to a request for the start of history are a refusal, not a proof."""
    outcome = classify(162, SERVICE + "HMDS query returned no data: X", now=NOON, during_history=False)
    assert not outcome.is_empty
    assert outcome.row.error is PermanentError


@pytest.mark.parametrize("outages", [{Outage.HISTORY}, {Outage.LINK}, {Outage.LINK, Outage.DEFINITIONS}])
def test_no_data_of_a_broken_farm_is_no_evidence(outages: set[Outage]) -> None:
    """While the history farm or the link is known to be down, "no data" is a failure that may be tried again."""
    outcome = classify(162, SERVICE + "HMDS query returned no data: X", now=NOON, outages=outages)
    assert not outcome.is_empty
    assert outcome.row.error.is_transient


@pytest.mark.parametrize("outages", [{Outage.DEFINITIONS}, {Outage.LINK}])
def test_unknown_contract_of_a_broken_farm_is_not_believed(outages: set[Outage]) -> None:
    """While contracts cannot be looked up, "no such contract" may be tried again; history alone down changes nothing."""
    text = "No security definition has been found for the request"
    assert classify(200, text, now=NOON, outages=outages).row.error.is_transient
    assert not classify(200, text, now=NOON, outages={Outage.HISTORY}).row.error.is_transient


@pytest.mark.parametrize(
    ("when", "is_reset"),
    [
        ("2024-01-10T04:44:59", False),  # winter: New York is UTC-5
        ("2024-01-10T04:45:00", True),
        ("2024-01-10T05:44:59", True),
        ("2024-01-10T05:45:00", False),
        ("2024-07-10T03:44:59", False),  # summer: UTC-4
        ("2024-07-10T03:45:00", True),
        ("2024-07-10T04:44:59", True),
        ("2024-07-10T04:45:00", False),
    ],
)
def test_unknown_contract_is_final_except_in_the_nightly_reset(when: str, is_reset: bool) -> None:
    """A 200 between 23:45 and 00:45 New York, in winter and in summer, is tried again later; at any other time it is final."""
    now = datetime.fromisoformat(when).replace(tzinfo=UTC)
    assert in_nightly_reset(now) is is_reset
    error = classify(200, "No security definition has been found for the request", now=now).to_error()
    assert type(error) is (TransientError if is_reset else PermanentError)
    assert type(classify(200, "... is ambiguous", now=now).to_error()) is PermanentError


def test_a_naive_time_is_refused() -> None:
    """The nightly reset is not judged by a time whose zone is a guess, whichever the code."""
    with pytest.raises(ValueError, match="no time zone"):
        classify(162, "pacing", now=datetime(2024, 1, 1))  # noqa: DTZ001


def test_a_notice_or_a_warning_ends_nothing_and_the_zone_warning_does() -> None:
    """The table alone decides: 10167 and the warnings leave a request running; 2174 ends it, and it has to be cancelled."""
    for code in (10167, 2104, 2150, 2199):
        outcome = classify(code, "", now=NOON)
        assert not outcome.ends_request
        assert not outcome.row.goes_on
    zone = classify(2174, "", now=NOON)
    assert zone.ends_request
    assert zone.row.goes_on


def test_unknown_codes_fail_but_unknown_warnings_do_not_end_a_request() -> None:
    """A code without a row fails its request with a retry; one of the gateway's warnings (2100 to 2199) leaves it running."""
    for code in (1, 161, 163, 2099, 2200, 9999, 10400):
        outcome = classify(code, "?", now=NOON)
        assert (outcome.row.kind, outcome.is_known, outcome.row.error.is_transient) == (Kind.FAILED, False, True)
    for code in (2100, 2137, 2199):
        outcome = classify(code, "?", now=NOON)
        assert (is_ignored(outcome), outcome.is_known, outcome.ends_request) == (True, False, False)


def test_an_outage_lasts_until_its_end_is_reported() -> None:
    """Following the messages of a link loss and a farm loss, there is an outage exactly from its first to its last message."""
    story = [
        (2105, "HMDS data farm connection is broken:ushmds", {Outage.HISTORY}),
        (1100, "Connectivity between IB and TWS has been lost.", {Outage.HISTORY, Outage.LINK}),
        (2106, "HMDS data farm connection is OK:ushmds", {Outage.LINK}),
        (1102, "Connectivity between IB and TWS has been restored - data maintained.", set()),
        (2157, "Sec-def data farm connection is broken:secdefil", {Outage.DEFINITIONS}),
        (2103, "Market data farm connection is broken:usfarm", {Outage.DEFINITIONS}),
        (2158, "Sec-def data farm connection is OK:secdefil", set()),
        (2105, "HMDS data farm connection is broken:ushmds", {Outage.HISTORY}),
        (2107, "HMDS data farm connection is inactive but should be available upon demand.ushmds", set()),
        (2110, "Connectivity between TWS and server is broken. It will be restored automatically.", {Outage.LINK}),
        (2105, "HMDS data farm connection is broken:ushmds", {Outage.LINK, Outage.HISTORY}),
        (1102, "... restored - data maintained. All data farms are connected: usfarm; ushmds.", set()),
        (1100, "Connectivity between IB and TWS has been lost.", {Outage.LINK}),
        (1101, "Connectivity between IB and TWS has been restored - data lost.", set()),
    ]
    down = Outages()
    for code, text, expected in story:
        outcome = classify(code, text, now=NOON)
        assert outcome.row.kind is Kind.NOTICE
        down = down.after(outcome)
        assert down.kinds == expected, code
        assert outcome.row.needs_resubscribe == (code == 1101)


def follow(*story: tuple[int, str]) -> str:
    """What is down after these messages, in words."""
    down = Outages()
    for code, text in story:
        down = down.after(classify(code, text, now=NOON))
    return down.describe()


BROKEN, FINE, IDLE = "HMDS data farm connection is broken", "HMDS data farm connection is OK", "available upon demand"


@pytest.mark.parametrize(
    ("story", "down"),
    [
        # one farm has nothing to do with another
        ([(2105, f"{BROKEN}:ushmds"), (2106, f"{FINE}:euhmds")], "history farm ushmds"),
        ([(2105, f"{BROKEN}:ushmds"), (2105, f"{BROKEN}:euhmds"), (2106, f"{FINE}:ushmds")], "history farm euhmds"),
        ([(2105, f"{BROKEN}:ushmds"), (2105, f"{BROKEN}:ushmds"), (2107, f"{IDLE}.ushmds")], ""),
        ([(2105, f"{BROKEN}:ushmds"), (2106, f"{FINE}: USHMDS")], ""),
        ([(2157, "broken:secdefil"), (2158, "OK:secdefeu")], "contract farm secdefil"),
        # a message without a name is about the only one that is down, and about none of several
        ([(2105, BROKEN)], "history farm"),
        ([(2105, BROKEN), (2106, FINE)], ""),
        ([(2105, BROKEN), (2106, f"{FINE}:ushmds")], ""),
        ([(2105, f"{BROKEN}:ushmds"), (2106, FINE)], ""),
        ([(2105, f"{BROKEN}:ushmds"), (2105, f"{BROKEN}:euhmds"), (2106, FINE)], "history farm euhmds, history farm ushmds"),
        ([(2105, f"{BROKEN}:ushmds"), (2105, BROKEN), (2106, f"{FINE}:ushmds")], "history farm"),
        ([(2105, f"{BROKEN}:ushmds"), (2105, BROKEN), (2106, f"{FINE}:euhmds")], "history farm, history farm ushmds"),
        # farms of another kind, quotes and chatter
        ([(2105, f"{BROKEN}:ushmds"), (2158, "OK:ushmds"), (2104, "OK:ushmds"), (165, ":ushmds")], "history farm ushmds"),
        # the link ends outages of farms only if its text has it
        ([(2105, f"{BROKEN}:ushmds"), (1100, "lost"), (1102, "data maintained")], "history farm ushmds"),
        ([(2105, f"{BROKEN}:ushmds"), (1100, "lost"), (1101, "data lost")], "history farm ushmds"),
        ([(2105, f"{BROKEN}:ushmds"), (2157, "x:s"), (1100, ""), (1102, "All data farms are connected: usfarm; ushmds.")], ""),
        ([(2105, f"{BROKEN}:ushmds"), (2157, "x:s"), (1100, ""), (1101, "data lost. All data farms are connected: a.")], ""),
        ([(2110, "TWS: broken"), (1102, "")], ""),
    ],
)  # fmt: skip
def test_each_farm_has_an_outage_of_its_own(story: list[tuple[int, str]], down: str) -> None:
    """2105 for one farm is not taken back by 2106 for another; where names are missing, only what can be meant is released."""
    assert follow(*story) == down


@pytest.mark.parametrize(
    ("text", "farm"),
    [
        ("HMDS data farm connection is broken:ushmds", "ushmds"),
        ("HMDS data farm connection is broken: ushmds.nj ", "ushmds.nj"),
        ("HMDS data farm connection is inactive but should be available upon demand.ushmds", "ushmds"),
        ("Die Verbindung zur HMDS-Datenfarm ist unterbrochen:euhmds", "euhmds"),
        ("\u5386\u53f2\u6570\u636e\u4e2d\u5fc3\u8fde\u63a5\u4e2d\u65ad\uff1aHKHMDS\u3002", "hkhmds"),
        ("HMDS data farm connection is broken", ""),
        ("HMDS data farm connection is broken.", ""),
        ("broken since 10:30", ""),
        ("", ""),
    ],
)
def test_the_farm_is_named_behind_the_last_colon_in_any_language(text: str, farm: str) -> None:
    """Texts are localised, the name after the last colon is not."""
    assert name_farm(text) == farm


def test_what_concerns_the_whole_login_or_the_connection_is_flagged() -> None:
    """Pacing and a competing session pause all processes, a busy id means the next one, a dead socket a new connection."""
    flagged = {code for code, text, *_ in CASES if classify(code, text, now=NOON).row.pauses_login}
    assert flagged == {162, 322, 420, 100, 10197}
    assert [code for code, text, *_ in CASES if classify(code, text, now=NOON).row.next_client_id] == [326]
    assert {code for code, text, *_ in CASES if classify(code, text, now=NOON).row.reconnect} == {326, 502, 504, 1300}


def test_the_error_has_code_text_and_advice() -> None:
    """The error has what was being done, IB's code and text, and what to do; the code is an attribute too."""
    error = classify(162, SERVICE + "No market data permissions for NYSE STK", now=NOON).to_error("loading QS 1m")
    assert error.code == 162
    assert str(error).startswith(
        "loading QS 1m: the gateway answered 162 (no permission): Historical Market Data Service"
    )
    assert "Market Data Subscriptions" in error.advice
    assert str(error).endswith(error.advice)


def test_what_is_no_failure_cannot_be_raised_as_one() -> None:
    """Raising "no data" or a notice as an error is a bug of ours, and is reported as one."""
    for code, text in ((162, "query returned no data"), (2106, "fine"), (165, "")):
        assert type(classify(code, text, now=NOON + timedelta(days=1)).to_error()) is BugError
