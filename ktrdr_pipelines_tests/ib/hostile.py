"""What a broken or hostile gateway may answer, made from a seed; and an independent reading of it, to compare with.

A `Script` is the bytes sent for one request and what has to come of them. Nothing of the program is used here but the frames
that the simulator writes: the reading is by regular expressions over the bytes. Who sends and asks: `test_hostile_gateway.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from random import Random
from zoneinfo import ZoneInfo

from ktrdr_pipelines.simulator.wire import encode, frame

Row = tuple[int, float, float, float, float, float]
"""Open in epoch seconds, open, high, low, close, volume."""
CLOSE = ("close",)
Piece = bytes | tuple[str]

DAY_S = 1709251200
"""2024-03-01, a day in winter: sessions open at 14:30 UTC."""
YEAR_10000_S = 253_402_300_800
NO_DATA = "Historical Market Data Service error message:HMDS query returned no data: AAPL@SMART Trades"


@dataclass(frozen=True)
class Script:
    """``rows``: the bars that have to arrive, exactly; None: the request has to fail. ``breaks``: the connection ends."""

    kind: str
    pieces: Sequence[Piece]
    rows: list[Row] | None = None
    breaks: bool = False
    says_no_data: bool = False
    is_altered: bool = False
    """The bars are not those of a sane gateway: whether they may be stored has to be judged."""


# -- reading, independently ------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d{1,4000}", re.ASCII)
_WORDS = re.compile(r"(\d{8}) (\d\d:\d\d:\d\d) (\S+)", re.ASCII)


def read_stamp(text: str) -> int | None:
    """Epoch seconds of an intraday bar's date field, None if it is not one beyond doubt."""
    try:
        if re.fullmatch(r"\d{1,12}", text, re.ASCII) and len(text) != 8:
            datetime.fromtimestamp(int(text), UTC)
            return int(text)
        if words := _WORDS.fullmatch(text):
            text, zone = f"{words[1]} {words[2]}", ZoneInfo(words[3])
            return int(datetime.strptime(text, "%Y%m%d %H:%M:%S").replace(tzinfo=zone).timestamp())
    except (ValueError, KeyError, OSError, OverflowError):
        pass
    return None


def read_answer(payload: bytes) -> list[Row] | None:
    """The bars of a bars message, None if it cannot be read beyond doubt."""
    fields = payload.decode(errors="backslashreplace").split("\0")[:-1]
    head, rest = fields[:5], fields[5:]
    if len(head) < 5 or not re.fullmatch(r"\d{1,9}", head[4], re.ASCII):
        return None
    count = int(head[4])
    if len(rest) < 8 * count or any(rest[8 * count :]):
        return None
    rows = []
    for at in range(0, 8 * count, 8):
        stamp, numbers = read_stamp(rest[at]), rest[at + 1 : at + 7]
        if stamp is None or not all(map(_NUMBER.fullmatch, numbers)) or not _WHOLE.fullmatch(rest[at + 7]):
            return None
        rows.append((stamp, *map(float, numbers[:5])))
    return rows


# -- sane bars -------------------------------------------------------------------------------------------------------------


def make_bars(random: Random, count: int | None = None) -> list[list[str]]:
    """Fields of hourly bars of one day, in order and well-formed."""
    bars = []
    for i in range(random.randrange(1, 7) if count is None else count):
        low, high = sorted(random.randrange(100, 90_000) for _ in range(2))
        inner = [random.randint(low, high) for _ in range(2)]
        opens_s = DAY_S + (14 * 3600 + 1800 if i == 0 else (14 + i) * 3600)
        prices = [f"{cents / 100:.2f}" for cents in (inner[0], high, low, inner[1])]
        bars.append([str(opens_s), *prices, str(random.randrange(10_000)), prices[0], str(random.randrange(99))])
    return bars


def payload_of(req_id: object, bars: Sequence[Sequence[str]], count: object = None) -> bytes:
    head = [17, req_id, "20240301 09:30:00 US/Eastern", "20240301 16:00:00 US/Eastern", count]
    head[4] = len(bars) if count is None else count
    return "".join(f"{field}\0" for field in [*head, *(field for bar in bars for field in bar)]).encode()


