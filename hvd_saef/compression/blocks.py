"""A bucket's flat memory and the blocks that it is cut into: compressors see nothing else. Local."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hvd_saef.compression.draws import Draws
from hvd_saef.kernels import Pieces, Stretch


@dataclass(frozen=True)
class Run:
    """`count` blocks of `size` elements each, one after the other from element `start`."""

    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        """The index of the element after the run's last one."""
        return self.start + self.size * self.count


@dataclass(frozen=True)
class Blocks:
    """The blocks into which flat memory of `dtype` is cut: runs of equal blocks, from element 0, no gaps."""

    runs: tuple[Run, ...]
    dtype: torch.dtype

    @classmethod
    def cut(cls, sizes: list[int], block_size: int | None, dtype: torch.dtype) -> Blocks:
        """Cuts tensors of `sizes` elements, laid end to end, into blocks of at most `block_size` elements.

        No block spans two tensors. With `block_size` None every tensor is one block.
        """
        runs: list[Run] = []
        start = 0
        for size in sizes:
            whole = min(size, block_size or size)
            for length, count in ((whole, size // whole if whole else 0), (size % whole if whole else 0, 1)):
                if length and count:
                    runs.append(Run(start, length, count))
                    start += length * count
        return cls(tuple(runs), dtype)

    @cached_property
    def numel(self) -> int:
        """The number of elements in all blocks."""
        return self.runs[-1].stop if self.runs else 0

    @cached_property
    def count(self) -> int:
        """The number of blocks."""
        return sum(run.count for run in self.runs)

    @cached_property
    def largest(self) -> int:
        """The number of elements of the largest block."""
        return max((run.size for run in self.runs), default=0)

    def table(self, kept: Callable[[int], int]) -> Tensor:
        """Returns the runs as kernels read them: int64, with rows start, size, count, kept(size). Cached."""
        if kept not in self._tables:
            rows = [(run.start, run.size, run.count, kept(run.size)) for run in self.runs]
            self._tables[kept] = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
        return self._tables[kept]

    @cached_property
    def _tables(self) -> dict[Callable[[int], int], Tensor]:
        return {}

    def nearest_boundary(self, element: int) -> int:
        """Returns the block boundary nearest to `element`, as an element index; of two as near, the lower."""
        for run in self.runs:
            if element <= run.stop:
                return run.start + (2 * (element - run.start) + run.size - 1) // (2 * run.size) * run.size
        return self.numel

    def between(self, start: int, stop: int) -> Blocks:
        """Returns the blocks between two block boundaries; `start` becomes element 0."""
        runs = []
        for run in self.runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                runs.append(Run(first - start, run.size, (last - first) // run.size))
        return Blocks(tuple(runs), self.dtype)


@dataclass(frozen=True)
class Memory:
    """The memory of whole blocks of a bucket on one worker, for one pass over it. All tensors are 1-D."""

    blocks: Blocks
    x: Tensor
    """The consensus point, [numel]. This and the other tensors have the blocks' dtype."""
    e: Tensor
    """This worker's error, [numel]."""
    s: Tensor | None
    """The server's error, [numel], if this worker steps ahead by it; else None."""
    parameter_memory: Sequence[Tensor]
    """The parameters' own memory in pieces, end to end [numel]; every run lies within one piece. Empty where
    the parameters are not gapless, or not of the blocks' dtype (unless `Fused.narrow`)."""
    alpha: float
    beta: float
    first: int = 0
    """The element of the bucket with which this memory begins."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameter_memory", Pieces.of(self.parameter_memory))

    def updated(self, runs: Tensor, payload: Tensor) -> Stretch:
        """Returns what kernels are given for row 4: e becomes Δ, and C(Δ) is written into `payload`."""
        if not self.parameter_memory:
            return Stretch(self.e, runs, payload)
        return Stretch(self.e, runs, payload, self.x, self.s, self.parameter_memory)

    def landed(self, runs: Tensor, sent: Tensor | None, payloads: Sequence[Tensor]) -> Stretch:
        """Returns what kernels are given for rows 6 and 2: `payloads` are added to x, `sent` settles e."""
        return Stretch(self.x, runs, sent, self.e, self.s, self.parameter_memory, payloads)


@dataclass(frozen=True)
class BlockedTensor:
    """Flat memory (1-D, contiguous, of the blocks' dtype and length) together with its blocks."""

    flat: Tensor
    blocks: Blocks
    draws: Draws = field(default_factory=Draws)

    def uniform(self, run: Run, own: bool = False) -> Tensor:
        """Returns random numbers in [0, 1) for a run's elements, [count, size], of the blocks' dtype.

        The numbers depend only on the round, the bucket and the element's place in the bucket. So all workers
        draw the same numbers when they encode, when they decode, and for the server's answer. With `own`,
        which is for encoding only, each worker draws its own numbers, and for the server's answer all who
        run the server draw the same.
        """
        numel = run.stop - run.start
        drawn = self.draws.uniform(run.start, numel, self.blocks.dtype, self.flat.device, own)
        return drawn.view(run.count, run.size)

    def rows(self) -> Iterator[tuple[Run, Tensor]]:
        """Yields each run with a view of its memory, [count, size]: one row for each block."""
        for run in self.blocks.runs:
            yield run, self.flat[run.start : run.stop].view(run.count, run.size)
