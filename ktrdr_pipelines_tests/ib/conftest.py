"""For every test of this folder: the other client library is not imported, by whatever way a connection was made."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from ktrdr_pipelines_tests.ib.chosen_library import OTHER


@pytest.fixture(autouse=True)
def only_the_chosen_library() -> Iterator[None]:
    yield
    assert OTHER not in sys.modules
