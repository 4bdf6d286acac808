"""The Compressor: C in the paper, the class people subclass."""

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
    """The dtype in which x, e and s of a parameter of `dtype` are kept: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def check_dense_below(dense_below: object) -> None:
    """Raise TypeError or ValueError unless `dense_below` is a whole number >= 0."""
    allowed = "a whole number >= 0 is allowed: blocks of fewer elements travel as they are"
    if isinstance(dense_below, bool) or not isinstance(dense_below, int):
        raise TypeError(f"dense_below={dense_below!r}: {allowed}.")
    if dense_below < 0:
        raise ValueError(f"dense_below={dense_below!r}: {allowed}.")


class Fused(Protocol):
    """The rows of Algorithm 1 around C, each in one pass over memory: same bits as the plain ones.

    Where a Memory has no points, `send` finds Δ in e already and `receive` writes no points. The weights
    of one call are all the same number: where workers count differently, the plain rows are taken.
    """

    def send(self, memory: Memory, payload: Tensor) -> None:
        """Row 4: Δ = e + (x - α·e - β·s) - point; write C(Δ), and e ← Δ - C(Δ).

        The last may be left to :meth:`receive`, which always follows.
        """

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """Row 5': D = s + Σ weight_k·C(Δ_k), in rank order; write u = C(D) into `answer`, and s ← D - u."""

    def receive(
        self, memory: Memory, sent: Tensor, payloads: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        """Rows 6 and 2: x ← x - Σ weight_k·C(...), in rank order; points ← x - α·e - β·s.

        `sent` is what :meth:`send` wrote.
        """


@dataclasses.dataclass(frozen=True)
class Considered:
    """One setting of a compressor that `hvd-saef plan` and the benchmarks consider."""

    title: str
    """What tables call the setting."""
    spelling: str
    """What command lines call the setting: `--methods sign-dc`."""
    compressor: Compressor
    double_compression: bool = True
    averaging_periods: tuple[int, ...] = (16, 64)
    """The averaging periods that are considered besides none, from the shortest."""


class Compressor(abc.ABC):
    """C: turns a bucket's blocks into a payload of bytes and back. Frozen; local, no collectives.

    Subclasses define the three methods below, on flat memory of any floating dtype and device.
    Equal compressors must have the same `description` on all workers: make a subclass a frozen
    dataclass, and its fields say what it is.
    """

    deterministic: ClassVar[bool] = True
    """Whether :meth:`encode` makes the same of the same input, always and on every worker.

    Where several ranks encode the same for themselves (a replicated server of DC, workers of several
    ranks), they must come to the same bits: a compressor that says False is refused there, and one that
    says True and draws random numbers of its own is found when it is given to an optimizer.
    """

    @abc.abstractmethod
    def payload_bytes(self, layout: Blocks) -> int:
        """Bytes of the payload for these blocks: known to all workers beforehand, whatever the data."""

    @abc.abstractmethod
    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Write C(delta) into `payload` (uint8, [payload_bytes]) and leave delta - C(delta) in `delta`.

        The residual is computed from what the payload can represent. Blocks are independent. All this is a
        function of `delta` alone: not of the time, the worker, earlier calls or what `payload` held before.
        A compressor that rounds or chooses at random draws from `delta.uniform(run)`, as all workers do.
        """

    @abc.abstractmethod
    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Add weight · C(delta) to `out`, in out's dtype, the same bits on every worker.

        `out.uniform(run)` draws what `delta.uniform(run)` drew, which then need not travel.
        """

    @property
    def fused(self) -> Fused | None:
        """One-pass kernels for memory on the CPU, if there are any here."""
        return None

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """How payloads travel for x of `dtype`: None, gathered by MPI; or a dtype, averaged by Horovod.

        Averaged payloads are one number of that dtype an element, and their mean is the mean's payload.
        """
        return None

    @property
    def call(self) -> str:
        """How a user asks for the compressor in code."""
        return f"{type(self).__name__}(...)"

    costs: ClassVar[tuple[str, ...]] = ()
    """The names of what the compressor's work costs, for `hvd-saef plan`: seconds for each unit of it."""

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """Units of each of its `costs` in a step that encodes and decodes so many elements.

        Elements whose payloads Horovod averages count as encoded.
        """
        return {}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """The settings that `hvd-saef plan` and the benchmarks consider, the least lossy first."""
        return ()

    @property
    def description(self) -> str:
        """What all workers must agree on: the class and its settings."""
        fields = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else vars(self)
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(fields.items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({settings})"

    def apply(self, tensor: Tensor) -> Tensor:
        """C(tensor) as a dense tensor of the same shape and dtype, the whole tensor one block."""
        flat = tensor.detach().reshape(-1).to(state_dtype(tensor.dtype), copy=True)
        blocks = Blocks.cut([flat.numel()], None, flat.dtype)
        payload = torch.empty(self.payload_bytes(blocks), dtype=torch.uint8, device=flat.device)
        self.encode(BlockedTensor(flat, blocks), payload)
        self.decode_add(payload, BlockedTensor(flat.zero_(), blocks), 1.0)
        return flat.to(tensor.dtype).view(tensor.shape)

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """For plain `hvd.DistributedOptimizer(compression=...)`: C(tensor), dense, which saves nothing.

        Horovod's allreduce sums what this returns, so a payload would come out as garbage.
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
        """The second half of :meth:`compress`: the tensor as it is."""
        return tensor
