"""Scripted faults: rules that damage selected answers. A rule matches requests and does one of three things: it changes the
answer, plans its delivery, or starts a disturbance of the whole gateway (`disturbances.py`). Rules are tried in order, and all
that match apply.

A file of rules is YAML or JSON, a list of mappings with the fields of `FaultRule`:
``[{kind: pacing, nth: [1]}, {kind: gap, symbol: AAPL, rows: 7}]``. What a gateway without faults answers is in
`history_service.py`, the harmless differences between gateways in `habits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator import refusals
from ktrdr_pipelines.simulator.disturbances import DISTURBANCES, MEANWHILE, Disturbance, make_disturbance
from ktrdr_pipelines.simulator.history_service import Answer
from ktrdr_pipelines.simulator.market import Bars
from ktrdr_pipelines.simulator.refusals import Refusal


@dataclass(frozen=True)
class Delivery:
    """How an answer reaches the client. The connection breaks after ``drop_after`` bytes. A ``silent`` answer is never sent, with
    ``after_cancel`` only after the client has cancelled. ``begins``: the disturbances that start with this request."""

    delay_s: float = 0.0
    silent: bool = False
    drop_after: int | None = None
    after_cancel: bool = False
    begins: tuple[Disturbance, ...] = ()


CONNECT = "connect"


@dataclass(frozen=True)
class Asked:
    """What rules match on. ``kind`` is history, schedule, head, or connect for a new client; ``number`` counts requests of all
    kinds from 1; ``now`` is epoch seconds."""

    kind: str
    number: int
    client_id: int
    symbol: str
    local_symbol: str
    exchange: str
    bar_size: str
    duration: str
    end: str
    what: str
    use_rth: bool
    now: float = 0.0


@dataclass(frozen=True)
class FaultRule:
    """One fault. Empty conditions match every request; new clients match only ``on: connect``.

    ``nth``: of the requests that match the other conditions, only these (from 1). ``times``: the most often (0: no limit).
    ``when``: a further test, from Python only. ``rows``, ``after_bytes``, ``code``, ``text``, ``seconds``, ``factor``,
    ``part`` are the amounts of the kinds that use them; ``delay``, ``back`` and ``meanwhile`` those of disturbances.
    """

    kind: str
    nth: tuple[int, ...] = ()
    times: int = 0
    on: str = "history"
    symbol: str = ""
    bar_size: str = ""
    duration: str = ""
    end: str = ""
    what: str = ""
    client_id: int | None = None
    rows: int = 1
    after_bytes: int = 200
    code: int = 162
    text: str = f"{refusals.SERVICE}unexpected failure"
    seconds: float = 1.0
    factor: float = 1.01
    part: str = "first"
    delay: float = 0.0
    back: int = 0
    meanwhile: str = ""
    when: Callable[[Asked], bool] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown fault {self.kind!r}", advice=f"Use one of {', '.join(sorted(KINDS))}.")
        if self.meanwhile not in ("", *MEANWHILE):
            raise InputError(
                f"unknown value of meanwhile: {self.meanwhile!r}", advice=f"Use one of {', '.join(MEANWHILE)}."
            )

    def fits(self, asked: Asked) -> bool:
        """True if every condition except ``nth`` and ``times`` matches."""
        symbol = asked.local_symbol if self.symbol == asked.local_symbol else asked.symbol
        tests = (
            (self.on, asked.kind),
            (self.symbol, symbol),
            (self.bar_size, asked.bar_size),
            (self.duration, asked.duration),
            (self.end, asked.end),
            (self.what, asked.what),
        )
        return (
            all(wanted in ("", given) for wanted, given in tests)
            and (asked.kind != CONNECT or self.on == CONNECT)
            and self.client_id in (None, asked.client_id)
            and (self.when is None or self.when(asked))
        )


@dataclass(frozen=True)
class Step:
    """An answer on its way through the rules, with the rule being applied."""

    rule: FaultRule
    asked: Asked
    answer: Answer
    delivery: Delivery


def _refuse(make: Callable[[Step], Refusal]) -> Callable[[Step], Step]:
    def apply(step: Step) -> Step:
        refused = replace(step.answer, refusal=make(step), bars=None, sessions=None, head=None)
        return replace(step, answer=refused)

    return apply


def _deliver(change: Callable[[FaultRule, Delivery], Delivery]) -> Callable[[Step], Step]:
    return lambda step: replace(step, delivery=change(step.rule, step.delivery))


def _begin(step: Step) -> Step:
    rule = step.rule
    begun = make_disturbance(
        rule.kind, seconds=rule.seconds, delay_s=rule.delay, back=rule.back, meanwhile=rule.meanwhile
    )
    delivery = replace(step.delivery, begins=(*step.delivery.begins, begun))
    if begun.kind == "hang" and begun.delay_s <= 0:
        delivery = replace(delivery, delay_s=delivery.delay_s + begun.seconds)
    return replace(step, delivery=delivery)


def _spoil(change: Callable[[FaultRule, Bars], Bars]) -> Callable[[Step], Step]:
    """A fault that changes bars: an answer without bars stays as it is."""

    def apply(step: Step) -> Step:
        bars = step.answer.bars
        if bars is None or not len(bars):
            return step
        return replace(step, answer=replace(step.answer, bars=change(step.rule, bars)))

    return apply


def _add_notice(step: Step) -> Step:
    return replace(step, answer=replace(step.answer, notices=(*step.answer.notices, refusals.QUERY_NOTICE)))


def _lag(step: Step) -> Step:
    known_s = int(step.asked.now - step.rule.seconds)
    return _spoil(lambda _, bars: bars.take(bars.stamp < known_s))(step)


def _shift(step: Step) -> Step:
    shift_s = int(step.rule.seconds)
    if step.answer.head is not None:
        return replace(step, answer=replace(step.answer, head=max(0, step.answer.head + shift_s)))
    return _spoil(lambda _, bars: replace(bars, stamp=bars.stamp + shift_s))(step)


def _middle(rule: FaultRule, bars: Bars) -> tuple[int, int]:
    first = max(0, (len(bars) - rule.rows) // 2)
    return first, min(len(bars), first + rule.rows)


def _take_part(rule: FaultRule, bars: Bars) -> Bars:
    half = (len(bars) + 1) // 2
    return bars.take(slice(0, half) if rule.part == "first" else slice(half, None))


def _cut_gap(rule: FaultRule, bars: Bars) -> Bars:
    first, stop = _middle(rule, bars)
    return bars.take(np.r_[0:first, stop : len(bars)])


def _repeat(rule: FaultRule, bars: Bars) -> Bars:
    first, stop = _middle(rule, bars)
    return bars.take(np.r_[0:stop, first : len(bars)])


def _swap(rule: FaultRule, bars: Bars) -> Bars:
    order = np.arange(len(bars))
    first, stop = _middle(replace(rule, rows=max(2, rule.rows)), bars)
    order[first:stop] = order[first:stop][::-1]
    return bars.take(order)


def _contradict(rule: FaultRule, bars: Bars) -> Bars:
    first, stop = _middle(rule, bars)
    twice = _repeat(rule, bars)
    again = slice(stop, stop + (stop - first))
    return _scale(twice, again, rule.factor, ("open", "high", "low", "close"))


def _scale(bars: Bars, rows: slice, factor: float, columns: tuple[str, ...]) -> Bars:
    changed = {}
    for name in columns:
        column = getattr(bars, name).copy()
        column[rows] = column[rows] * factor
        changed[name] = column
    return replace(bars, **changed, decimals=None)


def _poison(value: float) -> Callable[[FaultRule, Bars], Bars]:
    def change(rule: FaultRule, bars: Bars) -> Bars:
        close = bars.close.copy()
        close[slice(*_middle(rule, bars))] = value
        return replace(bars, close=close)

    return change


def _turn_upside_down(rule: FaultRule, bars: Bars) -> Bars:
    rows = slice(*_middle(rule, bars))
    high, low = bars.high.copy(), bars.low.copy()
    high[rows], low[rows] = low[rows].copy() - 0.01, high[rows].copy() + 0.01
    return replace(bars, high=high, low=low)


def _revise(rule: FaultRule, bars: Bars) -> Bars:
    return _scale(bars, slice(-rule.rows, None), rule.factor, ("open", "high", "low", "close"))


KINDS: dict[str, Callable[[Step], Step]] = {
    "pacing": _refuse(lambda _: refusals.PACING),
    "error": _refuse(lambda step: Refusal(step.rule.code, step.rule.text)),
    "no_data_lie": _refuse(
        lambda step: refusals.report_no_data(step.asked.local_symbol, step.asked.exchange, step.asked.what)
    ),
    "query_cancelled": _refuse(lambda step: refusals.confirm_cancel(step.asked.number)),
    "unknown_query": _refuse(lambda step: refusals.report_unknown_query(step.asked.number)),
    "client_id_in_use": _refuse(lambda _: refusals.BUSY_CLIENT_ID),
    "query_notice": _add_notice,
    "silent": _deliver(lambda _, delivery: replace(delivery, silent=True)),
    "late": _deliver(lambda _, delivery: replace(delivery, silent=True, after_cancel=True)),
    "slow": _deliver(lambda rule, delivery: replace(delivery, delay_s=rule.seconds)),
    "drop_after": _deliver(lambda rule, delivery: replace(delivery, drop_after=rule.after_bytes)),
    "partial": _spoil(_take_part),
    "newest": _spoil(lambda rule, bars: bars.take(slice(-rule.rows, None))),
    "oldest": _spoil(lambda rule, bars: bars.take(slice(0, rule.rows))),
    "without_first": _spoil(lambda rule, bars: bars.take(slice(rule.rows, None))),
    "without_last": _spoil(lambda rule, bars: bars.take(slice(0, max(0, len(bars) - rule.rows)))),
    "empty": _spoil(lambda _, bars: bars.take(slice(0, 0))),
    "lag": _lag,
    "revise": _spoil(_revise),
    "gap": _spoil(_cut_gap),
    "duplicate": _spoil(_repeat),
    "out_of_order": _spoil(_swap),
    "conflict": _spoil(_contradict),
    "nan": _spoil(_poison(float("nan"))),
    "infinite": _spoil(_poison(float("inf"))),
    "high_below_low": _spoil(_turn_upside_down),
    "shift": _shift,
    **dict.fromkeys(DISTURBANCES, _begin),
}
"""Every fault by name. Rows are taken from the middle of the answer, for ``newest`` and ``revise`` from its end, for ``oldest``
from its start. ``gap`` leaves out ``rows`` bars, ``without_first`` and ``without_last`` so many at one end; ``shift`` moves all
stamps, or a head timestamp, by ``seconds``; ``lag`` leaves out bars that opened less than ``seconds`` ago; ``query_notice``
sends 165 before the answer, ``unknown_query`` 366 in place of it; ``empty`` sends no bars and no error."""


class FaultBook:
    """The rules with their counts. One for all clients of a gateway."""

    def __init__(self, rules: Iterable[FaultRule] = ()) -> None:
        self._rules = list(rules)
        self._matched = [0] * len(self._rules)
        self._applied = [0] * len(self._rules)

    def add(self, rule: FaultRule) -> None:
        """Add a rule while the gateway runs; it counts requests from now on."""
        self._matched.append(0)
        self._applied.append(0)
        self._rules.append(rule)

    def clear(self) -> None:
        """Remove all rules."""
        self._rules, self._matched, self._applied = [], [], []

    def apply(self, asked: Asked, answer: Answer) -> tuple[Answer, Delivery, tuple[str, ...]]:
        """The changed answer, its delivery, and the names of the faults that were applied."""
        names: list[str] = []
        if not self._rules:
            return answer, Delivery(), ()
        step = Step(self._rules[0], asked, answer, Delivery())
        for i, rule in enumerate(self._rules):
            if not rule.fits(asked):
                continue
            self._matched[i] += 1
            if (rule.nth and self._matched[i] not in rule.nth) or (rule.times and self._applied[i] >= rule.times):
                continue
            self._applied[i] += 1
            step = KINDS[rule.kind](replace(step, rule=rule))
            names.append(rule.kind)
        return step.answer, step.delivery, tuple(names)


_ALLOWED = {f.name for f in fields(FaultRule)} - {"when"}


def read_faults(path: Path) -> list[FaultRule]:
    """The rules in a YAML or JSON file.

    Raises:
        InputError: unreadable, not a list of mappings, or a field or kind that does not exist.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read faults from {path}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} is not a list of faults", advice="Write it like: [{kind: pacing, nth: [1]}]")
    return [_make_rule(path, entry) for entry in entries]


def _make_rule(path: Path, entry: dict[str, Any]) -> FaultRule:
    unknown = sorted(set(entry) - _ALLOWED)
    if unknown or "kind" not in entry:
        raise InputError(
            f"{path}: fault {entry!r} has " + (f"unknown fields {', '.join(unknown)}" if unknown else "no kind"),
            advice=f"Fields are {', '.join(sorted(_ALLOWED))}.",
        )
    nth = entry.get("nth", ())
    try:
        return FaultRule(**{**entry, "nth": tuple(nth) if isinstance(nth, list | tuple) else (int(nth),)})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: fault {entry!r}: {error}") from error
