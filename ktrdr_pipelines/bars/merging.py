"""Two tables of bars as one. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ktrdr_pipelines.bars.schema import COLUMNS, bars_from_columns, opens_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Merged:
    """The union of held and new bars."""

    bars: pd.DataFrame
    added: int
    revised_from: pd.DataFrame
    """Held bars whose stamp came again with other values, as they were."""
    revised_to: pd.DataFrame
    """The same bars as they are now."""


def merge_bars(held: pd.DataFrame, new: pd.DataFrame, *, held_wins: bool = False) -> Merged:
    """Both tables' bars, sorted; where both have a stamp the new values count (the held ones with ``held_wins``).

    Nothing is ever removed: held bars that are not in ``new`` stay.
    """
    if not len(held):
        nothing = new.iloc[:0]
        return Merged(bars=new, added=len(new), revised_from=nothing, revised_to=nothing)
    held_s, new_s = opens_of(held), opens_of(new)
    held_v, new_v = held[list(COLUMNS[1:])].to_numpy(), new[list(COLUMNS[1:])].to_numpy()
    at = np.searchsorted(held_s, new_s)
    known = np.zeros(len(new_s), np.bool_)
    inside = at < len(held_s)
    known[inside] = held_s[at[inside]] == new_s[inside]
    differs = known.copy()
    differs[known] = (held_v[at[known]] != new_v[known]).any(axis=1)
    values = held_v.copy()
    if not held_wins:
        values[at[differs]] = new_v[differs]
    opens_s = np.concatenate([held_s, new_s[~known]])
    order = np.argsort(opens_s, kind="stable")
    columns = np.concatenate([values, new_v[~known]])[order].T
    return Merged(
        bars=bars_from_columns(opens_s[order], *columns),
        added=int((~known).sum()),
        revised_from=held.iloc[at[differs]].reset_index(drop=True),
        revised_to=new.iloc[np.flatnonzero(differs)].reset_index(drop=True),
    )
