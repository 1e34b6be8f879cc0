"""The ledger's file lost, damaged, on a full disk, in the hands of killed, forked and threaded users: never a free pass.

That no process gets faster by it is judged in `ib/pacing/test_ledger_judged.py`.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.ib.pacing.ledger import (
    Grant,
    Ledger,
)
from ktrdr_pipelines.ib.pacing.rules import Rule
from ktrdr_pipelines.ib.pacing.sqlite_backend import ledger_path
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import (
    RULES_ONLY,
    HandClock,
    OpenHere,
    fill,
    send,
    start_python,
    wait_of,
    wish,
)
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import LOGIN

WITH_A_LEDGER = (
    "import resource, sys, pathlib; from ktrdr_pipelines.ib.pacing.ledger import open_ledger;"
    "from ktrdr_pipelines.errors import StoreError\n"
    "from ktrdr_pipelines_tests.ib.pacing.ledger_tools import wish, fill, LOGIN, RULES_ONLY\n"
    "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN)\n"
)
ASK_THRICE = (
    "for _ in range(3):\n"
    "    try: print('granted', ledger.acquire(wish(), work=RULES_ONLY))\n"
    "    except StoreError as error: print('refused:', error)\n"
)


def assert_refused_thrice(lines: list[str]) -> None:
    assert len(lines) == 3
    assert all(line.startswith("refused: pacing ledger") for line in lines), lines


def test_a_damaged_file_is_kept_and_the_pause_explained(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """What is not a database is moved aside, byte for byte, and the wait is explained."""
    path = ledger_path(tmp_path, LOGIN)
    ledger = open_here(tmp_path, LOGIN, clock)
    fill(ledger)
    ledger.close()
    path.write_text("precious?")
    assert "damaged" in wait_of(ledger).reason
    (kept,) = tmp_path.glob("*.corrupt-*")
    assert kept.read_text() == "precious?"


def test_the_first_start_does_not_wait(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """Where no ledger ever was, and its directory neither, the whole budget is there."""
    fill(open_here(tmp_path / "a" / "b", LOGIN, clock))


def test_an_unusable_directory_is_one_clear_error(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """Where no file can be made, nothing is granted, and the error names the place and what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"pacing ledger .*no request was sent") as caught:
        open_here(tmp_path / "file" / "deeper", LOGIN, clock).try_acquire(wish(), work=RULES_ONLY)
    assert caught.value.advice
    ledger_path(tmp_path, LOGIN).mkdir()
    with pytest.raises(StoreError, match="pacing ledger"):
        open_here(tmp_path, LOGIN, clock).try_acquire(wish(), work=RULES_ONLY)


@pytest.mark.slow
def test_a_full_disk_grants_nothing(tmp_path: Path) -> None:
    """When the ledger cannot be written the answer is an error, never a grant; once there is room again all goes on."""
    code = (
        f"{WITH_A_LEDGER}fill(ledger, 10)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        f"{ASK_THRICE}"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(ledger.snapshot().used); fill(ledger, 50); print(ledger.snapshot().used)\n"
    )
    with start_python("-c", code, tmp_path) as child:
        *refusals, before, after = child.stdout.read().decode().splitlines()
    assert_refused_thrice(refusals)
    assert (before, after) == ("10", "60")


@pytest.mark.slow
def test_a_first_start_on_a_full_disk_leaves_nothing_half_made(tmp_path: Path) -> None:
    """Where not even an empty ledger fits, the answer is an error each time, and no pieces pile up."""
    code = f"{WITH_A_LEDGER}resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n{ASK_THRICE}"
    with start_python("-c", code, tmp_path) as child:
        assert_refused_thrice(child.stdout.read().decode().splitlines())
    assert [path.name for path in tmp_path.iterdir()] == [ledger_path(tmp_path, LOGIN).name + ".lock"]


