"""The lines that benchmarks print and `run.py` collects: a figure beside its rival or limit, and a point of a growth curve.

``row: WHAT; measured 19.2 s; against 12.0 s (the rules' bound); reach at most 22 s``
``point: write; 10000 rows; 0.12 s``

``against`` and ``reach`` may be missing. A reach in ``times`` or ``%`` is that of measured to against, any other one is in the
unit of the measured value. Every other line that a benchmark prints is kept as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RATIOS = {"times": 1.0, "%": 100.0}
"""Units of a ratio, and what 1 is in them."""
_AMOUNT = re.compile(r"(-?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s*([^(]*?)\s*(?:\((.*)\))?$")


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with its unit; ``name`` says of what."""

    value: float
    unit: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Amount:
        """``12.0 s (the rules' bound)``.

        Raises:
            ValueError: there is no number.
        """
        found = _AMOUNT.match(text.strip())
        if found is None:
            raise ValueError(f"{text!r} is no number with a unit")
        return cls(float(found[1].replace(",", "")), found[2] or "times", found[3] or "")

    def __str__(self) -> str:
        shown = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.3g}"
        return f"{shown} {self.unit}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``at_least``: the reach is a lower limit."""

    what: str
    measured: Amount
    against: Amount | None = None
    reach: Amount | None = None
    at_least: bool = False

    @classmethod
    def parse(cls, line: str) -> Row | None:
        """The row of a printed line; None for any other line."""
        if not line.startswith("row: "):
            return None
        what, *parts = line[5:].rstrip().split("; ")
        fields = {key: text for key, _, text in (part.partition(" ") for part in parts)}
        reach = fields.get("reach", "")
        number = re.sub(r"^at (most|least) ", "", reach)
        return cls(
            what,
            Amount.parse(fields["measured"]),
            Amount.parse(fields["against"]) if "against" in fields else None,
            Amount.parse(number) if reach else None,
            reach.startswith("at least"),
        )

    def __str__(self) -> str:
        line = f"row: {self.what}; measured {self.measured}"
        line += f"; against {self.against}" if self.against else ""
        return line + (f"; reach at {'least' if self.at_least else 'most'} {self.reach}" if self.reach else "")

    @property
    def ratio(self) -> float | None:
        """Measured divided by the rival's; None without a rival, or where it is 0."""
        if self.measured.unit in RATIOS and self.against is None:
            return self.measured.value / RATIOS[self.measured.unit]
        return self.measured.value / self.against.value if self.against and self.against.value else None

    @property
    def is_reached(self) -> bool | None:
        """None where nothing is to be reached."""
        if self.reach is None:
            return None
        value: float | None = self.measured.value
        if self.reach.unit in RATIOS:
            value = None if self.ratio is None else self.ratio * RATIOS[self.reach.unit]
        if value is None:
            return None
        return value >= self.reach.value if self.at_least else value <= self.reach.value


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a growth curve."""

    curve: str
    size: Amount
    cost: Amount

    @classmethod
    def parse(cls, line: str) -> Point | None:
        """The point of a printed line; None for any other line."""
        if not line.startswith("point: "):
            return None
        curve, size, cost = line[7:].rstrip().split("; ")
        return cls(curve, Amount.parse(size), Amount.parse(cost))

    def __str__(self) -> str:
        return f"point: {self.curve}; {self.size.value:.0f} {self.size.unit}; {self.cost.value:.5g} {self.cost.unit}"


def print_row(
    what: str, measured: float, unit: str, *, against: float | None = None, of: str = "", against_unit: str = "",
    at_most: float | None = None, at_least: float | None = None, reach_unit: str = "",
) -> None:  # fmt: skip
    """Print a row. ``of``: the rival or limit, whose value is ``against``. ``reach_unit``: by default ``unit``."""
    limit = at_most if at_most is not None else at_least
    row = Row(
        what,
        Amount(measured, unit),
        None if against is None else Amount(against, against_unit or unit, of),
        None if limit is None else Amount(limit, reach_unit or unit),
        at_least is not None,
    )
    print(row, flush=True)


def print_point(curve: str, size: float, of: str, cost: float, unit: str) -> None:
    """Print a point of ``curve``: ``size`` many ``of`` cost ``cost``."""
    print(Point(curve, Amount(size, of), Amount(cost, unit)), flush=True)
