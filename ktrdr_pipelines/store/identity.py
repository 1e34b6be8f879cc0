"""The identity of a file: it never mixes contracts, currencies, hours, what to show, or simulated with real bars.

Pure. See docs/design.md, 4.
"""

from __future__ import annotations

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import StoreError
from ktrdr_pipelines.store.sidecar import Pinned, Sidecar, Source, VolumeUnit


def pin(sidecar: Sidecar, series: Series, source: Source, volume_unit: VolumeUnit | None) -> Sidecar:
    """``sidecar`` with ``series`` and ``source`` pinned: the first write decides, later ones add what was unknown.

    Raises:
        StoreError: another conId, kind, currency, expiry, hours or what-to-show than the file holds, or a simulator's bars
            beside real ones. The message names what the file holds and what was offered.
    """
    offered = Pinned.of(series.instrument, volume_unit or "unknown")
    held = sidecar.instrument
    if held is not None:
        differing = [
            f"{label} {getattr(held, name)} (offered: {getattr(offered, name)})"
            for name, label in _IDENTITY.items()
            if getattr(held, name) != getattr(offered, name)
            and not (name in ("con_id", "expiry") and not (getattr(held, name) and getattr(offered, name)))
        ]
        if differing:
            raise StoreError(
                f"the file holds {', '.join(differing)}",
                doing=f"writing bars of {series}",
                advice=f"A file never mixes these: move {series.name}.csv and {series.name}.meta.json away, or give the "
                "other one its own symbol in the universe file.",
            )
        unit = offered.volume_unit if offered.volume_unit != "unknown" else held.volume_unit
        offered = held.model_copy(
            update={
                "con_id": held.con_id or offered.con_id,
                "expiry": held.expiry or offered.expiry,
                "volume_unit": unit,
                "last_trade_date": offered.last_trade_date or held.last_trade_date,
            }
        )
    if sidecar.source is not None and (sidecar.source == "simulator") != (source == "simulator"):
        kinds = {"simulator": "simulated bars"}
        raise StoreError(
            f"the file holds {kinds.get(sidecar.source, 'real bars')} (source: {sidecar.source}), and "
            f"{kinds.get(source, 'real bars')} were offered (source: {source})",
            doing=f"writing bars of {series}",
            advice="Simulated and real bars never share a file: set KTRDR_DATA_DIR to another directory for one of them.",
        )
    return sidecar.model_copy(update={"series": str(series), "instrument": offered, "source": sidecar.source or source})


_IDENTITY = {
    "symbol": "symbol",
    "con_id": "conId",
    "sec_type": "kind",
    "currency": "currency",
    "expiry": "expiry",
    "what_to_show": "what to show",
    "hours": "hours",
}
