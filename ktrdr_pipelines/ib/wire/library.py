"""The client library that encodes requests and decodes answers: ib_insync, or ib_async by the setting ``IB_LIBRARY``.

The only importer of either. In use, all public and the same in both (ib_insync 0.9.86, ib_async 2.1.0): the requests of
``Client`` with their encoding and the limit of 45 messages a second, ``Decoder.interpret`` with a wrapper of our
own (`answers.py`), ``Contract``, ``parseIBDatetime``. Not in use: ``IB`` and its wrapper, which answer an error
with an empty list; ``Client.connectAsync`` and the library's socket, for the reasons in `handshake.py` and `message_socket.py`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ktrdr_pipelines.errors import ConfigurationError
from ktrdr_pipelines.ib.wire.message_socket import MessageSocket

LIBRARIES = ("ib_insync", "ib_async")


_DOING = "loading the client library"


@dataclass(frozen=True)
class Library:
    """The parts of one library that are used. ``parse_time``: a date or instant of a message, as `date` or `datetime`."""

    client: type[Any]
    decoder: type[Any]
    contract: type[Any]
    parse_time: Callable[[str], date]

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest server version whose messages the library reads."""
        return int(self.client.MinClientVersion), int(self.client.MaxClientVersion)

    def requests_over(self, socket: MessageSocket, client_id: int, server_version: int) -> Any:
        """The library's client, whose requests go out over ``socket``: one method per request, named as in IB's API."""

        class Requests(self.client):  # type: ignore[misc, name-defined]
            def serverVersion(self) -> int:  # noqa: N802 - the library's name
                return server_version

            def isConnected(self) -> bool:  # noqa: N802 - the library's name
                return socket.isConnected()

        requests = Requests(None)
        requests.conn, requests.clientId = socket, client_id
        return requests


def load_library(name: str) -> Library:
    """Import the library called ``name``. To be called in a thread that has an event loop: eventkit, which both are built on,
    asks for it when it is imported (docs/dependencies.md, ib_insync as it behaves).

    Raises:
        ConfigurationError: another name than those of `LIBRARIES`, not installed, or its installation is damaged.
    """
    if name not in LIBRARIES:
        raise ConfigurationError(
            f"{name!r} is not a client library", doing=_DOING, advice=f"Set IB_LIBRARY to {' or '.join(LIBRARIES)}."
        )
    try:
        client, decoder, contract, util = (
            importlib.import_module(f"{name}.{module}") for module in ("client", "decoder", "contract", "util")
        )
    except ImportError as error:
        raise ConfigurationError(
            f"the client library {name} cannot be imported ({error})",
            doing=_DOING,
            advice=_explain_import(name),
        ) from error
    # What the library logs as an error reaches the caller as an exception; twice would confuse.
    logging.getLogger(name).setLevel(logging.CRITICAL)
    return Library(client.Client, decoder.Decoder, contract.Contract, util.parseIBDatetime)


def _explain_import(name: str) -> str:
    if name == "ib_async" and not _is_installed("ib_async"):
        return "Install the extra `ib-async`, or set IB_LIBRARY=ib_insync."
    # Both libraries bring a package called eventkit, by different distributions: uninstalling one removes the other's files.
    return f"Reinstall {name} with its dependencies: pip install --force-reinstall {name}"


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
