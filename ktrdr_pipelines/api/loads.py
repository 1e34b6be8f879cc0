"""Loads over the REST API: runs in Dagster's queue, with Dagster's run ids. What is accepted is in Dagster's records, so it
survives this server; its state is read from there.

The queue of these loads is bounded, and a load that is queued or running is not accepted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from filelock import FileLock, Timeout

from ktrdr_pipelines.api.coalesce import RETRY_AFTER_S, QueueFull
from ktrdr_pipelines.domain.load_request import LoadRequest
from ktrdr_pipelines.errors import BugError, InputError
from ktrdr_pipelines.ib.endpoint import GatewayAddress
from ktrdr_pipelines.ib.history import IBHistory
from ktrdr_pipelines.loading.report import LoadReport
from ktrdr_pipelines.orchestration.runs.dagster_services import DagsterServices
from ktrdr_pipelines.orchestration.runs.load_run import LoadRun
from ktrdr_pipelines.orchestration.runs.load_state import LoadRecords, LoadState
from ktrdr_pipelines.orchestration.runs.submission import submit_run
from ktrdr_pipelines.services.load import prepare_load
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import universe_of

QUEUE_LIMIT = 256
ORIGIN = "api"

Submit = Callable[[str, LoadRun], str]


class Loads:
    """Accepts loads and reports on them; safe for threads. `start` before loads are accepted, `stop` at the end.

    ``submit_run`` puts a run in the queue of the Dagster at a URL and returns its id.
    """

    def __init__(
        self,
        settings: Settings,
        services: DagsterServices,
        *,
        queue_limit: int = QUEUE_LIMIT,
        submit_run: Submit = submit_run,
    ) -> None:
        self._settings, self._services = settings, services
        self._limit = queue_limit
        self._submit_run = submit_run
        self._only_one = FileLock(settings.dagster_home / ".serving.lock", timeout=0)
        self._is_stopping = False
        self._records = LoadRecords(settings, ORIGIN)

    def start(self) -> None:
        """Provide the Dagster that executes loads; runs whose processes are gone are marked, so that they are tried again.

        Raises:
            InputError: another server uses this Dagster home. StoreError: it cannot be written.
        """
        self._records.count_waiting()  # initialises a fresh home, or explains why it cannot be used
        try:
            self._only_one.acquire()
        except Timeout:
            raise InputError(
                f"another REST API serves {self._settings.dagster_home}",
                advice="End it first, or set DAGSTER_HOME to another folder.",
            ) from None
        self._services.start(at_each_look=self._records.mark_dead_runs)

    def stop(self) -> None:
        """Accept nothing more, and end what was started. Accepted loads stay in Dagster's queue. Harmless when repeated."""
        self._is_stopping = True
        self._services.stop()
        self._only_one.release()

    def submit(self, request: LoadRequest) -> LoadState | LoadReport:
        """The load of ``request``: an equal one that is queued or running, else a new one. A report: there is nothing to load.

        IB is asked where only it knows the series or the start of its history.

        Raises:
            QueueFull: nothing was accepted; ask again later. KtrdrError: invalid input, or IB or Dagster does not accept it.
        """
        request = self.respell(request)
        if (same := self._records.find_equal(request)) is not None:
            return same
        self._refuse_if_full()
        with IBHistory(GatewayAddress.of(self._settings)) as history:
            run = prepare_load(request, self._settings, history, origin=ORIGIN)
        if isinstance(run, LoadReport):
            return run
        address = self._services.address()
        with FileLock(self._settings.dagster_home / ".submitting.lock"):
            if (same := self._records.find_equal(run.request)) is not None:
                return same
            self._refuse_if_full()
            run_id = self._submit_run(address, run)
        state = self.find(run_id)
        if state is None:
            raise BugError(
                f"Dagster at {address} accepted run {run_id}, which is not in the records of {self._settings.dagster_home}",
                advice="KTRDR_DAGSTER_URL has to name the web server of this DAGSTER_HOME.",
            )
        return state

    def find(self, run_id: str) -> LoadState | None:
        """The load whose run is ``run_id``; None where it is not one of this API's.

        Raises:
            StoreError: Dagster's records cannot be used.
        """
        return self._records.find(run_id)

    def _refuse_if_full(self) -> None:
        waiting = self._records.count_waiting()
        if self._is_stopping or waiting >= self._limit:
            raise QueueFull(
                "the server is ending" if self._is_stopping else f"{waiting} loads are waiting already",
                advice=f"Nothing was accepted. Ask again in {RETRY_AFTER_S} s.",
            )

    def respell(self, request: LoadRequest) -> LoadRequest:
        """``request`` with the symbol as the universe spells it, else in capitals, as IB is asked for it."""
        instrument = universe_of(self._settings).find_instrument(request.symbol)
        return replace(request, symbol=instrument.symbol if instrument else request.symbol.upper())
