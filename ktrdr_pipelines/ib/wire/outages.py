"""What the gateway says is down at the moment: the link to IB, and each farm by its name.

Pure. What a message means is `codes.py`'s; who waits because of this, and for how long, is `history.py`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ktrdr_pipelines.ib.codes import Hold, Outcome


@dataclass(frozen=True, slots=True)
class Down:
    """Everything that is down. A new value for each message, so that one thread can read what another one replaces.

    Which farm serves which instrument is not told by IB, so requests wait while any farm of their kind is down.
    """

    parts: frozenset[tuple[Hold, str]] = frozenset()
    """What, and the name of the farm; the name is empty for the link, and where the message named none."""

    def after(self, outcome: Outcome) -> Down:
        """What is down once ``outcome`` was heard."""
        parts = set(self.parts)
        for hold in outcome.holds:
            parts.add((hold, "" if hold is Hold.LINK else outcome.farm))
        for hold in outcome.releases:
            parts -= self._released(hold, outcome)
        return Down(frozenset(parts))

    def _released(self, hold: Hold, outcome: Outcome) -> set[tuple[Hold, str]]:
        of_this_kind = {part for part in self.parts if part[0] is hold}
        if outcome.releases_all:
            return of_this_kind
        if (hold, outcome.farm) in of_this_kind:
            return {(hold, outcome.farm)}
        # One of the two messages named its farm and the other did not. They are a pair if there is nothing else that is down;
        # two names that differ never are.
        is_only_one = len(of_this_kind) == 1
        return {part for part in of_this_kind if is_only_one and not (part[1] and outcome.farm)}

    @property
    def kinds(self) -> frozenset[Hold]:
        """What is down, without the names."""
        return frozenset(hold for hold, _ in self.parts)

    def describe(self, needed: Collection[Hold] = frozenset(Hold)) -> str:
        """Those of ``needed`` that are down, for people."""
        return ", ".join(sorted(f"{hold} {name}".strip() for hold, name in self.parts if hold in needed))
