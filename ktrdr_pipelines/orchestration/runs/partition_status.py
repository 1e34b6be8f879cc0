"""What Dagster recorded of the partitions of a series, in words that need no Dagster to read (`Recorded`).

For people's questions; what follows from the record is `orchestration/automation/reconcile.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.partitions import Recorded
from ktrdr_pipelines.orchestration.assets import asset_key
from ktrdr_pipelines.orchestration.partition_definitions import define_partitions
from ktrdr_pipelines.orchestration.runs.instance import open_instance
from ktrdr_pipelines.settings import Settings

_WORDS = {"MATERIALIZED": Recorded.COMPLETE, "FAILED": Recorded.FAILED, "IN_PROGRESS": Recorded.UNDER_WAY}


class Record:
    """Dagster's record of partitions, as the UI shows it. A context manager.

    Where there is no Dagster home yet it knows nothing: a question does not begin one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = ExitStack()
        self._instance: dg.DagsterInstance | None = None
        self._known: set[dg.AssetKey] = set()

    def __enter__(self) -> Self:
        if (self._settings.dagster_home / "dagster.yaml").exists():
            self._instance = self._open.enter_context(open_instance(self._settings))
            self._known = set(self._instance.get_asset_keys())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, series: Series, keys: Iterable[str]) -> Mapping[str, Recorded]:
        """Of the partitions called ``keys`` those of which something is recorded."""
        if self._instance is None or asset_key(series) not in self._known:
            return {}
        partitions = define_partitions(series.timeframe, self._settings)
        found = self._instance.get_status_by_partition(asset_key(series), list(keys), partitions)
        return {key: _WORDS[status.value] for key, status in (found or {}).items() if status is not None}
