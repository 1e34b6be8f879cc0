"""Another program on the same login: our ledger is within the budget, IB answers "pacing" nevertheless, and no bar is lost.

The gateway's judge counts both programs, on the clock that only our waits move; the other one asks without any manners.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ktrdr_pipelines.domain.calls import Waiting
from ktrdr_pipelines.domain.instruments import Series, stock
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, Duration
from ktrdr_pipelines.errors import PacingError
from ktrdr_pipelines.ib.client import GatewayClient
from ktrdr_pipelines.ib.history import GatewayAddress, IBHistory
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.simulator.judge import PacingJudge
from ktrdr_pipelines.simulator.server import GatewayThread
from ktrdr_pipelines_tests.fakes import TIMEOUTS
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import HandClock

SYMBOLS = ("AAPL", "MSFT", "SPY", "GOOG", "AMZN", "NVDA", "IBM", "KO")
BARS_A_DAY = 7
OTHER_CLIENT_ID = 900


class SharedLogin(HandClock):
    """Our program and the other one at one gateway, and the time they have in common."""

    def __init__(self, where: Path, gateway: GatewayThread, running: ExitStack) -> None:
        super().__init__()
        self.gateway = gateway
        self.waits: list[Waiting] = []
        self.others_due_s: list[float] = []
        """When the other program asks next, latest first."""
        address = GatewayAddress("127.0.0.1", gateway.port, state_dir=where, library=LIBRARY, **TIMEOUTS)
        self.history = running.enter_context(IBHistory(address, self.waits.append, self.sleep, clock=self))
        self.other = running.enter_context(
            GatewayClient(
                "127.0.0.1",
                gateway.port,
                OTHER_CLIENT_ID,
                connect_timeout_s=15,
                request_timeout_s=120,
                probe_timeout_s=10,
                library=LIBRARY,
            )
        )
        self.others_number = 0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        while self.others_due_s and self.others_due_s[-1] <= self.wall_s:
            self.others_due_s.pop()
            self.let_other_ask()

    def let_other_ask(self) -> None:
        """One request like no other, so that of the other program's only their number counts."""
        self.others_number += 1
        end = datetime(2022, 1, 4, 22, tzinfo=UTC) + timedelta(days=self.others_number)
        symbol = ("TSLA", "META", "NFLX", "AMD", "INTC", "JPM", "XOM", "DIA", "IWM", "QQQ", "GOOGL", "RBLX")[
            self.others_number % 12
        ]
        with suppress(PacingError):  # and asks again, as if nothing were
            self.other.historical_bars(
                stock(symbol), end=end, duration="1 D", bar_size="1 day", intraday=False, doing="elsewhere"
            )

    def fetch(self, number: int) -> int:
        """How many bars the day ``number`` of our load has; days differ by symbol and week."""
        end = datetime(2024, 3, 5, 22, tzinfo=UTC) + timedelta(weeks=number // len(SYMBOLS))
        series = Series(stock(SYMBOLS[number % len(SYMBOLS)]), TIMEFRAMES["1h"])
        return len(self.history.fetch(series, Request(Window(end - timedelta(days=1), end), end, Duration(1, "D"))))

    def refused(self) -> list[float]:
        """When one of our requests was refused for pacing."""
        return [r.time for r in self.gateway.requests if r.pacing and r.client_id != OTHER_CLIENT_ID]

    def judge_ours_alone(self) -> list[tuple[float, str]]:
        """What a judge finds who sees nothing but our requests."""
        judge = PacingJudge()
        for record in self.gateway.requests:
            if record.client_id != OTHER_CLIENT_ID:
                judge.judge(record.time, record.symbol, (record.symbol, record.end))
        return judge.violations


@pytest.fixture
def login(tmp_path: Path, start_gateway: Any) -> Iterator[SharedLogin]:
    made: list[SharedLogin] = []
    gateway = start_gateway(judge=True, clock=lambda: made[0].wall_s if made else 1_700_000_000.0)
    with ExitStack() as running:
        made.append(SharedLogin(tmp_path, gateway, running))
        yield made[0]


def load(login: SharedLogin, numbers: Iterable[int]) -> list[int]:
    """Fetch these days; the numbers of those that failed, each of them loudly."""
    failed: list[int] = []
    for number in numbers:
        try:
            assert login.fetch(number) == BARS_A_DAY
        except PacingError as error:
            assert "given up after 4 tries" in str(error)
            failed.append(number)
    return failed


@pytest.mark.slow
def test_a_busy_program_beside_ours_slows_the_load_down_and_no_bar_is_lost(login: SharedLogin) -> None:
    """The other one takes a third of the budget for half an hour: bars, or a failure that is raised, and the rest comes later."""
    login.others_due_s = [login.wall_s + 30.0 * n for n in range(60, 0, -1)]
    failed = load(login, range(130))
    refused = login.refused()
    assert refused, "the other program was never in the way"
    assert len(failed) <= 3
    assert any("pause of all processes" in wait.reason for wait in login.waits)
    login.sleep(1200)
    assert login.others_due_s == []
    assert load(login, failed) == []
    assert login.refused() == refused
    assert login.judge_ours_alone() == []


@pytest.mark.slow
def test_when_another_program_takes_everything_the_pauses_grow_until_it_has_passed(login: SharedLogin) -> None:
    """A budget used up by others for ten minutes: requests that fail raise it, later ones succeed, the rest when it is
    asked for again. The pauses grow, so that we do not add to the trouble; once alone, nothing is refused any more."""
    for _ in range(60):
        login.let_other_ask()
        login.sleep(0.5)
    failed = load(login, range(70))
    assert 0 < len(failed) <= 2, "no other program was in the way, or the pauses did not let it pass"
    refused = login.refused()
    assert [after - before for before, after in pairwise(refused)][:5] == pytest.approx([15, 30, 60, 120, 300], abs=1.5)
    assert load(login, failed) == []
    assert login.refused() == refused
    assert login.judge_ours_alone() == []
