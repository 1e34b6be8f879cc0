"""The journal of a sidecar: what it records comes back, whatever is cut off, and it never reaches another sidecar."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrdr_pipelines.domain.instruments import stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.store.journal import apply_journal, name_base, render_change
from ktrdr_pipelines.store.sidecar import (
    Evidence,
    FileMark,
    HistoryStart,
    PartitionMark,
    Pinned,
    ProvenEmpty,
    Sidecar,
    Span,
    parse_sidecar,
    render_sidecar,
)


def instant(minute: int) -> datetime:
    return datetime.fromtimestamp(1_704_205_800 + 60 * minute, UTC)


def absence(minute: int, asked: int) -> ProvenEmpty:
    evidence = Evidence(asked_at=instant(asked), duration="1 D", end=instant(minute + 5), code=162, text="no data")
    return ProvenEmpty(start=instant(minute), end=instant(minute + 3), opens=3, evidence=(evidence,))


STARTS = st.lists(st.integers(0, 40), max_size=6, unique=True).map(sorted)
SIDECARS = st.builds(
    Sidecar,
    series=st.sampled_from(["", "AAPL 1m"]),
    updated_at=st.none() | st.integers(0, 9).map(instant),
    instrument=st.sampled_from([None, Pinned.of(stock("AAPL")), Pinned.of(stock("AAPL"), "lots")]),
    source=st.sampled_from([None, "paper", "live"]),
    history_start=st.none() | st.builds(HistoryStart, open=st.just(instant(3)), known_by=st.just("head timestamp")),
    sparse=st.booleans(),
    answered=STARTS.map(lambda starts: tuple(Span(start=instant(3 * s), end=instant(3 * s + 2)) for s in starts)),
    proven_empty=st.builds(
        lambda starts, asked: tuple(absence(4 * s, asked) for s in starts), STARTS, st.integers(0, 2)
    ),
    unfinished_from=st.none() | st.integers(0, 9).map(instant),
    file=st.none() | st.builds(FileMark, size=st.integers(1, 99), mtime_ns=st.integers(1, 99)),
    partitions=st.dictionaries(
        st.sampled_from("abcdefgh"), st.builds(PartitionMark, rows=st.integers(1, 3), crc32=st.just("0a")), max_size=5
    ),
)


def journal_of(states: list[Sidecar]) -> tuple[bytes, list[bytes]]:
    """The base, and the lines of a journal that goes through ``states``."""
    base = render_sidecar(states[0])
    changes = [render_change(before, after) for before, after in pairwise(states)]
    return base, [name_base(base), *changes]


@settings(max_examples=100, deadline=None)
@given(states=st.lists(SIDECARS, min_size=1, max_size=6), cut=st.integers(0, 400))
def test_a_journal_leads_through_all_states_and_a_cut_one_to_an_earlier_state(states: list[Sidecar], cut: int) -> None:
    """Whole, it ends at the last state; cut anywhere, at the state of its last complete line."""
    base, lines = journal_of(states)
    start = parse_sidecar(base.decode(), "x")
    found = apply_journal(start, base, b"".join(lines))
    assert (found.sidecar, found.size) == (states[-1], sum(map(len, lines)))
    kept = b"".join(lines)[: -cut or None]
    whole = sum(len(b"".join(lines[: n + 1])) <= len(kept) for n in range(len(lines)))
    found = apply_journal(start, base, kept)
    assert found.sidecar == states[max(0, whole - 1)]
    assert found.size == len(b"".join(lines[:whole]))


@pytest.mark.parametrize("line", [0, 1, 2])
def test_nothing_counts_from_a_damaged_line_on(line: int) -> None:
    """A byte that a crash of the machine left wrong: the states before it count."""
    states = [Sidecar(), Sidecar(sparse=True), Sidecar(sparse=True, source="live")]
    base, lines = journal_of(states)
    lines[line] = lines[line].replace(b"true", b"null").replace(b'"live"', b'"fake"').replace(b'"size"', b'"\0ize"')
    assert apply_journal(states[0], base, b"".join(lines)).sidecar == states[max(0, line - 1)]


def test_a_journal_beside_another_sidecar_means_nothing() -> None:
    """As when a crash comes between the new sidecar and the removal of the old journal."""
    base, lines = journal_of([Sidecar(), Sidecar(sparse=True)])
    other = Sidecar(series="MSFT 1m")
    found = apply_journal(other, render_sidecar(other), b"".join(lines))
    assert (found.sidecar, found.size) == (other, 0)
    assert base != render_sidecar(other)


def test_a_line_grows_with_the_change_only() -> None:
    """Five thousand partitions and windows, one of each changed: the line has these."""
    marks = {f"{n:05d}": PartitionMark(rows=1, crc32="00000000") for n in range(5000)}
    spans = tuple(Span(start=instant(3 * n), end=instant(3 * n + 1)) for n in range(5000))
    before = Sidecar(partitions=marks, answered=spans)
    last = Span(start=spans[-1].start, end=instant(99_999))
    changed = {**marks, "04999": PartitionMark(rows=2, crc32="00000001")}
    after = before.model_copy(update={"partitions": changed, "answered": (*spans[:-1], last)})
    assert len(render_change(before, after)) < 500
    assert last.window == Window(spans[-1].start, instant(99_999))
