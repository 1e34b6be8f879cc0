"""One ledger under many processes, some of them killed or stopped; and the same ledger in PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrdr_pipelines.errors import InputError, StoreError
from ktrdr_pipelines.ib.pacing.rules import Rule
from ktrdr_pipelines_tests.ib.pacing.ledger_tools import (
    FULL_S,
    RULES_ONLY,
    HandClock,
    OpenHere,
    fill,
    send,
    wait_of,
    wish,
)
from ktrdr_pipelines_tests.ib.pacing.ledger_trial import Trial
from ktrdr_pipelines_tests.ib.pacing.ledger_worker import LOGIN
from ktrdr_pipelines_tests.postgres_server import throw_away_cluster


@pytest.mark.slow
@pytest.mark.long
def test_many_processes_break_no_rule_and_use_the_budget(tmp_path: Path) -> None:
    """Eight processes, some killed and some stopped at any instant: no rule broken, all of the budget used, in order."""
    result = Trial(tmp_path, grants=900, incidents=8).run()
    assert result.violations == []
    assert (result.stopped, result.killed >= 8) == (8, True)
    assert result.is_budget_used, result.windows
    assert result.is_fair, result.overtaken


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    """A throw-away cluster that listens on a socket file only."""
    with throw_away_cluster() as socket_folder:
        yield f"postgresql+psycopg://ktrdr@/postgres?host={socket_folder}"


@pytest.mark.slow
@pytest.mark.postgres
def test_postgresql_has_the_same_budget(open_here: OpenHere, postgres_url: str) -> None:
    """In a database every opening and every thread shares one budget per login, with the server's clock."""
    ledgers = [open_here(postgres_url, LOGIN) for _ in range(4)]
    threads = [threading.Thread(target=fill, args=(ledger, 15)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wait_of(ledgers[0]).rule is Rule.WINDOW
    budget = ledgers[1].snapshot()
    assert (budget.used, budget.open) == (60, 0)
    assert abs(budget.now_s - time.time()) < 60
    another = open_here(postgres_url, "another login")
    send(another)
    assert ledgers[2].penalise("pacing") == 15.0
    assert wait_of(ledgers[3]).rule is Rule.WINDOW


@pytest.mark.slow
@pytest.mark.postgres
def test_postgresql_waits_and_clocks_are_those_of_the_file(
    open_here: OpenHere, postgres_url: str, clock: HandClock
) -> None:
    """Waiting, giving back and a clock set back behave in the database as in the file."""
    ledger = open_here(postgres_url, "clocks", clock)
    fill(ledger)
    clock.wall_s -= 3600
    began = clock.boot_s
    with ledger.acquire(wish(show="BID_ASK"), sleep=clock.sleep, work=RULES_ONLY) as grant:
        assert clock.boot_s - began == pytest.approx(FULL_S, abs=0.05)
        assert grant.waited_s == pytest.approx(FULL_S, abs=0.05)
    assert ledger.snapshot().used == 0


@pytest.mark.slow
@pytest.mark.postgres
def test_a_database_that_is_gone_grants_nothing(open_here: OpenHere, postgres_url: str) -> None:
    """No server: a clear StoreError, and no grant."""
    ledger = open_here(postgres_url.replace("host=", "host=/nowhere"), LOGIN)
    with pytest.raises(StoreError, match="pacing ledger in PostgreSQL"):
        ledger.try_acquire(wish(), work=RULES_ONLY)


@pytest.mark.parametrize("url", ["mysql://x@y/z", "postgresql+nodriver://x@y/z", "sqlite:///x.db", "nonsense://"])
def test_a_url_that_cannot_be_used_is_refused(open_here: OpenHere, url: str) -> None:
    """Anything but PostgreSQL, and a missing driver, is refused at once, with what to write instead."""
    with pytest.raises(InputError) as caught:
        open_here(url, LOGIN)
    assert "PostgreSQL" in caught.value.advice or "postgresql+psycopg" in caught.value.advice