@pytest.mark.slow
def test_a_process_killed_inside_a_transaction_frees_it_at_once(open_here: OpenHere, tmp_path: Path) -> None:
    """After kill -9 in the middle of a decision the next one is made within a second, and the half one is undone."""
    code = (
        "import sys, pathlib; from ktrdr_pipelines.ib.pacing.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.ib.pacing.ledger_tools import wish, LOGIN, RULES_ONLY\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN)\n"
        "def body(tx):\n"
        "    ledger._decide(tx, wish(), RULES_ONLY, None); print('inside', flush=True); sys.stdin.read()\n"
        "ledger._store.run(body)\n"
    )
    ledger = open_here(tmp_path, LOGIN)
    send(ledger)
    with start_python("-c", code, tmp_path) as child:
        assert child.stdout.readline() == b"inside\n"
        child.kill()
        began = time.monotonic()
        send(ledger)
        assert time.monotonic() - began < 1.0
        child.wait()
    assert ledger.snapshot().used == 2


@pytest.mark.slow
def test_a_forked_child_uses_a_connection_of_its_own(tmp_path: Path) -> None:
    """A fork in the middle of another thread's transaction leaves a child that can send, and both count together."""
    code = (
        "import os, sys, pathlib; from ktrdr_pipelines.ib.pacing.ledger import open_ledger;"
        "from ktrdr_pipelines_tests.ib.pacing.ledger_tools import fill, send, wait_of, LOGIN\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1]), LOGIN); fill(ledger, 30)\n"
        "mutex = ledger._store._mutex; mutex.acquire(); child = os.fork()\n"  # as if another thread had it
        "if child: mutex.release()\n"
        "fill(ledger, 15)\n"
        "if child: os.waitpid(child, 0); print(ledger.snapshot().used, wait_of(ledger).rule.name)\n"
    )
    with start_python("-c", code, tmp_path) as child:
        try:
            assert child.communicate(timeout=20)[0] == b"60 WINDOW\n"
        finally:
            child.kill()


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    """Eight threads on one object get sixty grants together and not one more."""
    grants: list[Grant] = []

    def work() -> None:
        for _ in range(10):
            answer = ledger.try_acquire(wish(), work=RULES_ONLY)
            if isinstance(answer, Grant):
                answer.sent()
                answer.finished()
                grants.append(answer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grants) == 60


