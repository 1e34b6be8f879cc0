"""Growth curves: the exponent of a cost by size, and the drawing, as SVG written by hand. No files."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from rows import Amount, Point

COLOURS = ("#1b6ca8", "#c8553d", "#2a7f4f", "#7b4fa3", "#b8860b", "#444444")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 62, 34, 200, 44


@dataclass(frozen=True, slots=True)
class Curve:
    """The cost of one thing by size, in order of size."""

    name: str
    sizes: tuple[Amount, ...]
    costs: tuple[Amount, ...]

    @property
    def exponent(self) -> float:
        """The slope of log cost over log size, by least squares: 1 is linear. Fixed costs make it smaller."""
        return _slope(self.sizes, self.costs)

    @property
    def last_exponent(self) -> float:
        """The same between the two largest sizes, where fixed costs count least."""
        return _slope(self.sizes[-2:], self.costs[-2:])


def _slope(sizes: tuple[Amount, ...], costs: tuple[Amount, ...]) -> float:
    xs, ys = [log10(each.value) for each in sizes], [log10(max(each.value, 1e-9)) for each in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def curves_of(points: list[Point]) -> list[Curve]:
    """The curves with at least two sizes, in the order of their first points."""
    found: dict[str, dict[float, Point]] = {}
    for point in points:
        found.setdefault(point.curve, {})[point.size.value] = point
    return [
        Curve(name, tuple(p.size for p in ordered), tuple(p.cost for p in ordered))
        for name, by_size in found.items()
        if len(ordered := [by_size[size] for size in sorted(by_size)]) > 1
    ]


def draw(curves: list[Curve]) -> str:
    """A drawing of curves with the same units, on logarithmic axes; dashed: linear growth from the first point of the first."""
    sizes = [each.value for curve in curves for each in curve.sizes]
    costs = [each.value for curve in curves for each in curve.costs]
    x_low, x_high = floor(log10(min(sizes))), ceil(log10(max(sizes)))
    y_low, y_high = floor(log10(min(costs))), ceil(log10(max(costs)))

    def at(size: float, cost: float) -> tuple[float, float]:
        x = (log10(size) - x_low) / max(x_high - x_low, 1)
        y = (log10(cost) - y_low) / max(y_high - y_low, 1)
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [_frame(curves[0].sizes[0].unit, curves[0].costs[0].unit)]
    bottom, top, left, right = 10.0**y_low, 10.0**y_high, 10.0**x_low, 10.0**x_high
    for power in range(x_low, x_high + 1):
        parts.append(_grid(*at(10.0**power, bottom), *at(10.0**power, top), f"{10**power:,}", True))
    for power in range(y_low, y_high + 1):
        parts.append(_grid(*at(left, 10.0**power), *at(right, 10.0**power), f"{10.0**power:g}", False))
    first = curves[0]
    factor = min(max(sizes) / first.sizes[0].value, 10.0**y_high / first.costs[0].value)
    ends = (
        at(first.sizes[0].value, first.costs[0].value),
        at(first.sizes[0].value * factor, first.costs[0].value * factor),
    )
    parts.append(f'<path d="{_path(list(ends))}" fill="none" stroke="#999" stroke-dasharray="4 4"/>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(s.value, c.value) for s, c in zip(curve.sizes, curve.costs, strict=True)]
        parts.append(f'<path d="{_path(places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 14 + 18 * number
        x = WIDTH - RIGHT + 12
        label = escape(curve.name.partition(":")[0])
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _frame(size: str, cost: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(size)}</text>\n'
        f'<text x="{LEFT - 6}" y="{TOP - 14}" text-anchor="end">{escape(cost)}</text>'
    )


def _grid(x1: float, y1: float, x2: float, y2: float, label: str, is_below: bool) -> str:
    line = f'<path d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}" stroke="#ddd"/>'
    if is_below:
        return f'{line}<text x="{x1:.1f}" y="{y1 + 15:.1f}" text-anchor="middle">{label}</text>'
    return f'{line}<text x="{x1 - 6:.1f}" y="{y1 + 4:.1f}" text-anchor="end">{label}</text>'


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
