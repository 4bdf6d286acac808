"""Random numbers that every worker can draw alike: functions of where they are used, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's: an increment, and what its two rounds multiply by."""
WORD = (1 << 64) - 1
BITS = {torch.float32: 24, torch.float64: 53}
"""Of a dtype's significand: so many fill a number below 1 exactly."""


def seed_of(*numbers: int) -> int:
    """64 bits made of whole numbers and their order."""
    seed = 0
    for number in numbers:
        seed = _mixed((seed ^ number) + GOLDEN & WORD)
    return seed


@dataclass(frozen=True)
class Draws:
    """What a stretch of a bucket draws in one round."""

    common: int = 0
    """From the round and the bucket: the same on all workers, for what they send and for the answer."""
    own: int = 0
    """The same, but another one on each worker; all who run the server have one for that."""
    first: int = 0
    """The element of the bucket with which the stretch begins."""

    @classmethod
    def of(cls, rounds: int, bucket: int, worker: int | None, first: int = 0) -> Draws:
        """Those of round number `rounds`, for `worker`'s payload or (None) the server's answer."""
        common = seed_of(rounds, bucket)
        return cls(common, seed_of(common, 0 if worker is None else worker + 1), first)

    def uniform(self, start: int, count: int, dtype: torch.dtype, device: torch.device, own: bool) -> Tensor:
        """Numbers in [0, 1) for `count` elements from element `start` of the stretch, [count].

        The same bits on every device, and however the bucket is cut into stretches.
        """
        seed, begin = self.own if own else self.common, self.first + start
        numbers = torch.arange(begin, begin + count, device=device) * _signed(GOLDEN) + _signed(seed)
        for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):  # as in _mixed, on int64
            numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
        bits = BITS[dtype]
        return _shifted(numbers ^ _shifted(numbers, 31), 64 - bits).to(dtype) * 2.0**-bits


def _mixed(number: int) -> int:
    """SplitMix64's output function."""
    number = (number ^ number >> 30) * FIRST_FACTOR & WORD
    number = (number ^ number >> 27) * SECOND_FACTOR & WORD
    return number ^ number >> 31


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Shifted right as unsigned numbers."""
    return (numbers >> by) & ((1 << 64 - by) - 1)
