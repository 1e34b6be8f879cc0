"""The price path of a synthetic instrument, computed for any day without the days before it.

Each minute's open, high, low, close and volume follow from a hash of (seed, instrument, day, minute), anchored between
slowly varying daily levels; the seconds of a minute are drawn inside it so that they add up to it exactly. Prices are whole
points. Only integer operations, sums and products of floats are used, so that every machine computes the same bars.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ktrdr_pipelines.domain.arrays import FloatArray, IntArray

_U64 = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def scramble(values: _U64) -> _U64:
    """splitmix64's finaliser: a well-mixed 64-bit number for each input number."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def hash_text(text: str) -> int:
    """A 63-bit number from ``text``, the same in every process (unlike Python's own `hash`)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, eq=False)
class Minutes:
    """Minutes of several sessions: arrays of shape (sessions, minutes a session)."""

    open: IntArray
    high: IntArray
    low: IntArray
    close: IntArray
    volume: IntArray


class PricePath:
    """``key`` names the path (market seed and instrument), ``base`` its typical price in points."""

    def __init__(self, key: str, base: int, *, volatility: float, mean_volume: int, activity: float = 1.0) -> None:
        self._key = np.uint64(hash_text(key))
        self._base = base
        self._volatility = volatility
        self._mean_volume = mean_volume
        self._activity = activity

    def _noise(self, stream: int, counters: IntArray) -> _U64:
        with np.errstate(over="ignore"):
            salted = counters.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + self._key + np.uint64(stream)
        return scramble(scramble(salted))

    def _levels(self, days: IntArray) -> FloatArray:
        """The price at the open of each day, as a multiple of the base: smooth noise of many periods, within 0.4 to 1.6."""
        level = np.ones(len(days))
        for octave in range(12):
            period = 1 << octave
            left, part = days // period, (days % period) / period
            ends = [
                (self._noise(1000 + octave, edge) >> np.uint64(11)) / float(1 << 53) - 0.5 for edge in (left, left + 1)
            ]
            level += 0.0125 * (1 << (octave // 2)) * (ends[0] * (1.0 - part) + ends[1] * part)
        return np.clip(level, 0.4, 1.6)

    def minutes(self, days: IntArray, per_session: int) -> Minutes:
        """All minutes of the sessions dated ``days`` (days since 1970-01-01)."""
        bits = self._noise(1, days[:, None] * 2048 + np.arange(per_session))
        # Four bytes added up are nearly normal, with a standard deviation of 148.
        step = np.full(bits.shape, -510.0)
        for k in range(4):
            step += (bits >> np.uint64(8 * k)) & np.uint64(0xFF)
        walk = np.cumsum(step, axis=1) * (self._volatility / 148.0)
        fraction = np.arange(1, per_session + 1) / per_session
        today, tomorrow = self._levels(days)[:, None], self._levels(days + 1)[:, None]
        relative = today + (tomorrow - today) * fraction + (walk - walk[:, -1:] * fraction)
        close = np.maximum(np.rint(relative * self._base).astype(np.int64), 50)
        first = np.maximum(np.rint(today * self._base).astype(np.int64), 50)
        open_ = np.concatenate([first, close[:, :-1]], axis=1)
        reach = max(1, round(self._volatility * self._base * 2))
        above = ((bits >> np.uint64(32)) & np.uint64(0xFF)).astype(np.int64) * reach // 256
        below = ((bits >> np.uint64(40)) & np.uint64(0xFF)).astype(np.int64) * reach // 256
        high = np.maximum(open_, close) + above
        low = np.maximum(np.minimum(open_, close) - below, 1)
        spread = ((bits >> np.uint64(48)) & np.uint64(0xFFFF)).astype(np.int64)
        volume = 1 + self._mean_volume * spread // 32768
        if self._activity < 1.0:
            quiet = (self._noise(2, days[:, None] * 2048 + np.arange(per_session)) >> np.uint64(11)) / float(1 << 53)
            volume = np.where(quiet < self._activity, volume, 0)
        return Minutes(open_, high, low, close, volume)

    def seconds(
        self, counters: IntArray, open_: IntArray, high: IntArray, low: IntArray, close: IntArray, volume: IntArray
    ) -> Minutes:
        """The 60 seconds of each given minute, arrays of shape (minutes, 60). ``counters``: a fixed number per minute.

        The seconds of a minute begin at its open, touch its high and its low, end at its close, and share its volume.
        """
        bits = self._noise(3, counters)
        one = 1 + ((bits & np.uint64(0xFFFF)) % np.uint64(28)).astype(np.int64)
        two = 30 + (((bits >> np.uint64(16)) & np.uint64(0xFFFF)) % np.uint64(28)).astype(np.int64)
        high_first = ((bits >> np.uint64(32)) & np.uint64(1)).astype(bool)
        first_price, second_price = np.where(high_first, high, low), np.where(high_first, low, high)
        at = np.arange(60)[None, :]
        leg = np.where(at <= one[:, None], 0, np.where(at <= two[:, None], 1, 2))
        starts = np.stack([np.full_like(one, -1), one, two], axis=1)
        stops = np.stack([one, two, np.full_like(one, 59)], axis=1)
        start_price = np.stack([open_, first_price, second_price], axis=1)
        stop_price = np.stack([first_price, second_price, close], axis=1)
        pick = [np.take_along_axis(edge, leg, axis=1) for edge in (starts, stops, start_price, stop_price)]
        ends = pick[2] + (pick[3] - pick[2]) * (at - pick[0]) // (pick[1] - pick[0])
        begins = np.concatenate([open_[:, None], ends[:, :-1]], axis=1)
        share, rest = volume[:, None] // 60, volume[:, None] % 60
        turn = ((bits >> np.uint64(40)) % np.uint64(60)).astype(np.int64)[:, None]
        return Minutes(
            begins, np.maximum(begins, ends), np.minimum(begins, ends), ends, share + ((at + turn) % 60 < rest)
        )
