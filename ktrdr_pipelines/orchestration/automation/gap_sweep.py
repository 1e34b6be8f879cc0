"""In which order and how often the gaps of one series are requested: from the newest to the oldest, again after growing pauses.

Pure. A sweep is six numbers, however many gaps there are, so that the sensor's cursor stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ktrdr_pipelines.orchestration.automation.inner_gaps import InnerGaps

FIRST_PAUSE_S, PAUSE_GROWTH, LONGEST_PAUSE_S = 3600, 4, 30 * 86400
"""After requests that brought nothing: an hour, four hours, 16 hours, and so on. The third is another day, when "no data" from IB
is new evidence."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """How far the gaps of a series were requested, from the newest to the oldest. Times are epoch seconds.

    It is about the bars up to ``top_s``, of which ``missing`` were missing at its latest request, at ``asked_at_s``. The next
    one is for bars before ``below_s``, after a pause if ``fruitless`` in a row brought nothing. Newer bars up to ``newest_s``
    were requested once; the next sweep includes them.
    """

    missing: int
    top_s: int
    fruitless: int
    asked_at_s: int
    below_s: int
    newest_s: int

    @property
    def next_at_s(self) -> int:
        """When its next request may begin."""
        wait_s = FIRST_PAUSE_S * PAUSE_GROWTH ** (self.fruitless - 1) if self.fruitless else 0
        return self.asked_at_s + min(wait_s, LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class Choice:
    """Bars of a series that a tick may request: from ``low`` to ``high`` (indices), unless ``sweep`` has to wait. ``is_news``:
    they have appeared since the sweep began."""

    low: int
    high: int
    sweep: Sweep
    is_news: bool = False

    def wait_until_s(self, now_s: int) -> int:
        """When the bars may be requested; 0: now."""
        return self.sweep.next_at_s if not self.is_news and now_s < self.sweep.next_at_s else 0

    def note_request(self, gaps: InnerGaps, until_s: int, now_s: int) -> Sweep:
        """The sweep after the chosen bars from ``until_s`` on were requested."""
        top_s = int(gaps.bars.opens[-1])
        if not self.is_news:
            return replace(self.sweep, asked_at_s=now_s, below_s=until_s, newest_s=max(top_s, self.sweep.newest_s))
        if gaps.below(until_s) == self.low:
            return replace(self.sweep, newest_s=top_s)
        return Sweep(len(gaps.bars), top_s, 0, now_s, until_s, top_s)  # more of them than one tick may request


def choose(gaps: InnerGaps, before: Sweep | None, now_s: int) -> Choice:
    """Which of ``gaps`` (not empty) may be requested at ``now_s``, after the sweep ``before``."""
    count, top_s = len(gaps.bars), int(gaps.bars.opens[-1])
    known = gaps.below(before.top_s + 1) if before else 0
    if before is None or known > before.missing:  # the file has lost bars since
        return Choice(0, count, Sweep(count, top_s, 0, now_s, top_s + 1, top_s))
    if top_s > before.newest_s:
        return Choice(gaps.below(before.newest_s + 1), count, before, is_news=True)
    fruitless = before.fruitless + 1 if known == before.missing else 0
    high = gaps.below(before.below_s)
    if high and known:
        return Choice(0, high, replace(before, missing=known, fruitless=fruitless))
    return Choice(0, count, replace(before, missing=count, top_s=top_s, fruitless=max(fruitless, 1)))