def good(random: Random, req_id: int) -> tuple[bytes, list[Row]]:
    payload = payload_of(req_id, make_bars(random))
    rows = read_answer(payload)
    assert rows
    return frame(payload), rows


# -- evil ------------------------------------------------------------------------------------------------------------------

NUMBERS = (
    *("nan", "NaN", "-nan", "inf", "-Infinity", "1e309", "-1e309", "1e308", "1e-320", "-0", "0", "-1", "1_000", " 1.5"),
    *("1.5 ", "１.５", "٣", "1,5", "0x10", "", "-", "e", "1e", "--1", "1.2.3", "true", "None", "9" * 400, "9" * 5000),
    *("\n1.5", "1.5\t", "\x1b[2J", "\\ud800", "1.7976931348623157E308", "1٫5", "²"),
)
DATES = (
    *("20240230", "99999999", "00000000", "20240301", "", "0", "-1", "-239327400", "999999999999", "9999999999999999"),
    *("253402300800", "1709303400.5", "1.7093034E9", "20240301 09:30:00", "20240301  09:30:00", "20240301-14:30:00"),
    *("20240301 09:30:00 US/Eastern", "20240301 9:3:0 US/Eastern", "2024031 09:30:00 US/Eastern", "nan", "now"),
    *(
        "20240301 09:30:00 Mars/Base",
        "20240301 09:30:00 ../../etc/passwd",
        "20240301 09:30:00 America",
        "²",
        "1_709_303",
    ),
    *("20240301 25:00:00 UTC", "00010101 00:00:00 Asia/Tokyo", "99991231 23:59:59 Etc/GMT+12", "2024031 ", "+2024301"),
    *(
        "１７０９３０３４００",
        "1709303400 ",
        " 1709303400",
        "1709303401",
        "170930340",
        "17093034000",
        "\x00",
        "9" * 5000,
    ),
)
COUNTS = ("-1", "", "two", "1e1", "1.0", "999999999", "9" * 30, "9" * 5000, " 1", "+1", "１", "²", "0x1", "nan")
ODD_IDS = ("0", "-1", "", "abc", "9" * 30, "9" * 5000, "²", "1.0", "\\x00", " 1", "-0", "1_0")


def noise(random: Random, req_id: int) -> bytes:
    """A frame that is no answer to ``req_id``, of any kind there may be."""
    # Not the next request's id: it may be open by the time this arrives, and an unreadable answer to it rightly fails it.
    other = random.choice((*ODD_IDS, str(req_id - 1), str(req_id + 100_000), str(-req_id)))
    fields = [random.choice(NUMBERS + DATES) for _ in range(random.randrange(12))]
    return random.choice(
        (
            lambda: frame(payload_of(other, make_bars(random))),
            lambda: encode(88, other, "1709303400"),
            lambda: encode(88, req_id, "1709303400"),  # no answer to a question for bars, although of its id
            lambda: encode(10, req_id, *fields),
            lambda: encode(10, other, *fields),
            lambda: encode(random.choice((51, 52, 53, 54, 55, 57, 62, 64, 72, 74, 76)), 1, req_id, *fields),
            lambda: encode(random.choice((87, 89, 96, 97, 98, 104, 105, 106, 107, 90, 18)), req_id, *fields),
            lambda: encode(random.randrange(2000), *fields),
            lambda: encode(random.choice((5, 6, 7, 11, 14, 46, 61, 63, 101)), 1, *fields, random.random()),
            lambda: encode(4, 2, other, random.choice(NUMBERS), *fields),
            lambda: encode(4, 2, -1, random.choice((2104, 2106, 2119, 2150, 2158)), random.choice(NUMBERS), ""),
            lambda: encode(4, *fields),
            lambda: encode(9, 1, random.choice(NUMBERS)),
            lambda: encode(15, 1, random.choice(NUMBERS)),
            lambda: encode(49, 1, random.choice(NUMBERS + DATES)),
            lambda: encode(*(fields or [""])),
            lambda: frame(bytes(random.randrange(1, 40))),
            lambda: frame(b""),
            lambda: frame(b"no field is ended"),
            lambda: frame(random.randbytes(random.randrange(1, 40)).replace(b"4", b"5").replace(b"1", b"2")),
            lambda: frame(b"17"),
            lambda: frame(b"17\0"),
            lambda: encode(17, other),
        )
    )()


