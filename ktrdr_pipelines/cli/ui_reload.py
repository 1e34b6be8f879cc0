"""Reloads the code location of a running Dagster web server when the universe file names other series.

Definitions are built once per load of the code location, in a process of Dagster's own: a new series would wait until a user
presses "Reload". The daemon follows the code server by itself, and runs that have begun finish in the old one.
"""

from __future__ import annotations

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import InputError, TransientError
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.store.atomic import state_of
from ktrdr_pipelines.universe.file import universe_of

LOCATION = "ktrdr_pipelines"
"""The location's name in workspace.yaml."""

_RELOAD_WITHIN_S = 120

_Loaded = dict[Series, int]
"""The conId by series: two series are equal whatever conId they name, but IB is asked by it."""


class UniverseWatch:
    """Compares the universe file of ``settings`` with what the web server at ``host`` and ``port`` has loaded.

    Create it before the web server starts, then call `look` regularly.
    """

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self._settings = settings
        self._host, self._port = host, port
        self._state = state_of(settings.universe_path)
        self._loaded = self._read()
        self._last_problem = ""

    def look(self) -> str | None:
        """Reload if the file names other series than those loaded. Returns what to show the user, None if nothing is new.

        An invalid file changes nothing; the problem is returned once. A failed reload is tried again at the next call.
        """
        state = state_of(self._settings.universe_path)
        if state == self._state:
            return None
        found = self._read()
        if isinstance(found, InputError):
            self._state = state
            return self._once(f"{found} The UI shows the series as before.")
        if found != self._loaded:
            try:
                reload_location(self._host, self._port)
            except TransientError as error:
                return self._once(str(error))
        before, self._loaded, self._state, self._last_problem = self._loaded, found, state, ""
        return _describe({} if isinstance(before, InputError) else before, found)

    def _once(self, problem: str) -> str | None:
        is_new, self._last_problem = problem != self._last_problem, problem
        return problem if is_new else None

    def _read(self) -> _Loaded | InputError:
        try:
            return {series: series.instrument.con_id for series in universe_of(self._settings)}
        except InputError as error:
            return error


def _describe(before: _Loaded, after: _Loaded) -> str | None:
    changes = [f"+{each}" for each in sorted(map(str, after.keys() - before))]
    changes += [f"-{each}" for each in sorted(map(str, before.keys() - after))]
    changes += sorted(
        f"{each} with conId {con_id or 'looked up at IB'}"
        for each, con_id in after.items()
        if before.get(each, con_id) != con_id
    )
    if not changes:
        return None
    shown = ", ".join(changes[:5]) + (", …" if len(changes) > 5 else "")
    return f"universe changed, {len(after)} series are shown now: {shown}"


def reload_location(host: str, port: int) -> None:
    """Make the web server load the definitions again, and wait for it.

    Raises:
        TransientError: the server cannot be reached, it refused, or the definitions cannot be loaded.
    """
    # Imported here: most runs of the command never need it, and it takes a second.
    from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError, ReloadRepositoryLocationStatus

    try:
        reloaded = DagsterGraphQLClient(host, port_number=port, timeout=_RELOAD_WITHIN_S).reload_repository_location(
            LOCATION
        )
    except DagsterGraphQLClientError as error:
        problem = str(error.__cause__ or error)
    else:
        if reloaded.status is ReloadRepositoryLocationStatus.SUCCESS:
            return
        problem = reloaded.message or str(reloaded.failure_type)
    raise TransientError(
        f"the web server at {host}:{port} did not reload: {' '.join(problem.split())[:300]}",
        doing="reloading the changed universe",
        advice="The UI shows the series as before; the reload is tried again.",
    )
