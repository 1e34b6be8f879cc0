"""Results of the `ktrdr ib` commands as lines of text; programs read `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from ktrdr_pipelines.cli.text import count, lay_out
from ktrdr_pipelines.domain.time import format_instant

if TYPE_CHECKING:
    from ktrdr_pipelines.ib.client_ids import LeasedId
    from ktrdr_pipelines.services.gateway.cleanup import Cleanup
    from ktrdr_pipelines.services.gateway.config import GatewayConfig
    from ktrdr_pipelines.services.gateway.health import GatewayHealth
    from ktrdr_pipelines.services.gateway.ranges import DataRanges
    from ktrdr_pipelines.services.gateway.status import GatewayStatus, PacingState, PacingWait
    from ktrdr_pipelines.services.gateway.symbols import Found

_MOST_WAITS = 20
"""Waiting requests shown; ``--json`` has all."""


def describe_status(found: GatewayStatus) -> list[str]:
    """Connection, client ids and pacing budget, by class of work."""
    link, pacing = found.connection, found.pacing
    where = f"gateway {link.host}:{link.port}"
    if link.connected:
        lines = [f"{where}: connected as client {link.client_id}, {link.source} account {link.account}"]
        if link.gateway_time:
            lag = f"{max(link.clock_lag_s, 0):.0f} s behind this machine"
            lines.append(f"  gateway time  {format_instant(link.gateway_time)}, {lag}")
        lines.append(f"  link to IB    {'lost' if link.link_to_ib is False else 'ok'}")
        farms = ", ".join(f"{farm.kind} {farm.name} {farm.state}" for farm in link.farms)
        lines.append(f"  farms         {farms or 'not reported by the gateway'}")
    else:
        lines = [f"{where}: NOT CONNECTED"]
    lines.append(f"  client ids    {_leased(found.client_ids_in_use) or 'none'} in use")
    if pacing:
        lines.append(
            f"  pacing        {pacing.used} of {pacing.limit} requests of the last ten minutes are used, {pacing.waiting} "
            f"waiting; next free {format_instant(pacing.next_free_at)}"
        )
        lines += _describe_classes(pacing)
        lines += [f"  paused        until {format_instant(until)}: {reason}" for until, reason in pacing.pauses]
    return lines


def _describe_classes(pacing: PacingState) -> list[str]:
    """A line for each class of work, and one for each of the first waiting requests."""
    rows: list[tuple[str, ...]] = [("class", "used", "waiting", "kept for higher classes")]
    rows += [(each.work, str(each.used), str(each.waiting), str(each.kept_from)) for each in pacing.classes]
    lines = lay_out(rows, indent=4)
    if pacing.queue:
        waits: list[tuple[str, ...]] = [("waits", "symbol", "since", "expected", "process")]
        waits += [
            (each.work, each.symbol, format_instant(each.since), format_instant(each.until), _process(each))
            for each in pacing.queue[:_MOST_WAITS]
        ]
        lines += lay_out(waits, indent=4)
    if len(pacing.queue) > _MOST_WAITS:
        lines.append(f"    and {len(pacing.queue) - _MOST_WAITS} more")
    return lines


def _process(each: PacingWait) -> str:
    return f"{each.pid} on {each.host}" if each.host else str(each.pid)


def describe_health(found: GatewayHealth) -> list[str]:
    """The checks, one a line."""
    passed = sum(check.ok for check in found.checks)
    rows = [(c.name, "ok" if c.ok else "FAILED", f"{c.seconds:.1f} s", c.detail) for c in found.checks]
    word = "healthy" if found.healthy else "NOT HEALTHY"
    return [f"{word}: {passed} of {len(found.checks)} checks passed", *lay_out(rows, indent=2, header=False)]


def describe_config(found: GatewayConfig) -> list[str]:
    """Settings and rules, one a line."""
    rows: list[tuple[str, str]] = []
    for name, value in found.values.items():
        if name == "pacing_rules" and isinstance(value, Mapping):
            rows += [(str(rule).replace("_", " "), str(limit)) for rule, limit in value.items()]
        else:
            rows.append((name, _plain(name, value)))
    return lay_out(rows, indent=0, header=False)


def _plain(name: str, value: object) -> str:
    if value is None:
        return "next free" if name == "client_id" else "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(key, each)}" for key, each in value.items())
    if name == "retry_waits_s" and isinstance(value, Sequence):
        return ", ".join(str(each) for each in value) or "none"
    if isinstance(value, list | tuple):
        return " to ".join(str(each) for each in value)
    return str(value)


def describe_ranges(found: DataRanges) -> list[str]:
    """One line for each series."""
    rows: list[tuple[str, ...]] = [("series", "earliest at IB", "latest complete", "held from", "held to", "problem")]
    rows += [
        (
            f"{each.symbol} {each.timeframe}",
            *(_time(at) for at in (each.earliest, each.latest, each.held_first, each.held_last)),
            each.problem.message if each.problem else "",
        )
        for each in found.ranges
    ]
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return lay_out(rows, indent=0)


def describe_cleanup(found: Cleanup) -> list[str]:
    """Client ids and runs that were ended."""

    def listed(ids: Sequence[LeasedId]) -> str:
        return f": {_leased(ids)}" if ids else ""

    return [
        f"{count(len(found.disconnected), 'client id')} given back{listed(found.disconnected)}",
        f"{len(found.still_in_use)} still in use{listed(found.still_in_use)}",
        f"{count(len(found.runs_ended), 'run')} of dead processes ended",
    ]


def describe_found(found: Found) -> list[str]:
    """One line for each contract."""
    rows = [("sec type", "symbol", "exchange", "currency", "expiry", "conId", "zone", "name")]
    rows += [
        (
            each.sec_type,
            each.local_symbol or each.symbol,
            each.primary_exchange or each.exchange,
            each.currency,
            each.expiry,
            str(each.con_id),
            each.time_zone,
            each.long_name,
        )
        for each in found.contracts
    ]
    return [f"{found.symbol}: {count(len(found.contracts), 'contract')}", *lay_out(rows)]


def _leased(ids: Sequence[LeasedId]) -> str:
    return ", ".join(f"{each.client_id} (process {each.pid})" if each.pid else str(each.client_id) for each in ids)


def _time(instant: datetime | None) -> str:
    return format_instant(instant) if instant else "-"
