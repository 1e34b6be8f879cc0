"""What the gateway reports as out of order at the moment: the link to IB, and each farm by its name.

Pure. What a message means: `codes.py`. Who waits because of an outage, and for how long: `history.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ktrdr_pipelines.ib.codes import Outage, Outcome


@dataclass(frozen=True, slots=True)
class Outages:
    """Every present outage. A new value for each message, so that one thread can read what another one replaces.

    IB does not name the farm that serves an instrument, so requests wait while any farm of their kind is out.
    """

    parts: frozenset[tuple[Outage, str]] = frozenset()
    """What, and the name of the farm; the name is empty for the link, and where the message named none."""

    def after(self, outcome: Outcome) -> Outages:
        """The outages once ``outcome`` arrived."""
        parts = set(self.parts)
        for outage in outcome.begins:
            parts.add((outage, "" if outage is Outage.LINK else outcome.farm))
        for outage in outcome.row.ends:
            parts -= self._ended(outage, outcome)
        return Outages(frozenset(parts))

    def _ended(self, outage: Outage, outcome: Outcome) -> set[tuple[Outage, str]]:
        of_this_kind = {part for part in self.parts if part[0] is outage}
        if outcome.row.ends_all:
            return of_this_kind
        if (outage, outcome.farm) in of_this_kind:
            return {(outage, outcome.farm)}
        # One of the two messages named its farm and the other did not. They are a pair if there is no other outage of the kind;
        # two names that differ never are.
        is_only_one = len(of_this_kind) == 1
        return {part for part in of_this_kind if is_only_one and not (part[1] and outcome.farm)}

    @property
    def kinds(self) -> frozenset[Outage]:
        """What is out, without the names."""
        return frozenset(outage for outage, _ in self.parts)

    def describe(self, needed: Collection[Outage] = frozenset(Outage)) -> str:
        """Those of ``needed`` that are out, for the user."""
        return ", ".join(sorted(f"{outage} {name}".strip() for outage, name in self.parts if outage in needed))