def cut(random: Random, data: bytes) -> list[Piece]:
    """``data`` in pieces, at times of single bytes."""
    pieces: list[Piece] = []
    while data:
        size = 1 if random.random() < 0.2 else random.randrange(1, 200)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


# -- one function a kind ---------------------------------------------------------------------------------------------------


def _unharmed(random: Random, req_id: int) -> Script:
    data, rows = good(random, req_id)
    return Script("in pieces", cut(random, data), rows)


def _amid_noise(random: Random, req_id: int) -> Script:
    data, rows = good(random, req_id)
    before, after = (b"".join(noise(random, req_id) for _ in range(random.randrange(5))) for _ in range(2))
    stream = before + data + after
    return Script("amid other messages", [stream] if random.random() < 0.6 else cut(random, stream), rows)


def _of_bars(kind: str, change: Callable[[Random, list[list[str]]], object]) -> Callable[[Random, int], Script]:
    """A kind that changes the fields of sane bars; ``change`` may return the count to announce."""

    def make(random: Random, req_id: int) -> Script:
        bars = make_bars(random)
        payload = payload_of(req_id, bars, count=change(random, bars))
        return Script(kind, [frame(payload)], read_answer(payload), is_altered=True)

    return make


def _spoil_numbers(random: Random, bars: list[list[str]]) -> None:
    for _ in range(random.randrange(1, 3)):
        random.choice(bars)[random.randrange(1, 8)] = random.choice(NUMBERS)


def _spoil_date(random: Random, bars: list[list[str]]) -> None:
    random.choice(bars)[0] = random.choice(DATES)


def _lose_field(random: Random, bars: list[list[str]]) -> None:
    bar = random.choice(bars)
    del bar[random.randrange(len(bar))]


def _add_field(random: Random, bars: list[list[str]]) -> None:
    bar = random.choice(bars)
    bar.insert(random.randrange(len(bar) + 1), random.choice((*NUMBERS[:20], bar[1])))


def _lie(random: Random, bars: list[list[str]]) -> object:
    return random.choice((*COUNTS, len(bars) + 1, len(bars) - 1, len(bars) + 1000, -len(bars)))


def _lose_bar(random: Random, bars: list[list[str]]) -> object:
    announced = len(bars)
    del bars[random.randrange(len(bars))]
    return random.choice((announced, len(bars)))


def _repeat_bar(random: Random, bars: list[list[str]]) -> object:
    announced = len(bars)
    bars.insert(random.randrange(len(bars) + 1), list(random.choice(bars)))
    if random.random() < 0.5:
        bars[-1][4] = bars[-1][3]  # one more bar of the same stamp, with another close
    return random.choice((announced, len(bars)))


def _shuffle(random: Random, bars: list[list[str]]) -> None:
    random.shuffle(bars)


def _flip(random: Random, req_id: int) -> Script:
    """Bytes changed, lost or added anywhere behind the ids."""
    payload = bytearray(payload_of(req_id, make_bars(random)))
    behind_ids = len(f"17\0{req_id}\0")
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(behind_ids, len(payload))
        match random.randrange(3):
            case 0:
                payload[at] = random.choice((0, 0xFF, 0x80, payload[at] ^ (1 << random.randrange(8))))
            case 1:
                del payload[at]
            case _:
                payload.insert(at, random.choice(b"\00123456789.-e_ \xff"))
    return Script("changed bytes", [frame(bytes(payload))], read_answer(bytes(payload)), is_altered=True)


def _twice(random: Random, req_id: int) -> Script:
    data, rows = good(random, req_id)
    again = data if random.random() < 0.5 else good(random, req_id)[0]
    # The same answer once more, another answer, or an error: the first one counts, whatever follows it.
    after = again if random.random() < 0.7 else encode(4, 2, req_id, 162, NO_DATA, "")
    return Script("answered twice", [data + after], rows)


def _error_first(random: Random, req_id: int) -> Script:
    refusal = encode(4, 2, req_id, random.choice((162, 200, 321, 354, 504, 99999)), random.choice(NUMBERS), "")
    return Script("bars after an error", [refusal + good(random, req_id)[0]])


