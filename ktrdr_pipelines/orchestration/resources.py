"""What an asset needs from outside: the gateway and the store. Resources only build the plain objects.

The connection is made at the first request of a run, not before: a run with nothing missing needs no gateway. With the
in-process executor one connection serves all series of a run and is closed at its end, on every path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from pydantic import PrivateAttr

from ktrdr_pipelines.domain.timeframes import HistoryLimits
from ktrdr_pipelines.ib.client_ids import ClientIds
from ktrdr_pipelines.ib.endpoint import GatewayAddress, hide_secrets
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.orchestration.runs.entry_points import EntryPoint, current_entry_point
from ktrdr_pipelines.orchestration.runs.liveness import executing_here, reap_dead_runs
from ktrdr_pipelines.orchestration.runs.progress_tag import follow_in_tag
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.schedule_overrides import open_store
from ktrdr_pipelines.store.store import Store

_ledger_urls: dict[str, str] = {}
"""The real URL for each that is shown. Every process that runs assets has built the definitions, and with them this."""

_DAEMON_TAGS = ("dagster/backfill", "dagster/sensor_name", "dagster/schedule_name")


class GatewayResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """TWS or IB Gateway: where it is, how long to wait for it, how often to try again."""

    host: str
    port: int
    client_id: int | None
    connect_timeout_s: float
    request_timeout_s: float
    retry_waits_s: list[float]
    state_dir: str
    ledger_url: str
    """Without its password: Dagster stores the configuration of its resources and shows it to every user."""
    library: str
    open_requests: int
    """How many requests of one step may be unanswered at once."""

    _history: IBHistory | None = PrivateAttr(default=None)
    _entry_point: EntryPoint | None = PrivateAttr(default=None)
    _run_id: str = PrivateAttr(default="")
    _client_ids: ClientIds = PrivateAttr(default=ClientIds.PERSON)

    @classmethod
    def of(cls, settings: Settings) -> "GatewayResource":
        """From the settings."""
        return cls(
            host=settings.ib_host,
            port=settings.ib_port,
            client_id=settings.ib_client_id,
            connect_timeout_s=settings.ib_connect_timeout_s,
            request_timeout_s=settings.ib_request_timeout_s,
            retry_waits_s=list(settings.ib_retry_waits_s),
            state_dir=str(settings.dagster_home),
            ledger_url=_show(settings.ledger_url),
            library=settings.ib_library,
            open_requests=settings.open_requests,
        )

    def address(self) -> GatewayAddress:
        """The gateway as `ib/history.py` wants it; daemons never take the id that a user configured."""
        return GatewayAddress(
            host=self.host,
            port=self.port,
            client_id=self.client_id if self._client_ids is ClientIds.PERSON else None,
            client_ids=self._client_ids,
            connect_timeout_s=self.connect_timeout_s,
            request_timeout_s=self.request_timeout_s,
            retry_waits_s=tuple(self.retry_waits_s),
            state_dir=Path(self.state_dir),
            ledger_url=_ledger_urls.get(self.ledger_url, self.ledger_url),
            library=self.library,
        )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["GatewayResource"]:
        """For one run: liveness from here on, and at its end the close of the connection that this resource opened.

        Who launched the run decides on the client id: commands and daemons use different ranges.
        """
        run = context.run
        is_daemon = any(tag in run.tags for tag in _DAEMON_TAGS) if run else False
        self._client_ids = ClientIds.DAEMON if is_daemon else ClientIds.PERSON
        if run and context.instance:
            executing_here(context.instance, run.run_id)
        try:
            yield self
        finally:
            if self._history is not None:
                self._history.close()
                self._history = None
            if context.instance:
                reap_dead_runs(context.instance)

    def entry_point(self, instance: dg.DagsterInstance, run_id: str) -> EntryPoint:
        """The entry point of the run: what executes it in this process, else one that keeps the progress in the run's records."""
        if self._entry_point is None or self._run_id != run_id:
            self._entry_point, self._run_id = current_entry_point() or follow_in_tag(instance, run_id), run_id
        return self._entry_point

    def history(self) -> IBHistory:
        """The connection of this run: the one its entry point lent, else one of its own, made at the first request."""
        entry_point = self._entry_point or EntryPoint()
        if entry_point.history is not None:
            return entry_point.history
        if self._history is None:
            self._history = IBHistory(self.address(), on_wait=entry_point.on_wait)
        return self._history


class StoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The folder of the CSV files, and the table of limits that requests are planned by."""

    data_dir: str
    history_limits: HistoryLimits

    @classmethod
    def of(cls, settings: Settings) -> "StoreResource":
        """From the settings."""
        return cls(data_dir=str(settings.data_dir), history_limits=settings.history_limits)

    def store(self) -> Store:
        """The store of the folder."""
        return open_store(Path(self.data_dir))


def _show(url: str) -> str:
    """``url`` as it may be shown; this process can find the real one again."""
    shown = hide_secrets(url)
    _ledger_urls[shown] = url
    return shown
