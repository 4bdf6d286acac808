"""Scaled sign in plain torch: payloads of scales (or values), and of sign bits. Local.

A stretch is worked on at once: the number of torch operations hardly depends on its tensors. (Only runs of
several blocks whose length is no multiple of 16 take some operations each.)
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef.kernels.operations import Stretches
from hvd_saef.kernels.twins.trees import LANES, Stage, stages, sums

KEPT_PLANS = 128
"""How many plans are kept; the least recently used ones go."""


@dataclass(frozen=True)
class _Run:
    """`count` blocks of `size` elements; `whole` blocks travel as they are."""

    size: int
    count: int
    whole: bool

    @property
    def numel(self) -> int:
        return self.size * self.count

    @property
    def lines(self) -> int:
        """The lines of a block in the summation tree; they have two bytes of signs each."""
        return -(-self.size // LANES)

    @property
    def octets(self) -> int:
        """The bytes of a block's signs."""
        return -(-self.size // 8)

    @property
    def numbers(self) -> int:
        """How many numbers the run has in the payload's first part."""
        return self.numel if self.whole else self.count


@dataclass(frozen=True)
class _Plan:
    """What is known of a stretch beforehand. Tensors are on the stretch's device."""

    runs: tuple[_Run, ...]
    numbers: int
    """How many numbers the payload begins with."""
    bytes: int
    zeros: Tensor
    """A line of zeros."""
    minus_zero: Tensor
    """The number that changes nothing when it is added, [1]."""
    shifts: Tensor
    """The places of bits in a byte, uint8, [8]."""
    places: Tensor
    """The values of bits in a byte, uint8, [8]."""
    stages: tuple[Stage, ...]
    block_sizes: Tensor
    """The elements of the blocks that travel in part, float64."""
    sizes: Tensor
    """int64: the elements of each block; a run of whole blocks counts as one."""
    number_of: Tensor
    """int64, for each of `sizes`: which of the payload's numbers is its scale, counted from 1; 0 if whole."""
    plus: tuple[Tensor, ...]
    """Of each run of whole blocks: False for each of its elements."""

    def pieces(self, flat: Tensor) -> Sequence[Tensor]:
        """Returns the runs' parts of a stretch's memory."""
        return torch.split(flat, [run.numel for run in self.runs])

    def whole(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Returns those of the runs' pieces that travel as they are."""
        return [piece for piece, run in zip(pieces, self.runs, strict=True) if run.whole]

    def heads(self, payload: Tensor) -> Tensor:
        """Returns the payload's numbers; raises ValueError if it has another length."""
        if payload.numel() != self.bytes:
            raise ValueError(f"a sign payload of {payload.numel()} bytes: {self.bytes} were expected.")
        dtype = self.minus_zero.dtype
        return payload[: self.numbers * dtype.itemsize].clone().view(dtype)  # the clone is aligned

    def scales(self, heads: Tensor, of_whole: Tensor) -> Tensor:
        """Returns for each element its block's scale; `of_whole` for those of whole blocks."""
        of_blocks = torch.cat([of_whole, heads]).index_select(0, self.number_of)
        elements = sum(run.numel for run in self.runs)
        return of_blocks.repeat_interleave(self.sizes, output_size=elements)


@functools.lru_cache(KEPT_PLANS)
def _plan(table: bytes, dtype: torch.dtype, device: torch.device) -> _Plan:
    rows = array("q", table).tolist()
    columns = zip(rows[1::4], rows[2::4], rows[3::4], strict=True)
    runs = tuple(_Run(size, count, kept == size) for size, count, kept in columns)
    numbers, lines, block_sizes, sizes, number_of = 0, [], [], [], []
    for run in runs:
        if run.whole:
            sizes.append(run.numel)
            number_of.append(0)
        else:
            lines += run.count * [run.lines]
            block_sizes += run.count * [run.size]
            sizes += run.count * [run.size]
            number_of += range(numbers + 1, numbers + 1 + run.count)
        numbers += run.numbers
    bits = sum(run.count * run.octets for run in runs if not run.whole)
    # All is made on the CPU: a copy to a GPU is over when it returns, and so before other streams use it.
    plus = torch.zeros(1, dtype=torch.bool).to(device)
    shifts = torch.arange(8, dtype=torch.uint8)
    return _Plan(
        runs,
        numbers,
        numbers * dtype.itemsize + bits,
        torch.zeros(LANES, dtype=dtype).to(device),
        torch.full((1,), -0.0, dtype=dtype).to(device),
        shifts.to(device),
        (1 << shifts).to(device),
        stages(lines, device),
        torch.tensor(block_sizes, dtype=torch.float64).to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
        torch.tensor(number_of, dtype=torch.int64).to(device),
        tuple(plus.expand(run.numel) for run in runs if run.whole),
    )


def _plan_of(memory: Tensor, runs: Tensor) -> _Plan:
    return _plan(runs.numpy().tobytes(), memory.dtype, memory.device)


def sign_encode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_encode`."""
    for stretch in stretches:
        assert stretch.payload is not None
        plan, memory = _plan_of(stretch.memory, stretch.runs), stretch.memory
        pieces = plan.pieces(memory)
        padded = torch.cat([*_padded(plan, pieces), plan.zeros])
        magnitudes = padded.abs().double().view(-1, LANES)
        scales = (sums(magnitudes, plan.stages) / plan.block_sizes).to(memory.dtype)
        of_runs = iter(torch.split(scales, [run.count for run in plan.runs if not run.whole]))
        heads = [piece if run.whole else next(of_runs) for run, piece in zip(plan.runs, pieces, strict=True)]
        numbers = torch.cat([scales[:0], *heads]).view(torch.uint8)
        torch.cat([numbers, *_signs(plan, padded)], out=stretch.payload)
        if whole := plan.whole(pieces):
            torch._foreach_zero_(whole)


def _padded(plan: _Plan, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Returns the blocks that travel in part, end to end, each filled up with zeros to whole lines."""
    padded = []
    for run, piece in zip(plan.runs, pieces, strict=True):
        missing = run.lines * LANES - run.size
        if run.whole:
            continue
        if missing and run.count > 1:
            rows = torch.nn.functional.pad(piece.view(run.count, run.size), (0, missing))
            padded.append(rows.view(-1))
        else:
            padded += [piece, plan.zeros[:missing]] if missing else [piece]
    return padded


def _signs(plan: _Plan, padded: Tensor) -> list[Tensor]:
    """Returns the sign bits of the blocks in `padded`, uint8, the least significant bit first.

    Every block begins with a new byte. The bit of 0.0 is 0 and that of -0.0 is 1; unused bits are 0.
    """
    octets = (torch.signbit(padded).view(-1, 8) * plan.places).sum(-1, dtype=torch.uint8)
    runs = [run for run in plan.runs if not run.whole]
    pieces = torch.split(octets, [*(2 * run.count * run.lines for run in runs), 2])
    return [_without_rest(run, piece, run.octets) for run, piece in zip(runs, pieces[:-1], strict=True)]


def _without_rest(run: _Run, piece: Tensor, needed: int) -> Tensor:
    """Returns the first `needed` numbers of each block in `piece`, which may have more for each."""
    if piece.numel() == run.count * needed:
        return piece
    return piece.view(run.count, -1)[:, :needed].reshape(-1)


def sign_settle(stretches: Stretches) -> None:
    """See :meth:`Version.sign_settle`."""
    for stretch in stretches:
        assert stretch.payload is not None
        plan, memory = _plan_of(stretch.memory, stretch.runs), stretch.memory
        scales = plan.scales(plan.heads(stretch.payload), plan.zeros[:1])
        memory.sub_(torch.where(torch.signbit(memory), -scales, scales))


def sign_decode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_decode`."""
    for stretch in stretches:
        plan = _plan_of(stretch.memory, stretch.runs)
        for payload, weight in zip(stretch.payloads, weights, strict=True):
            heads = plan.heads(payload) * weight
            scales = plan.scales(heads, plan.minus_zero)
            minus = _minus(plan, payload[plan.numbers * heads.dtype.itemsize :])
            stretch.memory.add_(torch.where(minus, -scales, scales))
            if whole := plan.whole(plan.pieces(stretch.memory)):
                values = plan.whole(torch.split(heads, [run.numbers for run in plan.runs]))
                torch._foreach_add_(whole, values)


def _minus(plan: _Plan, octets: Tensor) -> Tensor:
    """Returns True for each element whose sign bit in `octets` is 1; False in whole blocks."""
    bits = ((octets.unsqueeze(-1) >> plan.shifts) & 1).view(-1).bool()
    runs = [run for run in plan.runs if not run.whole]
    parts = iter(torch.split(bits, [8 * run.count * run.octets for run in runs]))
    plus = iter(plan.plus)
    minus = [next(plus) if run.whole else _without_rest(run, next(parts), run.size) for run in plan.runs]
    return torch.cat([bits[:0], *minus])