def _warned(random: Random, req_id: int) -> Script:
    warning = encode(4, 2, req_id, random.choice((165, 2100, 2150, 2199, 10167)), random.choice(NUMBERS), "")
    data, rows = good(random, req_id)
    return Script("bars after a warning", [warning + data], rows)


def _odd_error(random: Random, req_id: int) -> Script:
    code = random.choice(("", "abc", "-1", "0", "9" * 30, "9" * 5000, "162", "200", "١٦٢", "1_62", "162.0"))
    text = random.choice((*NUMBERS, "x" * 100_000, "\\ud83d\\ude00 \\ud800", "\r\n\x1b[31mred", "\\u0000"))
    more = [random.choice(NUMBERS) for _ in range(random.randrange(4))]
    message = random.choice((encode(4, 2, req_id, code, text, *more), encode(4, 2, req_id, code), encode(4, 2, req_id)))
    return Script("odd error", [message])


def _no_data(random: Random, req_id: int) -> Script:
    after = good(random, req_id)[0] if random.random() < 0.5 else b""
    return Script("no data", [encode(4, 2, req_id, 162, NO_DATA, "") + after], [], says_no_data=True)


def _cut_short(random: Random, req_id: int) -> Script:
    data = good(random, req_id)[0]
    return Script("cut short and closed", [data[: random.randrange(len(data))], CLOSE], breaks=True)


def _bad_length(random: Random, req_id: int) -> Script:
    length = random.choice((1 << 24, (1 << 24) + 1, 1 << 31, (1 << 32) - 1, random.randrange(1 << 24, 1 << 32)))
    body = good(random, req_id)[0] * random.randrange(3)
    return Script("impossible length", [length.to_bytes(4, "big") + body], breaks=True)


def _garbage(random: Random, req_id: int) -> Script:
    return Script("garbage", [b"\xfe" + random.randbytes(random.randrange(3, 300)), CLOSE], breaks=True)


KINDS: tuple[tuple[int, Callable[[Random, int], Script]], ...] = (
    (8, _unharmed),
    (16, _amid_noise),
    (12, _of_bars("odd number", _spoil_numbers)),
    (10, _of_bars("odd date", _spoil_date)),
    (5, _of_bars("a field lost", _lose_field)),
    (5, _of_bars("a field too many", _add_field)),
    (6, _of_bars("a count that lies", _lie)),
    (4, _of_bars("a bar lost", _lose_bar)),
    (5, _of_bars("a bar repeated", _repeat_bar)),
    (3, _of_bars("out of order", _shuffle)),
    (12, _flip),
    (4, _twice),
    (3, _error_first),
    (3, _warned),
    (6, _odd_error),
    (2, _no_data),
)
"""Weight and maker of the kinds after which the connection goes on."""
BREAKING = (_cut_short, _bad_length, _garbage)
_WEIGHTS = [weight for weight, _ in KINDS]


def make_script(random: Random, req_id: int) -> Script:
    """One answer of any kind that leaves the connection whole."""
    (_, make), *_ = random.choices(KINDS, _WEIGHTS)
    return make(random, req_id)


# -- what may be stored ----------------------------------------------------------------------------------------------------


def storable(rows: Sequence[Row], start_s: int, end_s: int) -> dict[int, Row] | None:
    """The rows of a window by their opens, None if one of them is no bar, or two differ in one open. The rules are those of
    hourly bars of a stock: a stamp on the quarter hour, positive finite prices, low and high around the others, volume
    finite and not negative (-1: IB has none), no number that IB uses for "not set"."""
    kept: dict[int, Row] = {}
    for stamp, *values in rows:
        if stamp >= YEAR_10000_S:
            return None
        if not start_s <= stamp < end_s:
            continue
        o, h, lo, c, volume = (0.0 if i == 4 and value == -1 else value for i, value in enumerate(values))
        row = (stamp, o, h, lo, c, volume)
        is_bar = all(map(isfinite, row)) and 0 < lo <= min(o, c) and max(o, c) <= h and volume >= 0
        is_bar &= max(row[1:]) < 2**53 and volume != 2**31 - 1
        if not is_bar or stamp % 900 or kept.get(stamp, row) != row:
            return None
        kept[stamp] = row
    return kept
