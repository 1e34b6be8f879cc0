"""The state machine without sockets: one test per transition, one per message that is not allowed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.simulator.client_session import Session, State, Wait
from ktrdr_pipelines.simulator.gateway import Gateway
from ktrdr_pipelines.simulator.refusals import Refusal
from ktrdr_pipelines.simulator.wire import encode, frame

from .talk import AAPL, EURUSD, IBM, MARKET, NOW, FaultRule, PacingJudge, Talk, errors, head, history

NO_DATA = "Historical Market Data Service error message:HMDS query returned no data"


# --- getting ready -----------------------------------------------------------------------------------------------------


def test_handshake_answers_with_version_and_time():
    """The answer has the highest version that both sides support and the time in the gateway's zone."""
    talk = Talk(start=False)
    assert talk.handshake(176) == [["176", "20240305 14:40:30 EST"]]
    assert talk.session.state is State.START
    assert Talk(start=False).handshake(203)[0][0] == "178"
    assert Talk(start=False, server_version=150).handshake(176)[0][0] == "150"


def test_handshake_survives_every_split():
    """Prefix and version range may arrive in any pieces."""
    data = b"API\0" + frame(b"v157..176 +PACEAPI")
    for cut in range(len(data) + 1):
        talk = Talk(start=False)
        answers = talk.feed(data[:cut]) + talk.feed(data[cut:])
        assert [answer[0] for answer in answers] == ["176"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"APX\0",
        b"API\0" + frame(b"hello"),
        b"API\0" + frame(b"v..5"),
        b"API\0" + frame(b"v300..400"),
        b"API\0" + frame(b"v60..99"),
        b"API\0\xff\xff\xff\xff",
    ],
)
def test_another_protocol_is_closed(data):
    """Another protocol, or no common version, closes the connection without an answer."""
    talk = Talk(start=False)
    assert talk.feed(data) == []
    assert len(talk.closed) == 1
    assert talk.session.state is State.CLOSED
    assert talk.feed(b"anything") == []


def test_start_greets_with_account_next_id_and_farms():
    """A new client gets its account, the next order id and the notices of the farms."""
    talk = Talk()
    assert [message[0] for message in talk.greeting] == ["15", "9", "4", "4", "4"]
    assert talk.greeting[0] == ["15", "1", "SIM0000001"]
    assert errors(talk.greeting) == [(-1, 2104), (-1, 2106), (-1, 2158)]
    assert talk.session.state is State.READY


def test_nothing_is_served_before_start():
    """A request before startApi is refused and does not count as a client."""
    talk = Talk(start=False)
    talk.handshake(176)
    assert errors(talk.send(49, 1)) == [(-1, 504)]
    assert talk.gateway.client_ids == set()


def test_second_start_is_refused():
    """A client that is ready stays what it is."""
    talk = Talk()
    assert errors(talk.send(71, 2, 9, "")) == [(-1, 501)]
    assert talk.gateway.client_ids == {1}


def test_client_id_in_use_is_326_and_closed():
    """The second client of one id gets 326 and is dropped; the first stays, and its id is free after it has left."""
    first = Talk()
    second = Talk(first.gateway)
    assert errors(second.greeting) == [(-1, 326)]
    assert len(second.closed) == 1
    assert first.send(49, 1) == [["49", "1", str(int(NOW))]]
    first.session.release()
    assert len(Talk(first.gateway).greeting) == 5


def test_refused_twin_does_not_free_the_id():
    """Releasing the connection that was refused leaves the id with its owner."""
    first = Talk()
    second = Talk(first.gateway)
    second.session.release()
    assert first.gateway.client_ids == {1}


def test_thirty_third_client_is_dropped():
    """A gateway serves 32 clients."""
    gateway = Gateway(MARKET)
    talks = [Talk(gateway, client_id=i) for i in range(33)]
    assert [len(talk.closed) for talk in talks] == [0] * 32 + [1]


# --- housekeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "kinds"),
    [
        ((17, 1), ["15"]),
        ((8, 1, 1), ["9"]),
        ((5, 1), ["53"]),
        ((16, 1), ["53"]),
        ((61, 1), ["62"]),
        ((99, False), ["102"]),
        ((7, 3, 4, 0, "", "", "", "", "", ""), ["55"]),
        ((6, 2, True, "SIM0000001"), ["6", "6", "6", "8", "54"]),
        ((6, 2, False, "SIM0000001"), []),
        ((76, 1, 5, "SIM0000001", "", False), ["73", "74"]),
        ((62, 1, 6, "All", "NetLiquidation"), ["63", "64"]),
        ((80,), ["78"]),
        ((104, 3), ["107"]),
        ((14, 1, 5), []),
        ((15, 1, True), []),
        ((59, 1, 3), []),
        ((64, 1), []),
        ((90, 5), []),
    ],
)
def test_requests_of_connecting_clients_are_answered(question, kinds):
    """Every request that a client sends while connecting is answered, or needs no answer."""
    assert [message[0] for message in Talk().send(*question)] == kinds


