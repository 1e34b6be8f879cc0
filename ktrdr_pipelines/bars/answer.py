"""The answer to one request, as bars see it: columns as IB sent them. No implementation here.

`ib/wire/decoding.py` makes the real ones, tests bring fakes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Answer(Protocol):
    """Bars of one request as IB sent them; see `ib.wire.decoding.RawBars`."""

    @property
    def opens_s(self) -> IntArray: ...
    @property
    def open(self) -> FloatArray: ...
    @property
    def high(self) -> FloatArray: ...
    @property
    def low(self) -> FloatArray: ...
    @property
    def close(self) -> FloatArray: ...
    @property
    def volume(self) -> FloatArray: ...
    @property
    def no_data_text(self) -> str: ...
