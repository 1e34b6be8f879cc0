"""Clocks that are set, files that vanish, disks that fill up, at any moment: the simulator's judge, by true time, finds nothing.

What the ledger reports and does in each of these cases is in `ib/pacing/test_ledger.py` and `ib/pacing/test_ledger_files.py`.
Here a sender as hasty as the ledger allows is judged by rules that the ledger's authors did not write.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.ib.pacing.ledger import Grant, Ledger, open_ledger
from ktrdr_pipelines.ib.pacing.rules import Ask, Rule
from ktrdr_pipelines.ib.pacing.sqlite_backend import ledger_path
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import FULL_S, RULES_ONLY, HandClock, OpenHere, wish
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import LOGIN

DAMAGE = {
    "deleted": lambda path: [p.unlink() for p in path.parent.glob(path.name + "*") if not p.name.endswith(".lock")],
    "database deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is not a database\n" * 500),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed blocks": lambda path: path.write_bytes(b"".join(
        bytes(64) if i % 3 else path.read_bytes()[i * 64 : i * 64 + 64] for i in range(path.stat().st_size // 64))),
}  # fmt: skip


class HastySender:
    """Two openings of one ledger that send alternately, as soon as they may, and a judge that uses true time."""

    def __init__(self, directory: Path, clock: HandClock) -> None:
        self.directory, self.clock = directory, clock
        self.ledgers = [open_ledger(directory, LOGIN, clock) for _ in range(2)]
        self.judge = PacingJudge()
        self.sent: list[tuple[float, int]] = []
        self._until_s = 0.0
        self._twin = wish()

    def note(self, _seconds: float, _rule: Rule, until_s: float) -> None:
        self._until_s = until_s

    def sleep(self, seconds: float) -> None:
        # Longer than asked, or polls of a second would be all that these tests do; never past the time at which it may go.
        self.clock.sleep(max(seconds, min(self._until_s - self.clock.now_s(), 18.0)))

    def next_ask(self) -> Ask:
        number = len(self.sent)
        if number % 20 == 1:
            return self._twin
        return wish(f"C{number % 4}", show="BID_ASK" if number % 9 == 0 else "TRADES")

    def write(self, ask: Ask) -> None:
        """The request is on its way."""
        self.judge.judge(self.clock.true_s, ask.contract, ask.identity, ask.weight)
        self.sent.append((self.clock.true_s, ask.weight))

    def send_until(self, true_s: float) -> None:
        while True:
            ask, ledger = self.next_ask(), self.ledgers[len(self.sent) % 2]
            self._until_s = 0.0
            with ledger.acquire(ask, sleep=self.sleep, on_wait=self.note, work=RULES_ONLY) as grant:
                if self.clock.true_s >= true_s:
                    return  # handed back
                with grant.sending():
                    self.write(ask)

    def units_between(self, begin_s: float, end_s: float) -> int:
        return sum(weight for at, weight in self.sent if begin_s <= at < end_s)

    def restart(self) -> None:
        for ledger in self.ledgers:
            ledger.close()
        self.ledgers = [open_ledger(self.directory, LOGIN, self.clock) for _ in range(2)]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can be written any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def set_clock(seconds: float) -> Callable[[HastySender], None]:
    def trouble(sender: HastySender) -> None:
        sender.clock.wall_s += seconds

    return trouble


def reboot(wall_step_s: float) -> Callable[[HastySender], None]:
    def trouble(sender: HastySender) -> None:
        sender.clock.reboot(uptime_s=40, wall_step_s=wall_step_s)
        sender.restart()

    return trouble


def lose_file(damage: str, *, is_open: bool) -> Callable[[HastySender], None]:
    def trouble(sender: HastySender) -> None:
        if not is_open:
            for ledger in sender.ledgers:
                ledger.close()
        DAMAGE[damage](ledger_path(sender.directory, LOGIN))

    return trouble


def fill_disk(sender: HastySender) -> None:
    with full_disk():
        for ledger in sender.ledgers:
            for _ in range(3):
                with (
                    pytest.raises(StoreError),
                    ledger.acquire(wish(), sleep=sender.sleep, on_wait=sender.note, work=RULES_ONLY) as grant,
                ):
                    with grant.sending():
                        sender.write(grant.ask)
                    raise StoreError("sent, which only a grant that needed no disk may do")


IN_THE_RUSH, USED_UP, IN_THE_SECOND_RUSH = 4.0, 300.0, 604.0
TROUBLES: dict[str, tuple[Callable[[HastySender], None], tuple[float, ...]]] = {
    "clock an hour back": (set_clock(-3600), (IN_THE_RUSH, USED_UP, IN_THE_SECOND_RUSH)),
    "clock two hours forward": (set_clock(7200), (IN_THE_RUSH, USED_UP, IN_THE_SECOND_RUSH)),
    "reboot": (reboot(40), (IN_THE_RUSH, USED_UP)),
    "reboot, clock an hour back": (reboot(-3600), (IN_THE_RUSH, USED_UP)),
    "reboot, clock two hours forward": (reboot(7200), (IN_THE_RUSH, USED_UP)),
    "full disk": (fill_disk, (IN_THE_RUSH, USED_UP, IN_THE_SECOND_RUSH)),
    **{f"{name}, in use": (lose_file(name, is_open=True), (IN_THE_RUSH,)) for name in DAMAGE},
    **{f"{name}, between uses": (lose_file(name, is_open=False), (USED_UP,)) for name in DAMAGE},
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: each request waits for the disk three times, and here only decisions matter."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "moment_s"), [(name, moment_s) for name, (_, moments) in TROUBLES.items() for moment_s in moments]
)
def test_the_judge_finds_nothing_and_the_budget_comes_back(directory: Path, trouble: str, moment_s: float) -> None:
    """Never faster than allowed, before, during and after; and not slower for longer than ten minutes and the wait for them."""
    sender = HastySender(directory, HandClock())
    sender.send_until(moment_s)
    TROUBLES[trouble][0](sender)
    happened_s = sender.clock.true_s
    sender.send_until(happened_s + 2 * FULL_S + 1)
    assert sender.judge.violations == []
    assert sender.units_between(moment_s - FULL_S, moment_s) > 20, "the trouble came before anything was sent"
    recovered_s = happened_s + FULL_S + 1
    assert sender.units_between(recovered_s, recovered_s + FULL_S) >= 58
    for ledger in sender.ledgers:
        ledger.close()


@pytest.mark.slow
def test_without_a_boot_clock_setting_the_clock_back_breaks_no_rule(directory: Path) -> None:
    """Where only the wall clock exists, an hour back costs ten minutes and no rule."""
    sender = HastySender(directory, HandClock(boot_id=""))
    sender.send_until(300)
    set_clock(-3600)(sender)
    sender.send_until(300 + 2 * FULL_S + 1)
    assert sender.judge.violations == []
    assert sender.units_between(301 + FULL_S, 301 + 2 * FULL_S) >= 58
    for ledger in sender.ledgers:
        ledger.close()


def test_a_disk_that_fills_up_in_the_middle_of_a_write_counts_the_request(
    open_here: OpenHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is on its way and its answer awaited; the grant counts it, and the log has a warning."""
    clock = HandClock()
    ledger: Ledger = open_here(tmp_path, LOGIN, clock)
    grant = ledger.try_acquire(wish("A", "x"), work=RULES_ONLY)
    assert isinstance(grant, Grant)
    with grant:
        with grant.sending():
            disk = full_disk()
            disk.__enter__()
        disk.__exit__(None, None, None)
    assert "could not record that a request was sent" in caplog.text
    clock.sleep(10)
    assert not isinstance(ledger.try_acquire(wish("A", "x"), work=RULES_ONLY), Grant)
    assert ledger.snapshot().used == 1


def test_a_ledger_replaced_in_the_middle_of_a_write_counts_the_request(open_here: OpenHere, tmp_path: Path) -> None:
    """The new file, which pauses all processes for ten minutes, has the one request that went out after it was made."""
    clock = HandClock()
    ledger, other = (open_here(tmp_path, LOGIN, clock) for _ in range(2))
    with ledger.acquire(wish(), work=RULES_ONLY) as grant, grant.sending():
        DAMAGE["deleted"](ledger_path(tmp_path, LOGIN))
        assert other.snapshot().used == 0
        clock.sleep(9)
    clock.sleep(FULL_S - 5)
    assert other.snapshot().used == 1
    for each in (ledger, other):
        each.close()