def test_orders_and_quotes_are_refused():
    """The gateway is read-only and has no market data."""
    talk = Talk()
    assert errors(talk.send(3, 12, "order")) == [(12, 321)]
    assert errors(talk.send(1, 11, 13, *AAPL[:-1], False, "", False, False, "")) == [(13, 354)]


def test_unknown_message_is_an_error_and_the_connection_stays():
    """An unknown message id is error 320; later messages are served."""
    talk = Talk()
    assert errors(talk.send(9999, 1)) == [(-1, 320)]
    assert len(talk.send(49, 1)) == 1


@pytest.mark.parametrize("fields", [(20, 1), (20, "one", *AAPL), (9, 8, "x", *AAPL), ("history",), ("",), (87, 1, 2)])
def test_malformed_message_is_an_error_and_the_connection_stays(fields):
    """Too few fields, or text for a number, is error 320; later messages are served."""
    talk = Talk()
    assert errors(talk.send(*fields)) == [(-1, 320)]
    assert len(talk.send(49, 1)) == 1


def test_broken_framing_closes_the_connection():
    """An impossible frame length ends the connection; messages before it are answered."""
    talk = Talk()
    assert talk.feed(encode(49, 1) + b"\0\0\0\0")[0][0] == "49"
    assert len(talk.closed) == 1
    assert talk.gateway.client_ids == set()


def test_more_than_fifty_messages_a_second_is_error_100_and_then_a_close():
    """Each second with more than fifty messages is an error; the third ends the connection."""
    talk = Talk()
    codes = []
    for second in range(3):
        talk.now = NOW + 2 + 2 * second
        codes.append(errors([m for _ in range(51) for m in talk.send(49, 1)]))
    assert codes == [[(-1, 100)]] * 3
    assert len(talk.closed) == 1


def test_fifty_messages_a_second_are_allowed():
    """The limit itself is allowed, second after second."""
    talk = Talk()
    for second in range(4):
        talk.now = NOW + 2 + second * 1.01
        assert errors([m for _ in range(50) for m in talk.send(49, 1)]) == []


# --- contracts ---------------------------------------------------------------------------------------------------------


def test_contract_details_end_with_their_own_message():
    """Each match is one message, then the end message; the exchange is the one of the request."""
    talk = Talk()
    answers = talk.send(9, 8, 3, *AAPL, "", "", "")
    assert [message[0] for message in answers] == ["10", "52"]
    assert answers[0][1:4] == ["3", "AAPL", "STK"]
    assert len(talk.send(9, 8, 4, 0, "AMBG", *AAPL[2:], "", "", "")) == 3
    assert errors(talk.send(9, 8, 5, 0, "NOPE", *AAPL[2:], "", "", "")) == [(5, 200)]
    assert errors(
        talk.send(9, 8, 6, 0, "AAPL", "STK", "", 0.0, "", "", "LSE", "", "USD", "", "", False, "", "", "")
    ) == [(6, 200)]


def test_matching_symbols_are_one_message():
    """The message starts with the number of samples, also for none."""
    talk = Talk()
    assert talk.send(81, 7, "GOOG")[0][:3] == ["79", "7", "2"]
    assert talk.send(81, 8, "ZZZZ") == [["79", "8", "0"]]


# --- history -----------------------------------------------------------------------------------------------------------


def test_history_is_one_message_with_all_bars():
    """Start, end, number of bars, then eight fields a bar."""
    (answer,) = Talk().send(*history(5))
    assert answer[:5] == ["17", "5", "20240301 09:30:00 America/New_York", "20240301 16:00:00 America/New_York", "7"]
    assert len(answer) == 5 + 7 * 8
    assert answer[5] == "1709303400"


def test_formats_of_stamps():
    """Epoch seconds or the gateway's clock with its zone; dates for daily bars in both; old versions name no zone."""
    talk = Talk()
    assert talk.send(*history(1, fmt=1))[0][5] == "20240301 09:30:00 America/New_York"
    assert talk.send(*history(2, size="1 day"))[0][5] == "20240301"
    assert talk.send(*history(3, size="1 day", fmt=1))[0][5] == "20240301"
    assert Talk(version=160).send(*history(4, fmt=1))[0][5] == "20240301  09:30:00"
    assert Talk(zone="Europe/London").send(*history(5, fmt=1))[0][5] == "20240301 14:30:00 Europe/London"


