"""What the load machine wants done, and what its driver reports back. Values only.

An action names the episode (one planned request, see `episode.py`) that waits for its result; the driver carries actions out in
order and gives each result to the machine as an input for that episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from ktrdr_pipelines.bars.answer import Answer
from ktrdr_pipelines.domain.instruments import Instrument
from ktrdr_pipelines.domain.time import Window
from ktrdr_pipelines.errors import KtrdrError
from ktrdr_pipelines.loading.knowledge import HeldBars
from ktrdr_pipelines.loading.report import Event
from ktrdr_pipelines.planning.requests import Request
from ktrdr_pipelines.store.sidecar import HistoryStart, ProvenEmpty, Sidecar

if TYPE_CHECKING:
    import pandas as pd

# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Find out whether the file can be written and holds this contract, and remember what this load may leave unfinished.
    Answered with `Begun` or `Refused`."""

    unfinished_from: datetime | None
    unfinished_until: datetime | None


@dataclass(frozen=True)
class Ask:
    """Fetch ``request``. Answered with `Answered` or `Refused`. ``may_shrink``: after a time-out less is asked for instead of the
    same again."""

    episode: int
    request: Request
    may_shrink: bool = False


@dataclass(frozen=True)
class AskHead:
    """Ask for IB's head timestamp. Answered with `HeadFound` or `Refused`."""

    episode: int


@dataclass(frozen=True, eq=False)
class Claims:
    """What is known since an episode settled: IB answered ``answered`` in full, and the bars of ``absent`` do not exist. Claims
    end at ``complete_until``, before which every bar has closed."""

    answered: Window
    absent: Sequence[ProvenEmpty] = ()
    complete_until: datetime | None = None
    history_start: HistoryStart | None = None
    sparse: bool | None = None


@dataclass(frozen=True, eq=False)
class Write:
    """Write ``bars`` and, with them, ``claims``; the held bars must be on the price scale of all ``compared`` answers. ``whole``:
    the bars replace everything held. Answered with `Stored` or `Refused`."""

    episode: int
    bars: pd.DataFrame
    window: Window
    claims: Claims | None
    compared: Sequence[Answer]
    whole: bool = False


@dataclass(frozen=True)
class Remember:
    """Note in the sidecar what is still unfinished after this load. Nothing waits for it."""

    unfinished_from: datetime | None
    unfinished_until: datetime | None


@dataclass(frozen=True)
class Report:
    """Show ``event`` to the caller that follows the load."""

    event: Event


Action = Begin | Ask | AskHead | Write | Remember | Report

# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Open the episode."""


@dataclass(frozen=True)
class Begun:
    """The gateway is connected: ``instrument`` with IB's conId and time zone; its clock is ``clock_lag_s`` behind this
    machine's. ``held`` as in `Stored`."""

    instrument: Instrument
    clock_lag_s: float = 0.0
    held: HeldBars | None = None


@dataclass(frozen=True, eq=False)
class Answered:
    """IB's ``answer``, received ``at``, ``seconds`` after its request was sent (None: unknown)."""

    answer: Answer
    at: datetime
    clock_lag_s: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class HeadFound:
    """IB's head timestamp; None when IB has none. ``at``: when it was received."""

    head: datetime | None
    at: datetime


@dataclass(frozen=True, eq=False)
class Stored:
    """The bars and claims are in the files. ``sidecar`` as it is now. ``held`` is set when another program changed the file
    meanwhile: the bars as they were read again."""

    added: int
    revised: int = 0
    first_revised: datetime | None = None
    sidecar: Sidecar | None = None
    held: HeldBars | None = None


@dataclass(frozen=True)
class Refused:
    """The action failed with ``error``. ``held`` after a write: the bars as they were read again, for the disk may have refused
    the claims only; None when they cannot be read."""

    error: KtrdrError
    held: HeldBars | None = None


Input = Start | Answered | HeadFound | Stored | Refused
