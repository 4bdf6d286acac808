"""Random numbers that every worker can draw alike: each depends only on where it is used. Local."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64: its increment, and the factors of its two rounds."""
WORD = (1 << 64) - 1
BITS = {torch.float32: 24, torch.float64: 53}
"""The bits of a dtype's significand; that many random bits fit a number below 1 exactly."""


def seed_of(*numbers: int) -> int:
    """Returns 64 bits, as an int, that depend on the whole numbers and their order."""
    seed = 0
    for number in numbers:
        seed = _mixed((seed ^ number) + GOLDEN & WORD)
    return seed


@dataclass(frozen=True)
class Draws:
    """The random numbers that a stretch of a bucket can draw in one round."""

    common: int = 0
    """The seed made of the round and the bucket; all workers have the same, for payloads and the answer."""
    own: int = 0
    """The seed that differs between workers; for the server's answer all who run the server have the same."""
    first: int = 0
    """The element of the bucket with which the stretch begins."""

    @classmethod
    def of(cls, rounds: int, bucket: int, worker: int | None, first: int = 0) -> Draws:
        """Returns the draws of round `rounds` for the payload of `worker`, or (None) the server's answer."""
        common = seed_of(rounds, bucket)
        return cls(common, seed_of(common, 0 if worker is None else worker + 1), first)

    def uniform(self, start: int, count: int, dtype: torch.dtype, device: torch.device, own: bool) -> Tensor:
        """Returns numbers in [0, 1) for `count` elements from element `start` of the stretch, [count].

        They have the same bits on every device, and however the bucket is cut into stretches.
        """
        seed, begin = self.own if own else self.common, self.first + start
        numbers = torch.arange(begin, begin + count, device=device) * _signed(GOLDEN) + _signed(seed)
        for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):  # as in _mixed, on int64
            numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
        bits = BITS[dtype]
        return _shifted(numbers ^ _shifted(numbers, 31), 64 - bits).to(dtype) * 2.0**-bits


def _mixed(number: int) -> int:
    """Computes SplitMix64's output function."""
    number = (number ^ number >> 30) * FIRST_FACTOR & WORD
    number = (number ^ number >> 27) * SECOND_FACTOR & WORD
    return number ^ number >> 31


def _signed(number: int) -> int:
    """Returns the signed number that has the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Returns int64 `numbers` shifted right `by` bits, as if they were unsigned."""
    return (numbers >> by) & ((1 << 64 - by) - 1)
