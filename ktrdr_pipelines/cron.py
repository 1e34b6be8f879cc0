"""Is a text a cron expression, and if not, why: so that a mistyped schedule is one clear line when settings are read.

When a schedule ticks is Dagster's business (`orchestration/automation/schedules.py`). Dagster's own check is private, says
no more than "invalid" and would make settings import Dagster; croniter lives on as a copy inside Dagster only. A test holds
this check to be at least as strict as Dagster's.
"""

from __future__ import annotations

import re

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_NAMES = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_PART = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?")


def check_cron(text: str) -> str:
    """``text`` with single spaces between its five fields: minute, hour, day of month, month, day of week.

    Numbers, ``*``, ranges, lists, steps, and three-letter English names of months and days are allowed.

    Raises:
        ValueError: it is not such an expression; says which field is wrong.
    """
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"{text!r} has {len(fields)} fields, not five (minute hour day month weekday)")
    for field, (name, low, high) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            match = _PART.fullmatch(part)
            if match is None:
                raise ValueError(f"{text!r}: {part!r} is not a {name}")
            first, last, step = match.groups()
            numbers = [_read(word, name, low, high, text) for word in (first, last) if word is not None]
            if numbers != sorted(numbers) or (step is not None and (not int(step) or (last is None and first))):
                raise ValueError(f"{text!r}: {part!r} is not a range of {name}")
    if fields[3] in ("2", "feb") and fields[2] in ("30", "31"):
        raise ValueError(f"{text!r}: there is no such day in February")
    return " ".join(fields)


def _read(word: str, name: str, low: int, high: int, text: str) -> int:
    names = _NAMES.get(name, [])
    if word.lower() in names:
        return names.index(word.lower()) + low
    if not word.isdecimal() or not low <= int(word) <= high:
        raise ValueError(f"{text!r}: {word!r} is not a {name} ({low} to {high})")
    return int(word)
