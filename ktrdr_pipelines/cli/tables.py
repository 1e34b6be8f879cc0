"""Results of the load, gaps, adopt and calendar commands as lines of text; programs read `--json`.

The values are defined in `loading/report.py`, `services/dry_run.py`, `services/gaps.py` and `services/calendar_check.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ktrdr_pipelines.cli.text import count, lay_out, shorten
from ktrdr_pipelines.domain.partitions import partitions_in
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.ib.pacing.rules import WINDOW_UNITS
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.services.calendar_check import CalendarCheck, describe_difference
from ktrdr_pipelines.services.dry_run import DryRun
from ktrdr_pipelines.services.gaps import Holding
from ktrdr_pipelines.services.inspection import Adoption, Unreadable


def _time(instant: datetime | None) -> str:
    return format_instant(instant) if instant else "-"


def describe_load(report: LoadReport) -> list[str]:
    """The report of a load."""
    missing = f", {count(report.missing_bars, 'bar')} STILL MISSING" if report.missing_bars else ""
    retry_wait = f", {report.retry_wait_s:.0f} s for retries and the gateway" if report.retry_wait_s >= 1 else ""
    return [
        f"{report.series} {report.window}: {report.status}",
        f"  {count(report.fetched_bars, 'bar')} fetched in {count(report.ib_requests_made, 'request')}, "
        f"{count(report.retries, 'retry')}, {report.pacing_wait_s:.0f} s waiting for pacing{retry_wait}",
        f"  {count(report.gaps_analyzed, 'gap')} found, {_count_partitions(report)} complete, "
        f"{count(report.proven_empty, 'bar')} absent at IB{missing}",
        *(f"  note: {notice}" for notice in report.notices),
        *([f"  {report.merged_file}"] if Path(report.merged_file).exists() else []),
    ]


def _count_partitions(report: LoadReport) -> str:
    """Completed partitions, of all in the window if not all: a complete load of part of a year completes no partition."""
    touched, done = sum(1 for _ in partitions_in(report.series.timeframe, report.window)), len(report.completed)
    return f"{done:,} of {count(touched, 'partition')}" if done < touched else count(done, "partition")


def describe_dry_run(dry: DryRun) -> list[str]:
    """The requests that a load would send, and when they could be done."""
    head = f"{dry.series} {dry.window}, {dry.mode}: {count(dry.missing_bars, 'bar')} missing, "
    lines = [head + (count(len(dry.requests), "request") if dry.requests else "nothing to request")]
    if dry.gaps:
        rows = [(_time(g.window.start), _time(g.window.end), f"{g.opens:,}", g.reason) for g in dry.gaps]
        table = lay_out([("gap from", "to", "bars", "where"), *rows])
        lines += [table[0], *shorten(table[1:], "gaps")]
    if dry.requests:
        requests = [
            (str(i), str(r.window), str(r.duration), _time(r.end), _clock(s.at_s, dry.now), s.waited_for or "")
            for i, (r, s) in enumerate(zip(dry.requests, dry.sendings, strict=True), 1)
        ]
        table = lay_out([("request", "for", "IB duration", "IB end", "earliest", "waits for"), *requests])
        lines += [table[0], *shorten(table[1:], "requests")]
        wait_s = (dry.done_at - dry.now).total_seconds()
        lines.append(
            f"  done at {_time(dry.done_at)} at the earliest ({_span(wait_s)} from now), if each answer took no time"
        )
    lines.append(
        f"  budget: {dry.used} of {WINDOW_UNITS} requests of the last ten minutes are used, {dry.waiting} waiting"
    )
    lines += [f"  all requests pause until {_clock(pause.until_s, dry.now)}: {pause.reason}" for pause in dry.pauses]
    lines += [f"  note: {notice}" for notice in dry.notices]
    return lines


def _clock(at_s: float, now: datetime) -> str:
    at = datetime.fromtimestamp(at_s, UTC)
    return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M:%S}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe_holding(held: Holding) -> list[str]:
    """What is held, missing and absent of one series."""
    lines = [
        f"{held.series}: "
        + (count(held.rows, "bar") if held.rows else "never loaded" if held.never_loaded else "nothing held")
    ]
    if held.rows:
        lines.append(f"  held     {_time(held.first)} to {_time(held.last)}, {held.file}")
    if held.history_start:
        lines.append(f"  history  starts {_time(held.history_start.open)} ({held.history_start.known_by})")
    lines += [f"  forming  {_time(bar.opens_at)}, complete {_time(bar.complete_at)}" for bar in held.forming]
    total = sum(item.bars for item in held.missing)
    older = f", {held.count_older():,} of them older" if held.count_older() else ""
    lines.append(f"  missing  {count(total, 'bar')}{older}")
    if held.missing:
        rows = [(_time(m.window.start), _time(m.window.end), f"{m.bars:,}", m.where, m.why) for m in held.missing]
        table = lay_out([("from", "to", "bars", "where", "why"), *rows])
        lines += [table[0], *shorten(table[1:], "gaps")]
    lines.append(f"  absent at IB  {count(held.proven_bars, 'bar')} in {count(held.proven_ranges, 'range')}")
    for item in held.newest_proven:
        lines.append(f"    {item.window}, {count(item.opens, 'bar')}")
        lines += [
            f"      asked {_time(e.asked_at)}"
            + (f" for {e.duration} to {_time(e.end)}" if e.duration else "")
            + f": {e.text}"
            for e in item.evidence
        ]
    if held.proven_ranges > len(held.newest_proven):
        lines.append(f"    … {held.proven_ranges - len(held.newest_proven):,} more (all are in the sidecar)")
    lines += shorten([f"  damage: {text}" for text in held.damage], "faults")
    lines += [f"  note: {text}" for text in held.notices]
    return lines


def describe_universe(found: Iterable[Holding | Unreadable]) -> list[str]:
    """One line for each series: its missing bars, and those of them that are older than the first held one."""
    rows = [("series", "bars", "first", "last", "missing", "of them older", "why", "absent")]
    for item in found:
        name = str(item.series)
        if isinstance(item, Unreadable):
            rows.append((name, "-", "-", "-", "-", "-", "cannot be read", "-"))
            continue
        missing = item.count_missing()
        total, why = f"{sum(missing.values()):,}", "never loaded" if item.never_loaded else ", ".join(missing)
        older = f"{item.count_older():,}" if item.rows else "-"
        ends = (_time(item.first), _time(item.last))
        rows.append((name, f"{item.rows:,}", *ends, total, older, why, f"{item.proven_bars:,}"))
    return lay_out(rows, indent=0)


def describe_adoption(adoption: Adoption) -> list[str]:
    """What was done with the rows of another program's file."""
    taken = adoption.adopted
    lines = [
        f"{adoption.series}: {count(taken.rows, 'row')} adopted from {adoption.source}, "
        f"{count(len(taken.dropped), 'row')} dropped; {adoption.rows_held:,} held now"
    ]
    dropped = [f"    {fault if fault.line else f'{fault.why}: {fault.text}'}" for fault in taken.dropped]
    lines += shorten(dropped, "dropped rows")
    lines += [f"  note: {notice}" for notice in [*taken.notices, *adoption.notices]]
    lines.append(f"  {adoption.csv}")
    lines.append(f"  the original is kept as {taken.backup}" if taken.backup else f"  {adoption.source} is unchanged")
    lines.append(f"  {count(adoption.reported, 'complete partition')} reported to Dagster")
    return lines


