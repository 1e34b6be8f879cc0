"""Dagster's web server and daemon, for an entry point whose loads Dagster's queue executes: found, or started and ended.

Loads are submitted through the web server (`submission.py`) and executed by the daemon. In this order: the address that
`KTRDR_DAGSTER_URL` gives; the one that a running process of this Dagster home has published (`ktrdr ui`, or an earlier start);
else `dagster dev` is started here. It ends with the process that started it, also when that one is killed: a small parent
process watches its standard input. A load that is executed then goes on to its end, and the queue waits in Dagster's records.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ktrdr_pipelines.errors import TransientError
from ktrdr_pipelines.ib.processes import Owner, current_owner
from ktrdr_pipelines.orchestration.runs.instance import provided_file
from ktrdr_pipelines.settings import Settings, as_environment, load_settings

log = logging.getLogger(__name__)

READY_WITHIN_S = 120.0
LOOK_EVERY_S = 10.0
END_WITHIN_S = 40.0
_STEP_S = 0.25


class DagsterServices:
    """The Dagster that executes loads. `start` keeps one there until `stop`; safe for threads.

    ``notify`` is called with a sentence when one was started.
    """

    def __init__(self, settings: Settings, notify: Callable[[str], None] = log.info) -> None:
        self._settings = settings
        self._notify = notify
        self._mutex = threading.Lock()
        self._is_stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self, at_each_look: Callable[[], object] = lambda: None) -> None:
        """Find or start Dagster now, and look every `LOOK_EVERY_S` whether it still answers; in a thread."""
        self._thread = threading.Thread(target=self._keep, args=(at_each_look,), daemon=True, name="dagster-services")
        self._thread.start()

    def address(self) -> str:
        """URL of the web server, which answers. Starts one where there is none, which takes 10 to 20 s.

        Raises:
            TransientError: it does not answer.
        """
        if self._settings.dagster_url:
            return self._settings.dagster_url
        with self._mutex:
            deadline = time.monotonic() + READY_WITHIN_S
            while not self._is_stopping.is_set() and time.monotonic() < deadline:
                if found := find_address(self._settings):
                    return found
                self._ensure_child()
                self._is_stopping.wait(_STEP_S)
        raise TransientError(
            "Dagster, which executes loads, does not answer", advice="Ask again in a minute; see the server's output."
        )

    def stop(self) -> None:
        """End what was started here. Harmless when repeated."""
        self._is_stopping.set()
        with self._mutex:
            child, self._child = self._child, None
        if child is not None:
            _end(child)
        if self._thread is not None:
            self._thread.join(END_WITHIN_S)

    def _keep(self, at_each_look: Callable[[], object]) -> None:
        while not self._is_stopping.is_set():
            try:
                at_each_look()
                self.address()
            except Exception as error:  # noqa: BLE001 - the next look may succeed; without the thread no load is executed
                if not self._is_stopping.is_set():
                    log.error("looking after Dagster: %s", error)
            self._is_stopping.wait(LOOK_EVERY_S)

    def _ensure_child(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        environment = {**os.environ, **as_environment(self._settings)}
        environment.pop("KTRDR_API_TOKEN", None)
        if self._child is None:
            self._notify(
                "no Dagster UI runs on this DAGSTER_HOME: starting web server and daemon, which runs the sensors too"
            )
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ktrdr_pipelines.orchestration.runs.dagster_services"],
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the terminal is for the parent, which then ends this
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
    try:
        child.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


# -- the address ---------------------------------------------------------------------------------------------------------


@contextmanager
def published(settings: Settings, url: str) -> Iterator[None]:
    """Inside the block other processes of this Dagster home find the web server at ``url``."""
    owner = current_owner()
    path = _address_file(settings)
    temporary = path.with_suffix(f".{owner.pid}")
    temporary.write_text(json.dumps({"url": url, "owner": [owner.host, owner.pid, owner.started]}), encoding="utf-8")
    temporary.replace(path)
    try:
        yield
    finally:
        if _read_address(settings) == (url, owner):
            path.unlink(missing_ok=True)


def find_address(settings: Settings) -> str:
    """URL of the published web server, if its process lives and it answers; else empty."""
    url, owner = _read_address(settings)
    return url if owner is not None and owner.is_alive() and is_answering(url) else ""


def is_answering(url: str) -> bool:
    """True if a Dagster web server answers at ``url``."""
    try:
        with urllib.request.urlopen(f"{url}/server_info", timeout=5) as answer:
            return "dagster_webserver_version" in json.loads(answer.read(10_000))
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _address_file(settings: Settings) -> Path:
    return settings.dagster_home / "web_server.json"


def _read_address(settings: Settings) -> tuple[str, Owner | None]:
    try:
        found = json.loads(_address_file(settings).read_text(encoding="utf-8"))
        host, pid, started = found["owner"]
        return str(found["url"]), Owner(str(host), int(pid), str(started))
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


# -- the process between -------------------------------------------------------------------------------------------------


def main() -> int:
    """Run `dagster dev` on a free port of this machine until standard input ends, and publish its address."""
    settings = load_settings()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(provided_file("workspace.yaml"))]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # a child that inherits ignored signals could not be ended
    # Started in the home: a `.env` in the current directory would override DAGSTER_HOME (docs/dagster_facts.md, 1).
    child = subprocess.Popen(
        [*command, "-h", "127.0.0.1", "-p", str(port), "--log-level", "warning"],
        env={**os.environ, "PWD": str(settings.dagster_home)},
        cwd=settings.dagster_home,
        stdin=subprocess.DEVNULL,
    )

    def end() -> None:
        # It alone, not its group: processes that execute runs are left to finish.
        if child.poll() is None:
            child.send_signal(signal.SIGINT)

    def watch() -> None:
        sys.stdin.buffer.read()
        end()

    threading.Thread(target=watch, daemon=True, name="watch").start()
    try:
        while child.poll() is None and not is_answering(url):
            time.sleep(_STEP_S)
        with published(settings, url):
            return child.wait()
    except KeyboardInterrupt:
        end()
        return child.wait()


if __name__ == "__main__":
    sys.exit(main())
