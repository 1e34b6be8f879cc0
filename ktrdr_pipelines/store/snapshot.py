"""A series as the next load would find it, without a change to its files.

Reading through `Store` adopts a foreign file, which is right for a load and wrong for a question. Here such files are copied
to a scratch folder and settled there (`settle.py`). Files that nothing else touched are read where they are, which costs two
looks at their state.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.store import settle
from ktrdr_pipelines.store.atomic import explained
from ktrdr_pipelines.store.settle import Prepared
from ktrdr_pipelines.store.store import Store


@contextmanager
def peek(store: Store, series: Series, *, now: datetime) -> Iterator[tuple[Store, Prepared]]:
    """A store in which the files of ``series`` are settled, and what the next load will have to correct in the real one.

    Read from the store inside the block only, and nothing but ``series``. What is yielded names no backup, since none was made.

    Raises:
        DataError: the CSV is no bar file.
        StoreError: the sidecar is a newer program's, or the disk refuses.
    """
    doing = f"looking at {series}"
    if store.is_as_left(series):
        yield store, Prepared()
        return
    with tempfile.TemporaryDirectory(prefix="ktrdr-") as folder:
        scratch = Store(Path(folder))
        for source, target in zip(store.paths(series), scratch.paths(series), strict=True):
            # Another process may remove a file in between. copy2 keeps the time of change.
            with explained(source, doing), suppress(FileNotFoundError):
                shutil.copy2(source, target)
        with _without_log():
            found = scratch.prepare(series, now=now)
        adopted = replace(found.adopted, backup=None) if found.adopted else None
        corrupt = store.sidecar_path(series) if found.corrupt_sidecar else None
        yield scratch, replace(found, adopted=adopted, corrupt_sidecar=corrupt)


@contextmanager
def _without_log() -> Iterator[None]:
    """Suppress the log of `settle.py` in this thread: users need not hear of a scratch copy."""
    here = threading.get_ident()
    log = logging.getLogger(settle.__name__)

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != here

    log.addFilter(is_of_others)
    try:
        yield
    finally:
        log.removeFilter(is_of_others)
