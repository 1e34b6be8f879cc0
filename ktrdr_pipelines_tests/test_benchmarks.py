"""The lines that benchmarks print are the lines that `make bench` reads, and its verdicts are right."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("bench_*.py"))


def load_module(name: str) -> ModuleType:
    """A module of `benchmarks/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return load_module("rows")


@pytest.mark.parametrize(
    ("line", "ratio", "is_reached"),
    [
        ("row: a load; measured 19.2 s; against 12 s (the rules); reach at most 22 s", 1.6, True),
        ("row: a load, CPU; measured 1.8 s; against 1.2 s (imports); reach at most 1.3 times", 1.5, False),
        ("row: rate; measured 82,522 bars; against 330,088 bars (library); reach at least 70 %", 0.25, False),
        ("row: requests; measured 0 requests; reach at most 0 requests", None, True),
        ("row: growth; measured 1.2 times; reach at most 2 times", 1.2, True),
        ("row: of interest; measured 3 ms", None, None),
    ],
)
def test_a_row_is_read_and_judged(rows: ModuleType, line: str, ratio: float | None, is_reached: bool | None) -> None:
    """Reaches in times and per cent are those of measured to rival; others are in the unit of the figure."""
    row = rows.Row.parse(line)
    assert row.ratio == (None if ratio is None else pytest.approx(ratio, rel=1e-3))
    assert row.is_reached is is_reached


def test_what_is_printed_is_read_again(rows: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows.print_row("a, b: c", 1234.5, "MB", against=2.5, of="the file (21 MB)", at_least=1, reach_unit="times")
    rows.print_point("write: CPU", 4_000_000, "rows", 6.5, "s")
    row_line, point_line = capsys.readouterr().out.splitlines()
    row, point = rows.Row.parse(row_line), rows.Point.parse(point_line)
    assert (row.what, row.measured.unit, row.against.value, row.reach.unit, row.at_least) == (
        "a, b: c", "MB", 2.5, "times", True
    )  # fmt: skip
    assert (point.size.value, point.size.unit, point.cost.value) == (4_000_000, "rows", 6.5)
    assert rows.Row.parse("median 3 ms") is None


def test_the_exponent_of_linear_growth_is_one(rows: ModuleType) -> None:
    growth = load_module("growth")
    points = [rows.Point("x", rows.Amount(n, "rows"), rows.Amount(n / 1e5, "s")) for n in (10, 1000, 100_000)]
    (curve,) = growth.curves_of(points)
    assert (curve.exponent, curve.last_exponent) == (pytest.approx(1), pytest.approx(1))
    assert growth.draw([curve]).endswith("</svg>\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_introduces_itself_and_can_be_run(script: Path) -> None:
    tree = ast.parse(script.read_text())
    assert (ast.get_docstring(tree) or "").partition("\n")[0].endswith((".", ":"))
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
