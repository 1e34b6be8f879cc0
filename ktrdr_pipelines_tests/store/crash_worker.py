"""A process in which store writers are killed for real; started by `store/test_store_crash.py`, prints what it saw as JSON.

``kills PLACE DIR SEED COUNT`` forks writers and kills each with SIGKILL after a random time. ``calls PLACE DIR`` kills a writer
right before, in the middle of, and right after each call that reaches the disk. ``together DIR`` lets two writers work on one
series at once. PLACE is where the new bars belong: in the ``middle`` of the file (spliced), or at its ``end`` (appended).

At the end, an interrupted write may leave complete rows of its answer and the beginning of one more; sidecars have journals.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ktrdr_pipelines.bars.schema import bars_from_columns, opens_of
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import parse_timeframe
from ktrdr_pipelines.store import sidecar_cache
from ktrdr_pipelines.store.atomic import Disk
from ktrdr_pipelines.store.csv_format import HEADER, render_rows
from ktrdr_pipelines.store.store import Store

SERIES = Series(stock("AAPL"), parse_timeframe("1m"))
NOW = datetime(2025, 1, 1, tzinfo=UTC)
T0 = 1_704_205_800
BASE_ROWS = 2_500
"""Held before and after the place where the writers work: head and tail take a while to copy."""
STEP = 7


def make_bars(first: int, after: int) -> pd.DataFrame:
    minutes = np.arange(first, after)
    price = 100.0 + minutes / 8
    return bars_from_columns(T0 + 60 * minutes, price, price + 0.5, price - 0.25, price, minutes % 1000)


def window_of(first: int, after: int) -> Window:
    return Window.from_epoch(T0 + 60 * first, T0 + 60 * after)


def write_step(store: Store, step: int) -> None:
    """The ``step``-th answer: ten bars, three of which the next one brings again."""
    first, after = BASE_ROWS + STEP * step, BASE_ROWS + STEP * step + 10
    store.write(SERIES, make_bars(first, after), answered=window_of(first, after), source="simulator", now=NOW)


def base_bars(place: str) -> pd.DataFrame:
    return pd.concat([make_bars(0, BASE_ROWS), tail_bars(place)], ignore_index=True)


def tail_bars(place: str) -> pd.DataFrame:
    return make_bars(100_000, 100_000 + (BASE_ROWS if place == "middle" else 0))


@lru_cache(maxsize=8)
def expected_bytes(place: str, steps: int) -> bytes:
    """The CSV after ``steps`` answers."""
    parts = [make_bars(0, BASE_ROWS)]
    if steps:
        parts.append(make_bars(BASE_ROWS, BASE_ROWS + STEP * (steps - 1) + 10))
    parts.append(tail_bars(place))
    return HEADER + render_rows(pd.concat(parts, ignore_index=True))


def count_answers(place: str, data: bytes, done: int) -> int:
    """How many answers the CSV has, which are ``done`` or one more; -1 if it is neither."""
    old, new = expected_bytes(place, done), expected_bytes(place, done + 1)
    if data in (old, new):
        return done + (data == new)
    is_growing = place == "end" and data.startswith(old) and new.startswith(data)
    return done if is_growing else -1


_claimed: list[Window] = []
"""What the sidecar claimed after the crash before. An append never withdraws a claim, however it ends."""


def judge(directory: Path, place: str, done: int) -> tuple[int, str]:
    """How many answers the files hold after a crash, and what is wrong ("" when nothing is)."""
    data = (directory / "AAPL_1m.csv").read_bytes()
    steps = count_answers(place, data, done)
    if steps < 0:
        return done, f"after {done} finished answers the CSV is neither the old one nor the new one"
    store = Store(directory)
    held = store.held_opens(SERIES).tolist()
    if len(held) != (rows := data.count(b"\n") - 1):
        return steps, f"a reader finds {len(held)} bars in {rows} complete rows"
    sidecar = store.read_sidecar(SERIES)
    for window in sidecar.answered_windows:
        if not set(held).issuperset(range(window.start_s, window.end_s, 60)):
            return steps, f"the sidecar claims {window}, which is not held"
    for window in _claimed:
        if place == "end" and not any(now.covers(window) for now in sidecar.answered_windows):
            return steps, f"the sidecar no longer claims {window}"
    _claimed[:] = sidecar.answered_windows
    if json.loads((directory / "AAPL_1m.meta.json").read_text())["version"] != 1:
        return steps, "the sidecar is not whole"
    return steps, ""


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work`` in a child; its pid and the pipe on which it reports finished answers."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    code = 1
    try:
        work(writer)
        code = 0
    finally:
        os._exit(code)


def drain(reader: int) -> int:
    reports = b""
    while part := os.read(reader, 65536):
        reports += part
    os.close(reader)
    return len(reports)


def run_kills(place: str, directory: Path, seed: int, count: int) -> dict[str, Any]:
    chance = random.Random(seed)
    Store(directory).write(SERIES, base_bars(place), answered=None, source="simulator", now=NOW)
    began = time.monotonic()
    write_step(Store(directory), 0)
    tempo_s = time.monotonic() - began  # of this machine, as busy as it is
    done, mid_write, failures = 1, 0, []
    for _ in range(count):

        def work(pipe: int, start: int = done) -> None:
            store = Store(directory)
            os.write(pipe, b"!")
            for step in range(start, start + 1000):
                write_step(store, step)
                os.write(pipe, b".")

        pid, reader = fork(work)
        assert os.read(reader, 1) == b"!"
        ended = select.select([], [], [], chance.random() * 4 * tempo_s)  # the wait before the blow
        assert ended == ([], [], [])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        finished = done + drain(reader)
        has_leftover = any(path.name.endswith(".new") for path in directory.iterdir())
        size = (directory / "AAPL_1m.csv").stat().st_size
        has_leftover |= size not in (len(expected_bytes(place, finished)), len(expected_bytes(place, finished + 1)))
        done, problem = judge(directory, place, finished)
        mid_write += has_leftover or done > finished
        if problem:
            failures.append(problem)
    write_step(Store(directory), done)
    done, problem = judge(directory, place, done + 1)
    leftovers = [path.name for path in directory.iterdir() if path.name.endswith(".new")]
    return {"kills": count, "answers": done, "mid_write": mid_write, "failures": failures + [problem] * bool(problem),
            "leftovers": leftovers, "problems": [str(p) for p in Store(directory).verify(SERIES)]}  # fmt: skip


class DeadlyDisk(Disk):
    """Kills its process at the n-th call: before it, in the middle (of a write or a copy), or after it."""

    def __init__(self, number: int, moment: str) -> None:
        self.number, self.moment = number, moment

    def _strike(self, moment: str) -> None:
        if moment == self.moment and self.number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _call(self, real: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        self.number -= 1
        self._strike("before")
        if half is not None and self.moment == "middle" and self.number == 0:
            half()
            self._strike("middle")
        result = real()
        self._strike("after")
        return result

    def create(self, path: Path, mode: int) -> int:
        return int(self._call(lambda: Disk.create(self, path, mode)))

    def open(self, path: Path) -> int:
        return int(self._call(lambda: Disk.open(self, path)))

    def truncate(self, fd: int, size: int) -> None:
        self._call(lambda: Disk.truncate(self, fd, size))

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return int(self._call(lambda: Disk.write(self, fd, data), lambda: Disk.write(self, fd, data[: len(data) // 2])))

    def copy(self, target: int, source: int, offset: int, count: int) -> int:
        return int(
            self._call(
                lambda: Disk.copy(self, target, source, offset, count),
                lambda: Disk.copy(self, target, source, offset, count // 2),
            )
        )

    def sync(self, fd: int) -> None:
        self._call(lambda: Disk.sync(self, fd))

    def close(self, fd: int) -> None:
        self._call(lambda: Disk.close(self, fd))

    def replace(self, source: Path, target: Path) -> None:
        self._call(lambda: Disk.replace(self, source, target))

    def remove(self, path: Path) -> None:
        self._call(lambda: Disk.remove(self, path))

    def sync_directory(self, path: Path) -> None:
        self._call(lambda: Disk.sync_directory(self, path))


def run_calls(place: str, directory: Path) -> dict[str, Any]:
    Store(directory).write(SERIES, base_bars(place), answered=None, source="simulator", now=NOW)
    write_step(Store(directory), 0)
    done, deaths, failures, outcomes = 1, 0, [], []
    for moment in ("before", "middle", "after"):
        for number in range(1, 100):

            def work(_: int, number: int = number, moment: str = moment, step: int = done) -> None:
                write_step(Store(directory, disk=DeadlyDisk(number, moment)), step)

            pid, reader = fork(work)
            died = os.waitpid(pid, 0)[1] == signal.SIGKILL
            drain(reader)
            before = done
            done, problem = judge(directory, place, done)
            if problem:
                failures.append(f"{moment} call {number}: {problem}")
            if died:
                deaths += 1
                outcomes.append(done - before)
            elif moment != "middle" or number > 24:
                break
    return {"deaths": deaths, "old": outcomes.count(0), "new": outcomes.count(1), "failures": failures,
            "problems": [str(p) for p in Store(directory).verify(SERIES)]}  # fmt: skip


def run_together(directory: Path) -> dict[str, Any]:
    def work(part: int) -> Callable[[int], None]:
        def write(_: int) -> None:
            store = Store(directory)
            for i in range(30):
                first = 20 * i + 10 * part
                store.write(
                    SERIES,
                    make_bars(first, first + 12),
                    answered=window_of(first, first + 12),
                    source="simulator",
                    now=NOW,
                )

        return write

    children = [fork(work(part)) for part in (0, 1)]
    codes = [os.waitpid(pid, 0)[1] for pid, _ in children]
    store = Store(directory)
    return {
        "codes": codes,
        "whole": bool(np.array_equal(store.held_opens(SERIES), opens_of(make_bars(0, 602)))),
        "answered": [str(w) for w in store.read_sidecar(SERIES).answered_windows],
        "problems": [str(p) for p in store.verify(SERIES)],
    }


if __name__ == "__main__":
    sidecar_cache.SMALL_BYTES = 0
    mode, *rest = sys.argv[1:]
    if mode == "kills":
        result = run_kills(rest[0], Path(rest[1]), int(rest[2]), int(rest[3]))
    elif mode == "calls":
        result = run_calls(rest[0], Path(rest[1]))
    else:
        result = run_together(Path(rest[0]))
    print(json.dumps(result))
