"""What workers say to each other: gathers of bytes, means of tensors, small objects.

Three ways to say it, one interface: MPI and Horovod (`hvd_saef.transport.mpi`), threads of one process
(`hvd_saef.transport.threads`), and nobody to talk to (`SoloCommunicator`, for ranks outside a process set).
Every method is collective: all workers call the same ones in the same order, on each line
(`hvd_saef.transport.lines`) and channel for itself.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from hvd_saef.transport.background import Background
from hvd_saef.transport.lines import Lines

P = ParamSpec("P")
R = TypeVar("R")


class Channel(enum.Enum):
    """Collectives on one channel come in the same order on all workers; channels do not mind each other."""

    WORDS = enum.auto()
    """The foreground's: small words, objects, broadcasts."""
    UP = enum.auto()
    """Payloads on their way to the server."""
    DOWN = enum.auto()
    """The server's answers."""
    MEANS = enum.auto()
    """Horovod's allreduces."""


class Communicator(abc.ABC):
    """What the ranks of K workers have to talk through. Tensors are contiguous; payloads are 1-D uint8.

    A worker is one rank, unless a subclass says otherwise. Payloads and means are those of workers;
    words, objects and broadcasts go from every rank to every other, since any of them may fail.
    """

    rank: int
    """This rank's number among all that take part."""
    size: int
    """The number of these."""
    ranks: Sequence[int]
    """What the launcher calls them."""
    process_set: Any = None
    """Horovod's of these ranks, where it is Horovod that takes means."""

    def check(self) -> None:  # noqa: B027 - most can at any time
        """Raise RuntimeError if this rank cannot exchange anything any more."""

    def use(self) -> AbstractContextManager[None]:
        """Within it nothing ends what this communicator talks through. Local."""
        return nullcontext()

    @property
    def worker(self) -> int:
        """The number of the worker that this rank is, or is part of."""
        return self.rank

    @property
    def workers(self) -> int:
        """K."""
        return self.size

    @property
    def counts(self) -> Sequence[int]:
        """How much each worker counts in means over workers: K whole numbers."""
        return self.workers * [1]

    @cached_property
    def weights(self) -> Sequence[float]:
        """The same as numbers with the sum 1."""
        total = sum(self.counts)
        return [count / total for count in self.counts]

    @cached_property
    def alike(self) -> bool:
        """Whether all workers count the same, so that a mean over them is a plain one."""
        return len(set(self.counts)) == 1

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """The ranks of each worker."""
        return [[rank] for rank in range(self.size)]

    @property
    def team(self) -> Communicator:
        """The ranks of this worker, among which gradients are averaged; here it is alone."""
        return SoloCommunicator()

    def passed_on(self, sizes: Iterable[int]) -> int:
        """How much this rank sends to its worker's others of pieces of such sizes from other workers."""
        return 0

    def passed_on_of_mean(self, mean: Tensor) -> int:
        """The same in bytes, of a mean over workers."""
        return 0 if self.workers == 1 else self.passed_on([mean.numel()]) * mean.itemsize

    @abc.abstractmethod
    def part(self, ranks: Sequence[int]) -> Communicator:
        """A communicator of these of the ranks, with this one among them. Collective over them."""

    @abc.abstractmethod
    def find_hosts(self) -> list[list[int]]:
        """The ranks by the host that they run on. Collective."""

    @cached_property
    def lines(self) -> Lines:
        """Who has which line."""
        return Lines(self)

    def line(self, number: int) -> Communicator:
        """The same ranks, with channels of their own but for WORDS; number 0 is this one. Collective."""
        if number == 0:
            return self
        key = "line", number
        if key not in self.kin:
            self.kin[key] = self.new_line(number)
        return self.kin[key]

    @abc.abstractmethod
    def new_line(self, number: int) -> Communicator:
        """Make line `number`, above 0: for :meth:`line`. Collective."""

    def background(self, channel: Channel) -> Executor:
        """The channel's own thread, which does what it is given in order, while this one computes."""
        if channel not in self._threads:
            self._threads[channel] = Background(f"hvd_saef {channel.name} {self.rank}")
        return self._threads[channel]

    @property
    def idle(self) -> bool:
        """Whether the background has done all that it was given."""
        return all(thread.idle for thread in self._threads.values())

    @cached_property
    def _threads(self) -> dict[Channel, Background]:
        return {}

    @cached_property
    def doing(self) -> dict[Channel, str]:
        """The round (and bucket) that a channel's calls are for, for messages about who does not arrive."""
        return {}

    @cached_property
    def kin(self) -> dict[Any, Communicator]:
        """Others made of this one, which end with it."""
        return {}

    def close(self) -> None:
        """End the background threads."""
        for thread in self._threads.values():
            thread.shutdown()
        for other in self.kin.values():
            other.close()

    def finish(self) -> None:
        """Wait for all workers: the last thing that they do together before they leave."""
        self.combine(0)

    @abc.abstractmethod
    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:
        """Everyone's payload, worker k's into out[k], which is of its size."""

    @abc.abstractmethod
    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Send piece j, of the same size on all workers, to worker j; worker k's arrives in out[k].

        This worker's own piece is copied. Channel UP.
        """

    @abc.abstractmethod
    def allreduce_mean(self, tensor: Tensor, name: str) -> None:
        """Replace a floating tensor by its mean over workers: the same bits on every worker."""

    @abc.abstractmethod
    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Replace a tensor by rank `root`'s, to the bit."""

    @abc.abstractmethod
    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's small picklable object, in rank order."""

    @abc.abstractmethod
    def combine(self, word: int) -> int:
        """The bitwise or of every rank's word (up to 63 bits)."""


class Used(Protocol):
    """What :func:`in_use` is for."""

    def use(self) -> AbstractContextManager[None]:
        """See :meth:`Communicator.use`."""


U = TypeVar("U", bound=Used)


def in_use(method: Callable[Concatenate[U, P], R]) -> Callable[Concatenate[U, P], R]:
    """A method that runs within its object's `use()`: on a rank that is in it, nothing ends MPI."""

    @wraps(method)
    def within(self: U, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.use():
            return method(self, *args, **kwargs)

    return within


class SoloCommunicator(Communicator):
    """One worker, alone."""

    rank, size, ranks = 0, 1, (0,)

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        return self

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        return SoloCommunicator()

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        return [[0]]

    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        copy_pieces([payload], out)

    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:  # noqa: D102
        copy_pieces(pieces, out)

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        pass

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        pass

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return [value]

    def combine(self, word: int) -> int:  # noqa: D102
        return word


def bytes_of(tensor: Tensor) -> Tensor:
    """Its elements in logical order as bytes on the CPU, 1-D: its own memory, if that is how they lie."""
    held = tensor.detach().cpu().contiguous()
    # Not reshape(-1): one number out of many is contiguous, and would keep a stride that is not 1.
    return held.as_strided((held.numel(),), (1,)).view(torch.uint8)


def copy_pieces(pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy each piece to its place."""
    for place, piece in zip(out, pieces, strict=True):
        place.copy_(piece)
