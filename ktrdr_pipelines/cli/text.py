"""Text layout: counts with nouns, columns, shortened lists. Knows nothing of bars.

rich folds table cells to the width of the terminal, and a time that is cut in two cannot be copied.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_LINES = 20
"""A longer list shows its beginning, its end, and how many lines are left out."""


def count(n: int, noun: str) -> str:
    """``1 bar``, ``1,204 bars``, ``3 retries``."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def lay_out(rows: Sequence[Sequence[str]], indent: int = 4, *, header: bool = True) -> list[str]:
    """Columns of equal width, two spaces apart, numbers aligned right. The first row is the ``header``, unless there is none."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_number = [all(_is_number(row[i]) for row in rows[header:]) for i in range(len(rows[0]))]
    return [
        " " * indent
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(text: str) -> bool:
    return not text or text.replace(",", "").isdigit()


def shorten(lines: Sequence[str], what: str) -> list[str]:
    """``lines`` without their middle if there are more than `MOST_LINES`."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    half = MOST_LINES // 2
    left_out = len(lines) - 2 * half
    return [*lines[:half], f"    … {left_out:,} more {what} (--json shows all) …", *lines[-half:]]
