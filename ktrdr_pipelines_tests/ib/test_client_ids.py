"""Client ids: never the same for two processes, free as soon as the owner is gone, whatever way it went."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ktrdr_pipelines.errors import StoreError, TransientError
from ktrdr_pipelines.ib.client_ids import ClientIds, LeasedId, in_use, lease_client_id
from ktrdr_pipelines.ib.processes import Owner, current_owner

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, pathlib
from ktrdr_pipelines.ib.client_ids import ClientIds, lease_client_id
leases = [lease_client_id(ClientIds.PERSON, pathlib.Path(sys.argv[1])) for _ in range(int(sys.argv[2]))]
print(*(lease.client_id for lease in leases), flush=True)
sys.stdin.read()
"""


def hold_ids(directory: Path, count: int) -> subprocess.Popen[bytes]:
    """A process that leases ``count`` ids, prints them, and keeps them until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), str(count)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_ranges_are_those_of_the_design() -> None:
    """People get 1 to 50, what runs by itself 200 to 299, both ends included."""
    assert (ClientIds.PERSON.ids[0], ClientIds.PERSON.ids[-1]) == (1, 50)
    assert (ClientIds.DAEMON.ids[0], ClientIds.DAEMON.ids[-1]) == (200, 299)


def test_each_lease_has_an_id_of_its_own(tmp_path: Path) -> None:
    """All of a range can be leased, each id once; one more is refused with a retry; what is released is free again."""
    leases = [lease_client_id(ClientIds.PERSON, tmp_path) for _ in range(50)]
    assert sorted(lease.client_id for lease in leases) == list(range(1, 51))
    with pytest.raises(TransientError, match="from 1 to 50 are in use"):
        lease_client_id(ClientIds.PERSON, tmp_path)
    leases[16].release()
    with lease_client_id(ClientIds.PERSON, tmp_path) as again:
        assert again.client_id == 17
    leases[16].release()
    with lease_client_id(ClientIds.DAEMON, tmp_path) as other:
        assert other.client_id == 200
    for lease in leases:
        lease.release()
    assert in_use(tmp_path) == []


def test_a_preferred_id_comes_first_if_it_is_free(tmp_path: Path) -> None:
    """The preferred id is taken even outside the range; where it is in use, or IB refused it, the range goes on in order."""
    with lease_client_id(ClientIds.PERSON, tmp_path, preferred=7) as first:
        assert first.client_id == 7
        with lease_client_id(ClientIds.PERSON, tmp_path, preferred=7) as second:
            assert second.client_id == 1
        with lease_client_id(ClientIds.PERSON, tmp_path, preferred=77) as third:
            assert third.client_id == 77
    with lease_client_id(ClientIds.PERSON, tmp_path, preferred=7, skip={7, 1, 2}) as fourth:
        assert fourth.client_id == 3


def test_gateways_do_not_share_ids(tmp_path: Path) -> None:
    """Each directory is a gateway: the same id may be in use at two of them."""
    with lease_client_id(ClientIds.PERSON, tmp_path / "a") as a, lease_client_id(ClientIds.PERSON, tmp_path / "b") as b:
        assert (a.client_id, b.client_id) == (1, 1)


def test_an_error_inside_the_block_gives_the_id_back(tmp_path: Path) -> None:
    """The id is free after the block whatever happened in it, and an id may be given back by another thread."""
    with pytest.raises(ZeroDivisionError), lease_client_id(ClientIds.PERSON, tmp_path):
        raise ZeroDivisionError
    lease = lease_client_id(ClientIds.PERSON, tmp_path)
    assert lease.client_id == 1
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join()
    with lease_client_id(ClientIds.PERSON, tmp_path) as again:
        assert again.client_id == 1


@pytest.mark.slow
def test_a_killed_process_frees_its_ids_at_once(tmp_path: Path) -> None:
    """Ids of a living process are refused and shown with its pid; after kill -9 they are leased within half a second."""
    with hold_ids(tmp_path, 2) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1 2\n"
        with lease_client_id(ClientIds.PERSON, tmp_path) as mine:
            assert mine.client_id == 3
            pids = {leased.client_id: leased.pid for leased in in_use(tmp_path)}
            assert pids[1] == pids[2] == child.pid
            assert pids[3] == current_owner().pid
        child.kill()
        began = time.monotonic()
        # Before its parent has asked for its end: a zombie has no lease.
        while in_use(tmp_path):
            assert time.monotonic() - began < 0.5
        with lease_client_id(ClientIds.PERSON, tmp_path) as freed:
            assert freed.client_id == 1
        assert time.monotonic() - began < 0.5


@pytest.mark.slow
def test_processes_that_start_together_get_different_ids(tmp_path: Path) -> None:
    """Four processes leasing ten ids each at the same time get forty different ones."""
    children = [hold_ids(tmp_path, 10) for _ in range(4)]
    ids: list[int] = []
    for child in children:
        assert child.stdout is not None
        ids += map(int, child.stdout.readline().split())
    assert len(ids) == len(set(ids)) == 40
    assert [leased.client_id for leased in in_use(tmp_path)] == sorted(ids)
    for child in children:
        child.communicate(b"", timeout=20)
    assert in_use(tmp_path) == []


def test_looking_disturbs_no_lease_and_survives_odd_files(tmp_path: Path) -> None:
    """A missing directory is empty; foreign, half-written and outlived records are neither shown nor an error."""
    assert in_use(tmp_path / "none") == []
    (tmp_path / "notes.owner").write_text("hello")
    (tmp_path / "5.owner").write_text('{"host": ')
    (tmp_path / "6.owner").write_text('["a list"]')
    (tmp_path / "8.owner").write_text('{"host": "another machine", "pid": 1, "started": "2"}')
    assert in_use(tmp_path) == []
    with lease_client_id(ClientIds.PERSON, tmp_path, preferred=5) as lease:
        (tmp_path / "5.owner").write_text("{")
        assert in_use(tmp_path) == [LeasedId(5, 0)]
        assert lease.client_id == 5


def test_an_unusable_directory_is_one_clear_error(tmp_path: Path) -> None:
    """Where no lock can be made the error names the directory and what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="leasing a client id") as caught:
        lease_client_id(ClientIds.PERSON, tmp_path / "file" / "deeper")
    assert "writable" in caught.value.advice


def test_a_process_is_known_by_more_than_its_pid() -> None:
    """This process lives; one with its pid and another start, or none, does not; of another host nothing is known."""
    me = current_owner()
    assert me.is_alive() is True
    assert Owner(me.host, me.pid, "another start").is_alive() is False
    assert Owner("another host", me.pid, me.started).is_alive() is None
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    theirs = Owner(me.host, child.pid, "")
    assert theirs.is_alive() is True
    assert Owner(me.host, child.pid, "1").is_alive() is False
    child.communicate(b"", timeout=20)
    assert theirs.is_alive() is False
