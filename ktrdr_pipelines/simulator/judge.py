"""Whether history requests come too fast, by the specification's rules. Pure: every call is told the time.

The loader's own ledger (`ib/pacing/rules.py`) is written by somebody else from the same rules; this one judges it.
Source: the specification, "Pacing Limits", and `docs/ib_facts.md`, 6.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

_KEPT_VIOLATIONS = 100_000


@dataclass(frozen=True)
class PacingRules:
    """``limit`` requests (by weight) in ``period_s``; none identical within ``identical_s``; fewer than ``burst`` of one
    contract, exchange and tick type within ``burst_s``. A request exactly ``identical_s`` after its twin is allowed."""

    limit: int = 60
    period_s: float = 600.0
    identical_s: float = 15.0
    burst: int = 6
    burst_s: float = 2.0


@dataclass(frozen=True)
class _Seen:
    at: float
    weight: int
    group: Hashable
    identity: Hashable


class PacingJudge:
    """Counts what it has seen, refused requests too: they have reached IB. One judge serves one login, all clients of it."""

    def __init__(self, rules: PacingRules | None = None) -> None:
        self.rules = rules or PacingRules()
        self.violations: list[tuple[float, str]] = []
        """Time and rule of each request refused."""
        self._seen: deque[_Seen] = deque()

    def judge(self, now: float, group: Hashable, identity: Hashable, weight: int = 1) -> str:
        """The rule this request breaks, in words, or an empty string. ``group`` is contract, exchange and tick type."""
        rules = self.rules
        # A clock set back must not keep old requests for ever: what lies in the future is forgotten too.
        while self._seen and not 0 <= now - self._seen[0].at < rules.period_s:
            self._seen.popleft()
        used = sum(seen.weight for seen in self._seen) + weight
        twins = [seen for seen in self._seen if seen.identity == identity and now - seen.at < rules.identical_s]
        kin = sum(seen.weight for seen in self._seen if seen.group == group and now - seen.at < rules.burst_s) + weight
        self._seen.append(_Seen(now, weight, group, identity))
        broken = ""
        if used > rules.limit:
            broken = f"{used} requests in {rules.period_s:g} s (allowed: {rules.limit})"
        elif twins:
            broken = f"identical request after {now - twins[-1].at:.3f} s (allowed: {rules.identical_s:g} s)"
        elif kin >= rules.burst:
            broken = f"{kin} requests of one contract in {rules.burst_s:g} s (allowed: fewer than {rules.burst})"
        if broken:
            self.violations.append((now, broken))
            del self.violations[:-_KEPT_VIOLATIONS]
        return broken
