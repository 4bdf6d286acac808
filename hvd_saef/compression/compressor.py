"""The base class of compressors, C in the paper, which users subclass for compressors of their own."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of x, e and s for a parameter of `dtype`, which is float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def check_dense_below(dense_below: object) -> None:
    """Raises TypeError or ValueError unless `dense_below` is a whole number >= 0."""
    allowed = "a whole number >= 0 is allowed: blocks of fewer elements travel as they are"
    if isinstance(dense_below, bool) or not isinstance(dense_below, int):
        raise TypeError(f"dense_below={dense_below!r}: {allowed}.")
    if dense_below < 0:
        raise ValueError(f"dense_below={dense_below!r}: {allowed}.")


class Fused(Protocol):
    """The rows of Algorithm 1 around C, each in one pass over memory, with the bits of PlainRows.

    The memories of one call are parts of one bucket, with the same coefficients. If they have no parameter
    memory, e holds Δ before `send`, and `receive` writes no b.
    """

    @property
    def narrow(self) -> bool:
        """True if parameter memory may be float16 or bfloat16 where x is float32: b is rounded to it."""

    def send(self, memories: Sequence[Memory], payloads: Sequence[Tensor]) -> None:
        """Row 4: computes Δ = e + (x - α·e - β·s) - point, writes C(Δ) into `payloads`, and e ← Δ - C(Δ).

        Each memory has its own payload. The change of e may be left to :meth:`receive`, which always follows.
        """

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """Row 5': writes u = C(D) into `answer` and leaves D - u in s, where D = s + Σ weight_k·C(Δ_k).

        The sum runs in the order of the workers.
        """

    def receive(
        self,
        memories: Sequence[Memory],
        sent: Sequence[Tensor],
        payloads: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
    ) -> None:
        """Rows 6 and 2, in place: x ← x - Σ weight_k·C(...); parameter memory ← x - α·e - β·s.

        The sum runs in the order of the workers. `sent` are the payloads that :meth:`send` wrote, and
        `payloads` those that arrived, both for each of the memories.
        """


@dataclasses.dataclass(frozen=True)
class Considered:
    """One setting of a compressor, which `hvd-saef plan` and the benchmarks consider."""

    title: str
    """The name of the setting in tables."""
    spelling: str
    """The name of the setting on command lines, as in `--methods sign-dc`."""
    compressor: Compressor
    double_compression: bool = True
    averaging_periods: tuple[int, ...] = (16, 64)
    """The averaging periods to consider, from the shortest; no averaging is always considered too."""


class Compressor(abc.ABC):
    """C: turns a bucket's blocks into a payload of bytes and back. Frozen; local, no collectives.

    Subclasses define the three abstract methods, for flat memory of any floating dtype and device.
    Equal compressors must have the same `description` on all workers: make a subclass a frozen
    dataclass, and the description lists its fields.
    """

    deterministic: ClassVar[bool] = True
    """True if :meth:`encode` always makes the same payload of the same input, on every worker.

    Where several ranks encode the same input, each for itself (a replicated server of DC, workers of
    several ranks), all must get the same bits. A compressor that says False is refused there. One that says
    True but draws random numbers of its own is found when it is given to an optimizer.
    """

    @abc.abstractmethod
    def payload_bytes(self, layout: Blocks) -> int:
        """Returns the payload's bytes. They depend on the blocks alone: all workers know them beforehand."""

    @abc.abstractmethod
    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Writes C(delta) into `payload` (uint8, [payload_bytes]) and leaves delta - C(delta) in `delta`.

        The residual must be computed from the values that the payload can represent, and each block by
        itself. The results depend on `delta` alone: not on the time, the worker, earlier calls or the former
        contents of `payload`. A compressor that rounds or chooses at random takes its random numbers from
        `delta.uniform(run)`, which gives all workers the same.
        """

    @abc.abstractmethod
    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Adds weight · C(delta) to `out`, in place and in out's dtype; every worker must get the same bits.

        `out.uniform(run)` returns the numbers that `delta.uniform(run)` returned, so they need not travel.
        """

    def fused(self, device: torch.device, dtype: torch.dtype, alike: bool) -> Fused | None:
        """Returns the one-pass kernels for memory of this device and dtype, or None if there are none.

        `alike` is True if the weights of one call are always the same number.
        """
        return None

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Returns how payloads travel for x of `dtype`: None if MPI gathers them, else a dtype.

        In that dtype Horovod averages the payloads: they have one number for each element, and the mean of
        the payloads is the payload of the mean.
        """
        return None

    @property
    def call(self) -> str:
        """The expression by which a user asks for the compressor in code."""
        return f"{type(self).__name__}(...)"

    costs: ClassVar[tuple[str, ...]] = ()
    """The names of the compressor's costs, for `hvd-saef plan`: each is in seconds for one unit of work."""

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """Returns the units of each of the `costs` in a step with these numbers of elements.

        `encoded` and `decoded` count elements; those whose payloads Horovod averages count as encoded.
        """
        return {}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """Returns the settings that `hvd-saef plan` and the benchmarks consider, the least lossy first."""
        return ()

    @property
    def description(self) -> str:
        """The class and its settings in words, which must be the same on all workers."""
        fields = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else vars(self)
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(fields.items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({settings})"

    def apply(self, tensor: Tensor) -> Tensor:
        """Returns C(tensor) as a dense tensor of the same shape and dtype; the whole tensor is one block."""
        flat = tensor.detach().reshape(-1).to(state_dtype(tensor.dtype), copy=True)
        blocks = Blocks.cut([flat.numel()], None, flat.dtype)
        payload = torch.empty(self.payload_bytes(blocks), dtype=torch.uint8, device=flat.device)
        self.encode(BlockedTensor(flat, blocks), payload)
        self.decode_add(payload, BlockedTensor(flat.zero_(), blocks), 1.0)
        return flat.to(tensor.dtype).view(tensor.shape)

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Returns C(tensor), dense, for plain `hvd.DistributedOptimizer(compression=...)`; it saves nothing.

        Horovod's allreduce sums the returned tensor, so a payload would come out as garbage.
        """
        if self.wire_dtype(torch.float32) is None:
            warnings.warn(
                f"{type(self).__name__} was given to Horovod's own DistributedOptimizer, whose allreduce "
                "takes dense tensors only: the result is right but no byte is saved, and there is no error "
                "feedback. Use hvd_saef.DistributedOptimizer instead.",
                stacklevel=2,
            )
        return (self.apply(tensor) if tensor.is_floating_point() else tensor), None

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        """Returns the tensor as it is; Horovod calls this after :meth:`compress` and its allreduce."""
        return tensor
