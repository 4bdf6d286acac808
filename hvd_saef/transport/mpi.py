"""Communication between the ranks of an MPI job: payloads by mpi4py, means by Horovod's allreduce.

Importing this module starts MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_saef.transport.communicator import Channel, Communicator, bytes_of, in_use
from hvd_saef.transport.ending import SHUT_DOWN, Ending
from hvd_saef.transport.hosts import group_by_host
from hvd_saef.transport.libraries import horovod, mpi4py
from hvd_saef.transport.objects import Bytes, exchange_objects
from hvd_saef.transport.posts import MpiPost
from hvd_saef.transport.staging import Staging, reaches_mpi
from hvd_saef.transport.watch import Patience, Watch, start
from hvd_saef.transport.watched import PAYLOADS, WatchedCommunicator

MPI, hvd = mpi4py(), horovod()

CHUNK_BYTES = 1 << 30
"""The most bytes that one MPI call sends or receives: MPI's counts are C ints, so 2 GiB is too much."""


class MpiCommunicator(WatchedCommunicator):
    """The communicator of some ranks of the job, one worker a rank.

    `ranks` are their numbers in MPI and Horovod. Messages about missing ranks use `names` instead, if given.
    """

    def __init__(self, ranks: Sequence[int], names: Sequence[int] | None = None) -> None:
        world, patience = MPI.COMM_WORLD, Patience.of_environment()
        self.ranks = ranks

        def create() -> tuple[Any, dict[Channel, Any]]:
            # Create_group is collective over these ranks only; Split and Dup would need every rank.
            own = world.Create_group(world.Get_group().Incl(list(ranks)))
            return own, {channel: own.Dup() for channel in Channel if channel is not Channel.MEANS}

        created = start(create)
        _arrivals(patience).wait(created.done, f"creation {ranks}", "hvd_saef.DistributedOptimizer", ranks)
        own, self._mpi = created.result()
        self.rank, self.size = own.Get_rank(), own.Get_size()
        self._watch = Watch(MpiPost(own), self.rank, self.size, patience, names)
        self._staging = {channel: Staging(reaches_mpi) for channel in Channel}
        _ending().then(self._watch.say_goodbye)

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        return _Line(self, number)

    def new_part(self, ranks: Sequence[int], names: Sequence[int]) -> Communicator:  # noqa: D102
        return MpiCommunicator(ranks, names)

    @in_use
    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        shares = self._mpi[Channel.WORDS].Split_type(MPI.COMM_TYPE_SHARED)
        first = self.allgather_object(shares.bcast(self.rank))
        shares.Free()
        return group_by_host(first)

    def check(self) -> None:  # noqa: D102
        if not hvd.is_initialized():
            raise RuntimeError(SHUT_DOWN)

    def use(self) -> AbstractContextManager[None]:  # noqa: D102
        return _ending().put_off()

    @in_use
    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        self._move(
            channel,
            lambda send, into: self._mpi[channel].Iallgatherv([_memory(send[0]), MPI.BYTE], _message(into)),
            [payload],
            out,
        )

    @in_use
    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:  # noqa: D102
        self._move(
            Channel.UP,
            lambda send, into: self._mpi[Channel.UP].Ialltoallv(_message(send), _message(into)),
            pieces,
            out,
        )

    def _move(
        self,
        channel: Channel,
        start: Callable[[Sequence[Tensor], Sequence[Tensor]], Any],
        pieces: Sequence[Tensor],
        out: Sequence[Tensor],
    ) -> None:
        """Moves payloads. The longest piece on any worker sets the number of MPI calls, the same on all."""
        # `out` (allgather) or `pieces` (alltoall) has all workers' sizes, so all find the same longest.
        longest = max(piece.numel() for piece in (*pieces, *out))
        most = max(1, CHUNK_BYTES // self.size)
        staging = self._staging[channel]
        if longest <= most and staging.direct(out[0].device):
            staging.ready(out[0].device)
            self._wait(channel, start(pieces, out), PAYLOADS[channel])
            return
        for first in range(0, longest, most):
            places = [place[first : first + most] for place in out]
            leaving, landed = (
                staging.leaving([piece[first : first + most] for piece in pieces]),
                staging.room(places),
            )
            self._wait(channel, start(leaving, landed), PAYLOADS[channel])
            staging.landed(landed, places)

    def _wait(self, channel: Channel, request: Any, operation: str) -> None:
        """Waits until `request` is done. The request keeps its memory alive meanwhile."""
        self._wait_until(request.Test, channel, operation)

    @in_use
    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        # This mean is completed before the next one is submitted, so that Horovod fuses no tensors: their
        # fusion would change how sums are rounded.
        handle = hvd.allreduce_async_(
            tensor, name=f"hvd_saef.{self._line}.{name}", op=hvd.Average, process_set=self.process_set
        )
        self._wait_until(lambda: hvd.poll(handle), Channel.MEANS, f"the mean of {name}")
        hvd.synchronize(handle)

    @in_use
    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        flat = bytes_of(tensor).numpy()
        for first in range(0, flat.size, CHUNK_BYTES):
            chunk = [flat[first : first + CHUNK_BYTES], MPI.BYTE]
            self._wait(Channel.WORDS, self._mpi[Channel.WORDS].Ibcast(chunk, root=root), "a broadcast")
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape))

    @in_use
    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return exchange_objects(value, self._gather)

    def _gather(self, mine: Bytes) -> list[Bytes]:
        """Returns the bytes of all ranks, [n] uint8 each. Collective."""
        words, what = self._mpi[Channel.WORDS], "a gather of objects"
        sizes = np.empty(self.size, np.int64)
        self._wait(Channel.WORDS, words.Iallgather(np.array([mine.size], np.int64), sizes), what)
        pieces = [np.empty(size, np.uint8) for size in sizes]
        most = max(1, CHUNK_BYTES // self.size)
        for first in range(0, int(sizes.max()), most):
            counts = np.clip(sizes - first, 0, most)
            stops = np.cumsum(counts)
            together = np.empty(stops[-1], np.uint8)
            places = (counts.tolist(), (stops - counts).tolist())
            leaving = [mine[first : first + most], MPI.BYTE]
            self._wait(Channel.WORDS, words.Iallgatherv(leaving, [together, places, MPI.BYTE]), what)
            for piece, part in zip(pieces, np.split(together, stops[:-1]), strict=True):
                piece[first : first + most] = part
        return pieces

    @in_use
    def combine(self, word: int) -> int:  # noqa: D102
        mine, all_of_them = np.array([word], np.int64), np.empty(1, np.int64)
        request = self._mpi[Channel.WORDS].Iallreduce(mine, all_of_them, op=MPI.BOR)
        self._wait(Channel.WORDS, request, "the agreement of all ranks")
        self._watch.tidy()
        return int(all_of_them[0])

    def finish(self) -> None:
        """Waits for all ranks. If these are all ranks of the job, also ends Horovod and MPI. Collective.

        After the end of MPI, `python -m mpi4py` does not abort the job because of an exit code other than 0.
        """
        if MPI.Is_finalized():  # another optimizer's communicator has ended MPI
            return
        super().finish()
        if self.size == MPI.COMM_WORLD.Get_size():
            hvd.shutdown()
            if not MPI.Is_finalized():  # Horovod ends MPI if Horovod started it
                MPI.Finalize()


@cache
def _ending() -> Ending:
    return Ending(MPI)


class _Line(MpiCommunicator):
    """The ranks of another communicator, `base`, on a line of their own."""

    def __init__(self, base: MpiCommunicator, number: int) -> None:
        self.rank, self.size, self.ranks = base.rank, base.size, base.ranks
        self._base, self._line, self._watch = base, number, base._watch
        self._staging = {channel: Staging(reaches_mpi) for channel in Channel}
        words = base._mpi[Channel.WORDS]
        created = start(lambda: {channel: words.Dup() for channel in (Channel.UP, Channel.DOWN)})
        base._watch.wait(created.done, Channel.WORDS.name, "hvd_saef.DistributedOptimizer")
        self._mpi = {Channel.WORDS: words, **created.result()}

    @property
    def process_set(self) -> Any:  # the base has the current one: sets can be removed and added anew
        return self._base.process_set


@cache
def _arrivals(patience: Patience) -> Watch:
    """Returns the watch over the creation of communicators, when only MPI.COMM_WORLD exists."""
    world = MPI.COMM_WORLD
    watch = Watch(MpiPost(world), world.Get_rank(), world.Get_size(), patience)
    _ending().then(watch.hear_out)
    return watch


def _message(views: Sequence[Tensor]) -> Any:
    """Returns `views` of one buffer as mpi4py's argument for a collective with a count for each rank."""
    buffer = torch.empty(0, dtype=torch.uint8, device=views[0].device).set_(views[0].untyped_storage())
    counts = [view.numel() for view in views]
    return [_memory(buffer), (counts, [int(view.storage_offset()) for view in views]), MPI.BYTE]


def _memory(buffer: Tensor) -> Any:
    """Returns the buffer as mpi4py needs it; a GPU tensor is passed as it is (__cuda_array_interface__)."""
    return buffer.numpy() if buffer.is_cpu else buffer
