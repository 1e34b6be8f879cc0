"""The compose file as this machine can run it: read, interpolated as an engine would, each service as a process.

No container engine is asked for. What an engine would provide is put in its place here and nowhere else (`Here`); commands,
environments and health checks are those of the files in `deploy/`, to the letter otherwise.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class MissingVariable(Exception):
    """A variable without a value that the file calls for; an engine ends with its message."""


def interpolate(node: Any, variables: Mapping[str, str]) -> Any:
    """``node`` of a compose file with its ``${...}`` filled in from ``variables`` alone.

    Raises:
        MissingVariable: ``${NAME:?message}`` without a value.
    """
    if isinstance(node, dict):
        return {key: interpolate(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def fill(match: re.Match[str]) -> str:
        name, kind, word = match.groups()
        if variables.get(name):
            return variables[name]
        if kind == "?":
            raise MissingVariable(f"{name}: {word}")
        return word or ""

    return _VARIABLE.sub(fill, node)


def read_compose() -> dict[str, Any]:
    """The compose file, not interpolated."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # type: ignore[no-any-return]


def image_environment() -> dict[str, str]:
    """The variables that the image sets (the Dockerfile's last ENV), except PATH."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    last = [line for line in lines if line.startswith("ENV ")][-1]
    return {name: value for name, _, value in (p.partition("=") for p in last.split()[1:]) if name != "PATH"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Here:
    """What stands here for what an engine provides: the one place of substitutions.

    Volumes are folders below ``base``; every container's address is this machine's loopback; ports that might be taken here
    are free ones; programs are those of this Python environment.
    """

    base: Path
    postgres: Path
    ports: dict[str, int] = field(default_factory=lambda: {p: free_port() for p in ("4000", "3000", "8000")})

    def text(self, text: str) -> str:
        if text in self.ports:
            return str(self.ports[text])
        text = text.replace("/var/lib/ktrdr", str(self.base)).replace("/etc/ktrdr", str(self.base))
        text = text.replace("0.0.0.0", "127.0.0.1").replace("//webserver:", "//127.0.0.1:")
        for port, instead in self.ports.items():
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{instead}")
        return str(self.postgres) if text == "postgres" else text  # the server's name, as the folder of its socket

    def command(self, words: list[str]) -> list[str]:
        program, *arguments = words
        return [str(Path(sys.executable).parent / program), *(self.text(word) for word in arguments)]

    def lay_out(self) -> None:
        """Volumes and mounted files."""
        for folder in ("data", "dagster_home"):
            (self.base / folder).mkdir(parents=True)
        (self.base / "dagster_home" / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
        workspace = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())
        server = workspace["load_from"][0]["grpc_server"]
        assert server["host"] in read_compose()["services"], "the workspace names a service that does not exist"
        server["host"], server["port"] = "127.0.0.1", self.ports[str(server["port"])]
        (self.base / "workspace.yaml").write_text(yaml.safe_dump(workspace))


class Stack:
    """Services of the compose file as processes. Leaving the block ends them."""

    def __init__(self, here: Here, variables: Mapping[str, str]) -> None:
        self.here = here
        self.variables = variables
        self.services: dict[str, dict[str, Any]] = interpolate(read_compose()["services"], variables)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        here.lay_out()

    def environment(self, service: str) -> dict[str, str]:
        """What the image and the compose file set, and of this machine only where its programs and this project are."""
        said = image_environment() | self.services[service].get("environment", {})
        # A name without a value is passed through where it is set.
        said = {name: self.variables.get(name) if value is None else value for name, value in said.items()}
        return {name: self.here.text(str(value)) for name, value in said.items() if value is not None} | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "PWD": str(self.here.base),
        }

    def _popen(self, service: str, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.here.base / f"{service}.log").open("ab") as log:
            return subprocess.Popen(
                self.here.command(words), env=self.environment(service), cwd=self.here.base,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def start(self, service: str) -> None:
        self.running[service] = self._popen(service, self.services[service]["command"])

    def run_to_end(self, service: str) -> None:
        """Run a service that does its work and ends."""
        assert self._popen(service, self.services[service]["command"]).wait(60) == 0, self.logs()

    def listens(self, port: str) -> bool:
        """Whether anything does at a port of the compose file: cheap to ask, before a health check that is not."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.here.ports[port])) == 0

    def is_healthy(self, service: str) -> bool:
        """By the service's own health check."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self._popen(service, words).wait(60) == 0

    def wait_until(self, condition: Callable[[], bool], what: str, tries: int = 60) -> None:
        for _ in range(tries):
            gone = {name: child.returncode for name, child in self.running.items() if child.poll() is not None}
            assert not gone, f"ended while waiting for {what}: {gone}\n{self.logs()}"
            if condition():
                return
            threading.Event().wait(0.2)  # the processes waited for need the processor
        raise AssertionError(f"timed out waiting for {what}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.here.base.glob("*.log")))

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self.running.values()):
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
        for child in self.running.values():
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(5)
