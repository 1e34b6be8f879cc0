"""Classes of work: which history requests go first when the pacing budget is scarce."""

from __future__ import annotations

from enum import StrEnum


class WorkClass(StrEnum):
    """What a history request is for: the work itself decides, not the entry point that started it.

    ``TAIL``: the end of a series, a few bars that are due now. ``INTERACTIVE``: a user's question, or a load of a few requests.
    ``BACKFILL``: everything longer. Members are in the order in which they are served, highest first.
    """

    TAIL = "tail"
    INTERACTIVE = "interactive"
    BACKFILL = "backfill"

    @property
    def rank(self) -> int:
        """Place in the order of service: 0 is served first."""
        return list(WorkClass).index(self)

    def is_above(self, other: WorkClass) -> bool:
        """Whether this class is served before ``other``."""
        return self.rank < other.rank
