"""Types of the numpy arrays that carry instants (int64 epoch seconds), values and masks. One-dimensional unless stated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
