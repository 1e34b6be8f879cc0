"""What Dagster loads: ``defs``. With arguments of `build_defs` tests replace the gateway, the data folder or the universe."""

from collections.abc import Iterable

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.orchestration.build import build_definitions
from ktrdr_pipelines.settings import Settings, load_settings
from ktrdr_pipelines.universe.file import universe_of


def build_defs(settings: Settings | None = None, universe: Iterable[Series] | None = None) -> dg.Definitions:
    """The definitions for ``settings`` (default: environment and `.env`) and ``universe`` (default: the universe file)."""
    settings = settings or load_settings()
    chosen = universe if universe is not None else universe_of(settings)
    return build_definitions(settings, chosen, automation=True)


defs = build_defs()
