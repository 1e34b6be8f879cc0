"""ktrdr pipelines: Interactive Brokers historical bars as Dagster partitions, one clean CSV per series.

For notebooks and scripts:

    import ktrdr_pipelines as ktrdr

    ktrdr.load("AAPL", "1h")                                # fill from the last held bar to now
    bars = ktrdr.read_bars("AAPL", "1h", "2024-01-01")      # a DataFrame

`load` and `read_bars` are in `notebook.py` and imported when they are first used, so that `ktrdr --help` stays quick. To read
the code, start at `domain/` (the nouns) and `loading/machine.py` (what a load decides).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktrdr_pipelines.notebook import IncompleteBars, load, read_bars

__all__ = ["IncompleteBars", "load", "read_bars"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.notebook"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
