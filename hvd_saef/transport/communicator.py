"""The interface of communication between workers: gathers of bytes, means of tensors, small objects.

The interface has four implementations: MPI and Horovod (`hvd_saef.transport.mpi`), torch.distributed
(`hvd_saef.transport.torch_distributed`), threads of one process (`hvd_saef.transport.threads`), and one rank
alone (`SoloCommunicator`, for ranks outside a process set or group).
Every method is collective, unless its docstring says otherwise: all workers call the same methods in the
same order. This order holds separately for each line (`hvd_saef.transport.lines`) and channel.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterable, Sequence
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
    """A sequence of collectives in the same order on all workers. Channels do not wait for each other."""

    WORDS = enum.auto()
    """The channel of the foreground thread: small words, objects, broadcasts."""
    UP = enum.auto()
    """The channel of payloads on their way to the server."""
    DOWN = enum.auto()
    """The channel of the server's answers."""
    MEANS = enum.auto()
    """The channel of means."""


class Communicator(abc.ABC):
    """The connection between the ranks of K workers. Tensors are contiguous; payloads are 1-D uint8.

    A worker is one rank, unless a subclass says otherwise. Payloads and means are exchanged between workers.
    Words, objects and broadcasts go from every rank to every other rank, since any rank may fail.
    """

    rank: int
    """This rank's number within the communicator, from 0."""
    size: int
    """The number of ranks in the communicator."""
    ranks: Sequence[int]
    """The launcher's numbers of these ranks."""
    process_set: Any = None
    """The Horovod process set of these ranks, if Horovod computes the means."""

    def check(self) -> None:  # noqa: B027 - most communicators can exchange at any time
        """Raises RuntimeError if this rank cannot exchange anything any more. Local."""

    def use(self) -> AbstractContextManager[None]:
        """Returns a context within which the communicator's library (MPI) is not ended. Local."""
        return nullcontext()

    @property
    def worker(self) -> int:
        """The number of the worker that this rank belongs to."""
        return self.rank

    @property
    def workers(self) -> int:
        """The number K of workers."""
        return self.size

    @property
    def counts(self) -> Sequence[int]:
        """The weights of the workers in means over workers, as K whole numbers."""
        return self.workers * [1]

    @cached_property
    def weights(self) -> Sequence[float]:
        """The `counts` divided by their sum: K numbers whose sum is 1."""
        total = sum(self.counts)
        return [count / total for count in self.counts]

    @cached_property
    def alike(self) -> bool:
        """True if all workers have the same weight, so that a mean over workers is unweighted."""
        return len(set(self.counts)) == 1

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """The ranks of each worker, as numbers within the communicator."""
        return [[rank] for rank in range(self.size)]

    @property
    def team(self) -> Communicator:
        """The communicator of this worker's team, over which gradients are averaged; here one rank."""
        return SoloCommunicator()

    def passed_on(self, sizes: Iterable[int]) -> int:
        """Returns how much this rank sends to the rest of its team of pieces that other workers sent.

        `sizes` are the sizes of the pieces, and the result has the same unit. Local.
        """
        return 0

    def passed_on_of_mean(self, mean: Tensor) -> int:
        """Returns how many bytes this rank sends to the rest of its team for a mean over workers. Local."""
        return 0 if self.workers == 1 else self.passed_on([mean.numel()]) * mean.itemsize

    @abc.abstractmethod
    def part(self, ranks: Sequence[int]) -> Communicator:
        """Returns a communicator of the given ranks, which include this rank. Collective over these ranks."""

    @abc.abstractmethod
    def find_hosts(self) -> list[list[int]]:
        """Returns the ranks of each host, one list a host. Collective."""

    @cached_property
    def lines(self) -> Lines:
        """The record of which optimizer has which line."""
        return Lines(self)

    def line(self, number: int) -> Communicator:
        """Returns the communicator of line `number`; line 0 is this communicator. Collective.

        A line has the same ranks and shares the channel WORDS; its other channels are its own.
        """
        if number == 0:
            return self
        key = "line", number
        if key not in self.kin:
            self.kin[key] = self.new_line(number)
        return self.kin[key]

    @abc.abstractmethod
    def new_line(self, number: int) -> Communicator:
        """Makes the communicator of line `number`, above 0; only :meth:`line` calls this. Collective."""

    def background(self, channel: Channel) -> Background:
        """Returns the channel's background thread, which does submitted work in order. Local."""
        if channel not in self._threads:
            self._threads[channel] = Background(f"hvd_saef {channel.name} {self.rank}")
        return self._threads[channel]

    @property
    def idle(self) -> bool:
        """True if the background threads have done all submitted work. Local."""
        return all(thread.idle for thread in self._threads.values())

    @cached_property
    def _threads(self) -> dict[Channel, Background]:
        return {}

    @cached_property
    def doing(self) -> dict[Channel, str]:
        """The round (and bucket) that each channel's calls belong to, for messages about missing ranks."""
        return {}

    @cached_property
    def kin(self) -> dict[Any, Communicator]:
        """Communicators that were made from this one; :meth:`close` closes them too."""
        return {}

    def close(self) -> None:
        """Ends the background threads of this communicator and of its `kin`. Local."""
        for thread in self._threads.values():
            thread.shutdown()
        for other in self.kin.values():
            other.close()

    def finish(self) -> None:
        """Waits for all ranks: this is their last collective before they leave."""
        self.combine(0)

    @abc.abstractmethod
    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:
        """Sends `payload` to all workers; writes worker k's payload into out[k], which has that size."""

    @abc.abstractmethod
    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Sends pieces[j] to worker j; writes the piece from worker k into out[k].

        pieces[j] has the same size on all workers. The piece for this worker itself is copied. The channel
        is UP.
        """

    @abc.abstractmethod
    def allreduce_mean(self, tensor: Tensor, name: str) -> None:
        """Replaces a floating tensor, in place, by its mean over workers: the same bits on every worker."""

    @abc.abstractmethod
    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Replaces a tensor, in place, by the tensor of rank `root`, bit for bit."""

    @abc.abstractmethod
    def allgather_object(self, value: Any) -> list[Any]:
        """Returns the small picklable objects of all ranks, in rank order."""

    @abc.abstractmethod
    def combine(self, word: int) -> int:
        """Returns the bitwise or of all ranks' words (up to 63 bits)."""


class Used(Protocol):
    """An object whose methods :func:`in_use` can wrap."""

    def use(self) -> AbstractContextManager[None]:
        """Returns a context within which MPI does not end: see :meth:`Communicator.use`."""


U = TypeVar("U", bound=Used)


def in_use(method: Callable[Concatenate[U, P], R]) -> Callable[Concatenate[U, P], R]:
    """Makes a method run within its object's `use()`, so that MPI does not end on this rank meanwhile."""

    @wraps(method)
    def within(self: U, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.use():
            return method(self, *args, **kwargs)

    return within


class SoloCommunicator(Communicator):
    """The communicator of a single worker of one rank. Nothing is sent."""

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
    """Returns the tensor's elements in logical order as bytes on the CPU, 1-D uint8. Local.

    The result is a view of the tensor's own memory if that is contiguous and on the CPU, else a copy.
    """
    held = tensor.detach().cpu().contiguous()
    # reshape(-1) would not do: a view of one number is contiguous, and may keep a stride that is not 1.
    return held.as_strided((held.numel(),), (1,)).view(torch.uint8)


def copy_pieces(pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copies pieces[k] into out[k], for all k. Local."""
    for place, piece in zip(out, pieces, strict=True):
        place.copy_(piece)