def test_request_that_ends_now_returns_the_forming_bar():
    """At 14:40:30 the last hourly bar is 14:00, and a minute later it is another one."""
    talk = Talk()
    (before,) = talk.send(*history(1, end=""))
    talk.now += 60
    (after,) = talk.send(*history(2, end=""))
    assert before[-8] == after[-8] == str(int(NOW) - 40 * 60 - 30)
    assert before[-8:] != after[-8:]
    assert before[:-8][5:] == after[:-8][5:]


def test_end_without_zone_warns_and_uses_the_gateways():
    """2174 comes before the answer; the same clock time means another instant in another gateway."""
    talk = Talk()
    answers = talk.send(*history(1, end="20240301 12:00:00"))
    assert errors(answers) == [(1, 2174)]
    assert answers[-1][4] == "3"
    assert Talk(zone="UTC").send(*history(1, end="20240301 17:00:00"))[-1][4] == "3"


@pytest.mark.parametrize(
    ("request_fields", "code", "text"),
    [
        ({"contract": EURUSD, "size": "1 day"}, 162, "No historical market data for EUR/CASH@IDEALPRO Last 1d"),
        ({"end": "19900101-00:00:00"}, 162, "HMDS query returned no data: AAPL@SMART Trades"),
        (
            {"contract": EURUSD, "end": "19900101-00:00:00", "what": "MIDPOINT"},
            162,
            "no data: EUR.USD@IDEALPRO Midpoint",
        ),
        ({"size": "7 mins"}, 321, "Historical data bar size setting is invalid"),
        ({"duration": "8 H"}, 321, "Invalid duration/step"),
        ({"duration": "400 D", "size": "1 day"}, 321, "must be made in years"),
        ({"what": "VOLUME"}, 321, "what to show"),
        ({"what": "ADJUSTED_LAST"}, 321, "adjusted last"),
        ({"fmt": 3}, 321, "Date formatting selection of 3 rejected"),
        ({"end": "20240230-00:00:00"}, 10314, "End Date/Time"),
        ({"contract": (0, "ES", "CONTFUT", *AAPL[3:])}, 10339, "continuous future"),
        ({"size": "5 secs", "end": "20230601-20:00:00"}, 162, NO_DATA),
    ],
)
def test_refusals_carry_ibs_code_and_text(request_fields, code, text):
    """Every bad request is refused under its own id with IB's code and text."""
    (answer,) = Talk().send(*history(9, **request_fields))
    assert answer[:4] == ["4", "2", "9", str(code)]
    assert text in answer[4]


def test_head_timestamp_in_both_formats():
    """Epoch seconds, or UTC with a dash."""
    talk = Talk()
    assert talk.send(*head(1)) == [["88", "1", "915460200"]]
    assert talk.send(*head(2, fmt=1)) == [["88", "2", "19990104-14:30:00"]]
    assert errors(talk.send(*head(3, EURUSD))) == [(3, 162)]
    newcomer = (0, "NEWC", *AAPL[2:])
    assert errors(talk.send(*head(4, newcomer))) == [(4, 162)]


def test_schedule_lists_sessions():
    """SCHEDULE answers with sessions in the exchange's zone, half days included."""
    (answer,) = Talk().send(*history(1, end="20231124-23:00:00", size="1 day", duration="2 D", what="SCHEDULE"))
    assert answer[:2] == ["106", "1"]
    assert answer[4:6] == ["America/New_York", "2"]
    assert answer[6:] == [
        "20231122-09:30:00", "20231122-16:00:00", "20231122",
        "20231124-09:30:00", "20231124-13:00:00", "20231124",
    ]  # fmt: skip


def test_pacing_is_judged_over_all_clients():
    """Two clients of one gateway share the budget, and the log names the broken rule."""
    one = Talk(judge=PacingJudge())
    two = Talk(one.gateway, client_id=2)
    assert errors(one.send(*history(1))) == []
    (answer,) = two.send(*history(1))
    assert answer[3:5] == [
        "162",
        "Historical Market Data Service error message:Historical data request pacing violation",
    ]
    first, second = (record.pacing for record in one.gateway.requests)
    assert first == ""
    assert "identical" in second


def test_malformed_requests_do_not_reach_the_judge():
    """Requests that the gateway refuses itself are not counted."""
    talk = Talk(judge=PacingJudge())
    talk.send(*history(1, duration="8 H"))
    talk.send(*history(2, duration="8 H"))
    assert talk.gateway.judge.violations == []


