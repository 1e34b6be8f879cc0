"""`docs/benchmarks.md` from the results of `run.py`: the machine, the table, the curves, and what else the benchmarks printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from growth import Curve, curves_of, draw
from rows import Point, Row

INTRODUCTION = """\
# Benchmarks

Written by `make bench` (`benchmarks/run.py`); do not edit. Each figure is measured in one run with what it is compared to,
alternately where times are compared: read ratios. Wall times of loads are those of whole processes, start-up included. Loads run
against the simulated gateway in a process of its own, which refuses what breaks IB's pacing rules (`docs/ib_facts.md`, 6).
"""


@dataclass
class Result:
    """What one script printed, and under which conditions."""

    name: str
    title: str
    commit: str
    date: str
    seconds: float
    load: str
    """The load average while it ran: mean and highest."""
    exit_code: int
    lines: list[str] = field(default_factory=list)

    as_dict = asdict

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        return cls(**values)

    @property
    def rows(self) -> list[Row]:
        return [row for line in self.lines if (row := Row.parse(line))]

    @property
    def points(self) -> list[Point]:
        return [point for line in self.lines if (point := Point.parse(line))]

    @property
    def rest(self) -> list[str]:
        """Printed lines that are neither."""
        return [line for line in self.lines if not line.startswith(("row: ", "point: "))]


def write_document(results: list[Result], machine: list[tuple[str, str]], docs: Path) -> None:
    """`benchmarks.md` and its drawings in the folder ``docs``."""
    drawings = docs / "benchmarks"
    drawings.mkdir(exist_ok=True)
    for old in drawings.glob("*.svg"):
        old.unlink()
    pieces = [INTRODUCTION, "## Machine\n", _table(("", ""), machine)]
    pieces += ["## Figures\n", _figures(results), "## Growth\n", _growth(results, drawings)]
    pieces += ["## The scripts\n", *map(_section, results)]
    (docs / "benchmarks.md").write_text("\n".join(pieces).rstrip() + "\n")


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    marked = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines)]
    return "\n".join(marked) + "\n"


def _figures(results: list[Result]) -> str:
    rows = [row for result in results for row in result.rows]
    wanted = [row for row in rows if row.is_reached is not None]
    reached = sum(bool(row.is_reached) for row in wanted)
    lines = [_figure(row) for row in sorted(rows, key=lambda row: row.is_reached is None)]
    head = ("figure", "measured", "rival or limit", "ratio", "to reach", "reached")
    return f"{reached} of {len(wanted)} reached.\n\n" + _table(head, lines)


def _figure(row: Row) -> tuple[str, ...]:
    reach = f"at {'least' if row.at_least else 'most'} {row.reach}" if row.reach else ""
    verdict = {None: "", True: "yes", False: "**no**"}[row.is_reached]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.what, str(row.measured), str(row.against or ""), ratio, reach, verdict


def _growth(results: list[Result], drawings: Path) -> str:
    curves = curves_of([point for result in results for point in result.points])
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.sizes[0].unit, curve.costs[0].unit), []).append(curve)
    pieces = [
        "Exponent of the growth: 1 is linear, less is fixed costs. Dashed in the drawings: linear growth.\n",
        _table(
            ("curve", "sizes", "cost", "exponent", "between the two largest"),
            [
                (
                    curve.name,
                    f"{curve.sizes[0].value:,.0f} to {curve.sizes[-1]}",
                    f"{curve.costs[0]} to {curve.costs[-1]}",
                    f"{curve.exponent:.2f}",
                    f"{curve.last_exponent:.2f}",
                )
                for curve in curves
            ],
        ),
    ]
    for (size, cost), group in groups.items():
        name = f"{size}_{cost}".replace(" ", "_") + ".svg"
        (drawings / name).write_text(draw(group))
        pieces.append(f"![{cost} by {size}](benchmarks/{name})\n")
    return "\n".join(pieces)


def _section(result: Result) -> str:
    failed = f" **Ended with exit code {result.exit_code}.**" if result.exit_code else ""
    head = (
        f"**`benchmarks/bench_{result.name}.py`** {result.title}\n\n"
        f"{result.date}, commit {result.commit}, {result.seconds:.0f} s, load average {result.load}.{failed}\n"
    )
    return head + ("\n```\n" + "\n".join(result.rest) + "\n```\n" if result.rest else "")