def test_old_rows_do_not_pile_up(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """A ledger in use for months stays as small as ten minutes of it."""
    ledger = open_here(tmp_path, LOGIN, clock)
    for _ in range(150):
        ledger.acquire(wish(), sleep=clock.sleep, work=RULES_ONLY).sent()
        ledger.penalise("a competing session", 5)
        clock.sleep(40)
    ledger.close()
    with sqlite3.connect(ledger_path(tmp_path, LOGIN)) as raw:
        assert raw.execute("SELECT count(*) FROM ib_pacing_requests").fetchone()[0] <= 60
        assert raw.execute("SELECT count(*) FROM ib_pacing_holds").fetchone()[0] <= 60
        assert raw.execute("SELECT count(*) FROM ib_pacing_tickets").fetchone()[0] == 0
    raw.close()


@pytest.mark.parametrize(
    ("login", "name"),
    [
        ("127.0.0.1:4002", "ib_pacing_127.0.0.1_4002.db"),
        ("DU1234567", "ib_pacing_DU1234567.db"),
    ],
)
def test_each_login_has_a_file_that_people_recognise(login: str, name: str) -> None:
    """The usual logins are readable in the file name."""
    assert ledger_path(Path("x"), login) == Path("x") / name


def test_odd_logins_neither_share_a_file_nor_leave_the_directory() -> None:
    """Whatever a login is called, its file lies in the directory, bears a usable name, and is its own."""
    logins = ["a/b", "a_b", "../a", "a" * 300, "a" * 301, "ä:1", "ö:1", ""]
    paths = [ledger_path(Path("x"), login) for login in logins]
    assert len(set(paths)) == len(logins)
    assert all(path.parent == Path("x") and len(path.name) < 100 for path in paths)


OLD_TABLES = """
CREATE TABLE ib_pacing_requests (token TEXT PRIMARY KEY, login TEXT NOT NULL, wall_s DOUBLE PRECISION NOT NULL,
    boot_s DOUBLE PRECISION NOT NULL, boot_id TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
    identity TEXT NOT NULL, contract TEXT NOT NULL, weight INTEGER NOT NULL CHECK (weight > 0 AND weight < 6),
    is_sent INTEGER NOT NULL CHECK (is_sent IN (0, 1)), is_finished INTEGER NOT NULL CHECK (is_finished IN (0, 1)));
CREATE TABLE ib_pacing_tickets (token TEXT PRIMARY KEY, login TEXT NOT NULL, wall_s DOUBLE PRECISION NOT NULL,
    boot_s DOUBLE PRECISION NOT NULL, boot_id TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
    identity TEXT NOT NULL, contract TEXT NOT NULL, weight INTEGER NOT NULL CHECK (weight > 0 AND weight < 6),
    seq INTEGER NOT NULL);
CREATE TABLE ib_pacing_holds (token TEXT PRIMARY KEY, login TEXT NOT NULL, wall_s DOUBLE PRECISION NOT NULL,
    boot_s DOUBLE PRECISION NOT NULL, boot_id TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
    seconds DOUBLE PRECISION NOT NULL, is_penalty INTEGER NOT NULL CHECK (is_penalty IN (0, 1)), reason TEXT NOT NULL);
"""
OLD_INSERT = """INSERT INTO ib_pacing_requests
    (token, login, wall_s, boot_s, boot_id, host, pid, started, identity, contract, weight, is_sent, is_finished)
    VALUES (?, ?, ?, ?, ?, 'elsewhere', 1, '', ?, 'C', 1, 1, 1)"""


def write_old(raw: sqlite3.Connection, clock: HandClock, count: int, prefix: str) -> None:
    now = clock.read()
    for number in range(count):
        name = f"{prefix} {number}"
        raw.execute(OLD_INSERT, (name, LOGIN, now.wall_s, now.boot_s, now.boot_id, name))
    raw.commit()


def test_a_file_of_the_version_without_classes_is_used_on(
    open_here: OpenHere, tmp_path: Path, clock: HandClock
) -> None:
    """What it has counts, as of the middle class; a program of that version beside this one can go on writing."""
    with sqlite3.connect(ledger_path(tmp_path, LOGIN)) as raw:
        raw.executescript(OLD_TABLES)
        write_old(raw, clock, 55, "before")
        ledger = open_here(tmp_path, LOGIN, clock)
        budget = ledger.snapshot()
        assert (budget.used, [each.used for each in budget.classes]) == (55, [0, 55, 0])
        write_old(raw, clock, 4, "beside")
    raw.close()
    send(ledger)
    assert wait_of(ledger).rule is Rule.WINDOW
    ledger.close()
    assert wait_of(open_here(tmp_path, LOGIN, clock)).rule is Rule.WINDOW


def test_a_file_of_a_newer_version_is_left_alone(open_here: OpenHere, tmp_path: Path, clock: HandClock) -> None:
    """Nothing is granted and nothing is written: its rules are unknown here."""
    send(open_here(tmp_path, LOGIN, clock))
    with sqlite3.connect(ledger_path(tmp_path, LOGIN)) as raw:
        raw.execute("INSERT INTO ib_pacing_schema VALUES (99)")
        raw.commit()
        before = list(raw.iterdump())
        with pytest.raises(StoreError, match="99") as caught:
            open_here(tmp_path, LOGIN, clock).try_acquire(wish())
        assert "same version" in caught.value.advice
        assert list(raw.iterdump()) == before
    raw.close()
    assert not list(tmp_path.glob("*.corrupt-*"))
