"""The job that this rank is in, asked of the library that carries its bytes: Horovod, or torch.distributed.

A job is torch.distributed's if its ranks have RANK in their environment, as torchrun sets it; else Horovod's.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn

import hvd_saef


class Job(Protocol):
    """What benchmarks and tests ask of a job. All but rank, size and local_rank is collective."""

    def full_precision(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        """Wrap an optimizer as users do who exchange float32."""

    def begin(self, **options: Any) -> None:
        """Start the library that carries the bytes."""

    def rank(self) -> int:
        """This rank."""

    def size(self) -> int:
        """The number of ranks."""

    def local_rank(self) -> int:
        """This rank among those of its host."""

    def gather(self, value: Any) -> list[Any]:
        """Everyone's values, in rank order."""

    def broadcast(self, model: nn.Module) -> None:
        """Give all ranks the model of rank 0, in place."""

    def barrier(self) -> None:
        """Wait for everyone."""

    def end(self) -> None:
        """What users call at the end, if they do."""


class HorovodJob:
    """A job of Horovod's, on MPI."""

    def __init__(self) -> None:
        self._gathered = 0

    @cached_property
    def _hvd(self) -> Any:
        import horovod.torch as hvd  # where this module is only looked at, Horovod need not be there

        return hvd

    def begin(self, **options: Any) -> None:  # noqa: D102
        self._hvd.init(**options)

    def rank(self) -> int:  # noqa: D102
        return cast(int, self._hvd.rank())

    def size(self) -> int:  # noqa: D102
        return cast(int, self._hvd.size())

    def local_rank(self) -> int:  # noqa: D102
        return cast(int, self._hvd.local_rank())

    def full_precision(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:  # noqa: D102
        return self._hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    def broadcast(self, model: nn.Module) -> None:  # noqa: D102
        self._hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def gather(self, value: Any) -> list[Any]:  # noqa: D102
        self._gathered += 1  # a name of Horovod's own making is of the value's type, which may differ
        return cast("list[Any]", self._hvd.allgather_object(value, f"gather.{self._gathered}"))

    def barrier(self) -> None:  # noqa: D102
        self._hvd.barrier()

    def end(self) -> None:  # noqa: D102
        self._hvd.shutdown()


class TorchJob:
    """A job of torch.distributed's, over gloo."""

    def begin(self, **options: Any) -> None:  # noqa: D102
        dist.init_process_group("gloo", **options)

    def rank(self) -> int:  # noqa: D102
        return dist.get_rank()

    def size(self) -> int:  # noqa: D102
        return dist.get_world_size()

    def local_rank(self) -> int:  # noqa: D102
        return int(os.environ.get("LOCAL_RANK", "0"))

    def full_precision(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:  # noqa: D102
        return hvd_saef.DistributedOptimizer(
            optimizer, model.named_parameters(), hvd_saef.Compression.none, feedback="none"
        )

    def broadcast(self, model: nn.Module) -> None:  # noqa: D102
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:  # noqa: D102
        everyone = [None] * self.size()
        dist.all_gather_object(everyone, value)
        return everyone

    def barrier(self) -> None:  # noqa: D102
        dist.barrier()

    def end(self) -> None:  # noqa: D102
        dist.destroy_process_group()


job: Job = TorchJob() if "RANK" in os.environ else HorovodJob()
