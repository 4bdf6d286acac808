"""One bucket's payloads on their way, and what of them is done where."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Fused, Memory
from hvd_saef.memory.buffers import Buffers
from hvd_saef.memory.state import BucketState

P = ParamSpec("P")
T = TypeVar("T")


class Here(Executor):
    """Does what it is given at once, in this thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:  # noqa: D102
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


HERE = Here()


@dataclass
class Trip:
    """One bucket's payloads on their way."""

    state: BucketState
    plain: bool
    """Whether the parameters are plain memory that a pass can go through; else they are copied."""
    rows: Fused
    memories: list[Memory]
    wire: torch.dtype | None
    """How the payload travels: None, gathered by MPI; or as numbers that Horovod averages."""
    served: BlockedTensor | None
    """The s that this worker serves (DC)."""
    buffers: Buffers
    what: str
    """Its bucket and round, for messages."""
    sent: list[Tensor] = field(default_factory=list)
    """This worker's payload of each part, in one buffer."""
    encoded: Future[None] = field(default_factory=Future)
    """Whether row 4 is done."""
    gathered: Future[list[Tensor]] = field(default_factory=Future)
    """The payloads for this worker's server."""
    arrived: Future[list[list[Tensor]]] = field(default_factory=Future)
    """For each part the payloads to apply, once the background has them."""
    landed: Future[None] | None = None
    """Rows 6 and 2, where the background does them."""