def test_head_timestamps_count_as_requests():
    """Six requests of any kind in two seconds are too many."""
    talk = Talk(judge=PacingJudge())
    answers = [m for i in range(5) for m in talk.send(*history(i, end=f"2024030{i + 1}-21:00:00"))]
    assert errors(answers) == []
    assert errors(talk.send(*head(9))) == [(9, 162)]


# --- delivery and cancel -----------------------------------------------------------------------------------------------


def test_delayed_answer_comes_when_its_wait_is_over():
    """With latency the session returns a `Wait`, and answers when it is over."""
    talk = Talk(latency_s=0.5)
    assert talk.send(*history(1)) == []
    assert [action.delay_s for action in talk.seen if isinstance(action, Wait)] == [0.5]
    assert [message[0] for message in talk.wake()] == ["17"]
    assert talk.gateway.open_requests == 0


def test_answers_may_overtake_each_other():
    """A later request whose answer is ready first is answered first."""
    talk = Talk(faults=[FaultRule("slow", symbol="AAPL", seconds=2.0)])
    assert talk.send(*history(1)) == []
    assert [m[:2] for m in talk.send(*history(2, IBM))] == [["17", "2"]]
    assert [m[:2] for m in talk.wake()] == [["17", "1"]]


def test_cancel_ends_an_open_request():
    """162 with IB's text; the answer is not sent; a second cancel is 366."""
    talk = Talk(latency_s=1.0)
    talk.send(*history(4))
    (answer,) = talk.send(25, 1, 4)
    assert answer[2:5] == [
        "4",
        "162",
        "Historical Market Data Service error message:API historical data query cancelled: 4",
    ]
    assert talk.wake() == []
    assert errors(talk.send(25, 1, 4)) == [(4, 366)]
    assert [r.kind for r in talk.gateway.requests] == ["history", "cancel"]


def test_request_id_in_use_is_refused():
    """A second request under an open id is error 102; the first goes on."""
    talk = Talk(latency_s=1.0)
    talk.send(*history(4))
    assert errors(talk.send(*history(4, IBM))) == [(4, 102)]
    assert [m[:2] for m in talk.wake()] == [["17", "4"]]


def test_keep_up_to_date_stays_open_until_cancelled():
    """The bars are sent at once; updates are not simulated; a cancel ends the subscription like any other query."""
    talk = Talk()
    assert [m[0] for m in talk.send(*history(1, end="", keep=True))] == ["17"]
    assert talk.gateway.open_requests == 1
    assert errors(talk.send(25, 1, 1)) == [(1, 162)]
    assert talk.gateway.open_requests == 0


def test_fifty_open_requests_are_the_most():
    """The fifty-first is refused with IB's code while the others are open."""
    talk = Talk(faults=[FaultRule("silent", times=50)])
    for i in range(50):
        talk.now += 0.1
        assert talk.send(*history(i)) == []
    talk.now += 0.1
    (answer,) = Talk(talk.gateway, client_id=2).send(*history(99))
    assert answer[3] == "322"
    talk.session.release()
    assert talk.gateway.open_requests == 0


def test_wake_after_the_close_does_nothing():
    """A timer that fires after the connection is gone has no effect."""
    talk = Talk(latency_s=1.0)
    talk.send(*history(1))
    talk.session.release()
    assert talk.wake() == []


def test_broadcast_reaches_ready_clients_only():
    """A notice without a request goes only to clients that are READY."""
    talk = Talk()
    assert errors(talk.read(talk.session.broadcast(Refusal(1100, "lost")))) == [(-1, 1100)]
    assert Talk(start=False).session.broadcast(Refusal(1100, "lost")) == []


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.lists(st.one_of(st.integers(-5, 120), st.text(max_size=8)), max_size=20).map(
                lambda fields: encode(*fields)
            ),
            st.tuples(st.sampled_from([9, 20, 25, 71, 81, 87]), st.lists(st.text(max_size=5), max_size=25)).map(
                lambda pair: encode(pair[0], *pair[1])
            ),
        ),
        max_size=8,
    )
)
def test_no_client_can_crash_a_session(messages):
    """Any bytes after the handshake are answered, refused or close the connection; never an exception."""
    talk = Talk(start=False)
    talk.handshake(176)
    talk.send(71, 2, 1, "")
    for message in messages:
        talk.session.receive(message, NOW)
    talk.session.release()
    assert talk.gateway.open_requests == 0
    assert talk.gateway.client_ids == set()


@given(st.binary(max_size=60))
def test_no_first_bytes_can_crash_a_session(data):
    """Random first bytes never raise."""
    session = Session(Gateway(MARKET))
    session.receive(data, NOW)
    assert session.state in (State.PREFIX, State.VERSIONS, State.CLOSED, State.START)
