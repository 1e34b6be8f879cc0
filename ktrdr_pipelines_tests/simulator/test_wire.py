"""The codec: examples byte by byte, every split point, and random bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_pipelines.simulator.wire import MAX_FRAME_BYTES, FrameDecoder, WireError, encode, frame, split_fields

EXAMPLE = b"\x00\x00\x00\x0a49\x001\x001700\x00"


def decode(data: bytes) -> list[list[str]]:
    return [split_fields(payload) for payload in FrameDecoder().feed(data)]


def test_frame_is_a_big_endian_length_and_nul_ended_fields():
    """The bytes of a known message are exactly those on the wire."""
    assert encode(49, 1, 1700) == EXAMPLE
    assert decode(EXAMPLE) == [["49", "1", "1700"]]


def test_fields_of_each_type_become_text():
    """True and False become 1 and 0, None an empty field, numbers and text themselves."""
    assert encode(True, False, None, "", 1.5, "EUR.USD") == frame(b"1\x000\x00\x00\x001.5\x00EUR.USD\x00")


def test_every_split_point_gives_the_same_messages():
    """Where the network cuts the stream does not matter."""
    stream = encode(20, 1, "AAPL") + encode(25, 1, 7) + encode(49, 1)
    for cut in range(len(stream) + 1):
        decoder = FrameDecoder()
        payloads = [*decoder.feed(stream[:cut]), *decoder.feed(stream[cut:])]
        assert [split_fields(payload) for payload in payloads] == decode(stream)
        assert decoder.pending_bytes == 0


def test_one_byte_at_a_time_gives_the_same_messages():
    """A peer may send single bytes."""
    decoder = FrameDecoder()
    stream = EXAMPLE + encode("x" * 300)
    payloads = [payload for byte in stream for payload in decoder.feed(bytes([byte]))]
    assert [split_fields(payload) for payload in payloads] == decode(stream)


def test_unfinished_frame_is_kept_and_bounded():
    """Bytes of an unfinished frame wait for the rest."""
    decoder = FrameDecoder()
    assert list(decoder.feed(EXAMPLE[:-1])) == []
    assert decoder.pending_bytes == len(EXAMPLE) - 1


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_impossible_length_breaks_the_stream(length):
    """An empty or oversized frame is refused at its length, before its bytes are stored, and so is everything after it."""
    decoder = FrameDecoder()
    with pytest.raises(WireError, match=str(length)):
        list(decoder.feed(length.to_bytes(4, "big")))
    with pytest.raises(WireError):
        list(decoder.feed(EXAMPLE))


def test_messages_before_a_broken_frame_are_still_delivered():
    """Complete messages before the damage are not lost."""
    decoder = FrameDecoder()
    seen = []
    with pytest.raises(WireError):
        seen.extend(payload for payload in decoder.feed(EXAMPLE) if payload)
        seen.extend(decoder.feed(b"\x00\x00\x00\x00"))
    assert len(seen) == 1


def test_payload_without_a_final_nul_is_refused():
    """The last field has no end."""
    with pytest.raises(WireError, match="NUL"):
        split_fields(b"49\x001")


def test_bytes_that_are_no_text_become_escapes():
    """Bytes that are not UTF-8 do not stop the decoding."""
    assert split_fields(b"49\x00\xff\xfe\x00") == ["49", "\\xff\\xfe"]


@given(st.lists(st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))))
def test_any_text_fields_survive_the_round_trip(fields):
    """What goes in comes out, for all texts without NUL (an empty list of fields is no message)."""
    if fields:
        assert decode(encode(*fields)) == [fields]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_random_bytes_never_crash_or_hang(chunks):
    """Random bytes yield payloads or `WireError`, never another exception, and no more than was sent is stored."""
    decoder = FrameDecoder(max_bytes=64)
    try:
        for chunk in chunks:
            for payload in decoder.feed(chunk):
                assert 0 < len(payload) <= 64
    except WireError:
        pass
    assert decoder.pending_bytes <= 4 + 64 + 40
