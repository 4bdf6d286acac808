"""The state of one bucket's trip: its payloads, and the work that threads do on them. Local."""

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
    """Runs each function at once, in this thread. An exception is raised by :meth:`submit` itself."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:  # noqa: D102
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


HERE = Here()


@dataclass
class Trip:
    """Holds one bucket's payloads while they are exchanged."""

    state: BucketState
    plain: bool
    """True if one pass can go through the parameters' memory directly; otherwise they are copied."""
    rows: Fused
    memories: list[Memory]
    wire: torch.dtype | None
    """The dtype of numbers that Horovod averages; None if MPI gathers the payload as bytes."""
    served: BlockedTensor | None
    """The part of s that this worker serves; None without a server (and in warm-up rounds)."""
    buffers: Buffers
    what: str
    """The bucket and the round in words, for messages."""
    sent: list[Tensor] = field(default_factory=list)
    """This worker's payload for each part, all in one buffer."""
    encoded: Future[None] = field(default_factory=Future)
    """Done when row 4 is done."""
    gathered: Future[list[Tensor]] = field(default_factory=Future)
    """The payloads that this worker's server needs, once they have been gathered."""
    arrived: Future[list[list[Tensor]]] = field(default_factory=Future)
    """For each part the payloads of row 6, once the background has received them."""
    landed: Future[None] | None = None
    """Done when rows 6 and 2 are done, if the background does them; else None."""