def describe_calendar_check(check: CalendarCheck) -> list[str]:
    """Calendar and IB's schedule compared."""
    last = check.span.end - timedelta(days=1)
    lines = [
        f"{check.instrument.symbol} follows {check.key.name}, {check.key.hours} hours: {count(check.sessions, 'session')} from "
        f"{check.span.start:%Y-%m-%d} to {last:%Y-%m-%d} compared, {count(check.requests, 'request')}"
    ]
    lines += [f"  {describe_difference(d)}" for d in check.differences if check.file or d in check.pending()]
    lines += [f"  {describe_difference(d)}; an earlier correction is out of date" for d in check.outdated]
    lines += [
        f"  {describe_difference(d)}; a second answer did not confirm it, not corrected" for d in check.unconfirmed
    ]
    lines += [f"  {notice}" for notice in check.notices]
    kept = len(check.differences) - len(check.pending())
    if check.file and (check.differences or check.outdated):
        return [*lines, f"  {count(len(check.differences), 'session')} corrected, in {check.file}"]
    if kept:
        lines.append(f"  {count(kept, 'session')} corrected before, as in IB's schedule")
    if not check.pending() and not check.outdated:
        return [*lines, "  nothing to correct"]
    return [*lines, "  not applied (--apply uses IB's schedule)"]
