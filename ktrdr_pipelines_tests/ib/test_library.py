"""The choice of the client library: the one that was asked for, or an error that names the remedy."""

from __future__ import annotations

import sys

import pytest

from ktrdr_pipelines.errors import ConfigurationError
from ktrdr_pipelines.ib.wire import library
from ktrdr_pipelines.ib.wire.library import load_library
from ktrdr_pipelines_tests.ib.chosen_library import LIBRARY
from ktrdr_pipelines_tests.ib.scripted_gateway import ScriptedGateway
from ktrdr_pipelines_tests.ib.test_client import make_client


def test_the_chosen_library_serves_the_connection() -> None:
    """It is imported, and by its range of versions the gateway knows which one it is."""
    newest = {"ib_insync": 176, "ib_async": 178}[LIBRARY]
    with ScriptedGateway() as gateway, make_client(gateway.port) as session:
        assert session.library_parts.versions == (157, newest)
    assert LIBRARY in sys.modules


@pytest.mark.parametrize(("name", "remedy"), [("ib_insync", "--force-reinstall ib_insync"), ("ib_async", "ib-async")])
def test_a_library_that_cannot_be_imported_is_named_with_its_remedy(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was never installed, or whose files the removal of the other one took away."""
    monkeypatch.setitem(sys.modules, f"{name}.client", None)
    monkeypatch.setattr(library, "_is_installed", lambda _: False)
    with pytest.raises(ConfigurationError, match=name) as caught:
        load_library(name)
    assert remedy in caught.value.advice


def test_an_unknown_library_is_refused() -> None:
    """The setting allows none; whoever builds an address by hand gets the names."""
    with pytest.raises(ConfigurationError, match="ibapi") as caught:
        load_library("ibapi")
    assert "ib_insync or ib_async" in caught.value.advice


def test_a_connection_with_a_missing_library_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error reaches the caller, and the next try may succeed."""
    monkeypatch.setitem(sys.modules, f"{LIBRARY}.client", None)
    session = make_client(1)
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            session.connect()
