"""A running Dagster web server shows the universe as it is: its code location is reloaded when the universe file changes.

Definitions are made once per load of the code location, in a process of Dagster's own, so a new series would wait for a
person to press "Reload". `ui.py` has this watch look every second instead. Reloading is asked for through GraphQL; the
daemon follows the code server by itself, and runs that are going finish in the old one.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.settings import Settings
from ktrdr_pipelines.universe.file import universe_of

LOCATION = "ktrdr_pipelines"
"""The name that workspace.yaml gives it."""

_RELOAD_WITHIN_S = 120.0
_MUTATION = """mutation Reload($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) { __typename
  ... on WorkspaceLocationEntry { locationOrLoadError { __typename ... on PythonError { message } } }
  ... on ReloadNotSupported { message } ... on RepositoryLocationNotFound { message }
  ... on UnauthorizedError { message } ... on PythonError { message } } }"""

_Mark = tuple[int, int, int] | None
_Shown = dict[Series, int]
"""The series and the conId that each names: no part of a series' equality, but of what is asked of IB."""


class UniverseWatch:
    """Looks at the universe file of ``settings``; make it before the web server at ``url`` starts, then call `look`."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._url = url
        self._mark: _Mark = self._find_mark()
        self._loaded = self._read()
        self._said = ""

    def look(self) -> str | None:
        """Reload if the file means other series now. What a person should know about that, None if nothing.

        A file that cannot be read changes nothing: what is shown stays, and the reason is told once.
        """
        mark = self._find_mark()
        if mark == self._mark:
            return None
        found = self._read()
        if isinstance(found, str):
            self._mark = mark
            return self._say(f"{found} The UI shows the series as before.")
        if found != self._loaded:
            try:
                reload_location(self._url)
            except (OSError, ValueError) as error:  # looked at again: the mark stays
                return self._say(f"the changed universe is not shown yet, the web server did not reload: {error}")
        before, self._loaded, self._mark, self._said = self._loaded, found, mark, ""
        return _describe(before, found)

    def _say(self, text: str) -> str | None:
        if text == self._said:
            return None
        self._said = text
        return text

    def _find_mark(self) -> _Mark:
        try:
            state = self._settings.universe_path.stat()
        except OSError:
            return None
        return (state.st_mtime_ns, state.st_size, state.st_ino)

    def _read(self) -> _Shown | str:
        try:
            return {series: series.instrument.con_id for series in universe_of(self._settings)}
        except InputError as error:
            return str(error)


def _describe(before: _Shown | str, after: _Shown) -> str | None:
    if before == after:
        return None
    old = {} if isinstance(before, str) else before
    changes = [
        f"{sign}{each}"
        for sign, some in (("+", after.keys() - old), ("-", old.keys() - after))
        for each in sorted(map(str, some))
    ]
    changes += sorted(
        f"{each} by conId {con_id or 'that IB finds'}"
        for each, con_id in after.items()
        if old.get(each, con_id) != con_id
    )
    shown = ", ".join(changes[:5]) + (", …" if len(changes) > 5 else "")
    return f"universe changed, {len(after)} series are shown now: {shown}"


def reload_location(url: str) -> None:
    """Have the web server at ``url`` load the definitions anew, and wait for it.

    Raises:
        OSError: it cannot be reached. ValueError: it refused, or the definitions cannot be loaded; says why.
    """
    body = json.dumps({"query": _MUTATION, "variables": {"name": LOCATION}}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_RELOAD_WITHIN_S) as answer:
            told = json.load(answer)["data"]["reloadRepositoryLocation"]
    except (KeyError, TypeError) as error:
        raise ValueError("it answered something else") from error
    problem = told.get("message") or (told.get("locationOrLoadError") or {}).get("message")
    if problem:
        raise ValueError(" ".join(problem.split())[:300])
