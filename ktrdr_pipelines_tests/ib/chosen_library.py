"""The client library that the tests of this folder run with: `make test-ib-async` runs them with ib_async."""

from __future__ import annotations

import os

LIBRARY = os.environ.get("IB_LIBRARY") or "ib_insync"
"""Read at import: the tests themselves see no settings of the environment."""
OTHER = "ib_async" if LIBRARY == "ib_insync" else "ib_insync"
