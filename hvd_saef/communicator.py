"""What workers say to each other: gathers of bytes, means of tensors, small objects.

Three ways to say it, one interface: MPI and Horovod (`MpiCommunicator`), threads of one process
(`hvd_saef.threads`), and nobody to talk to (`SoloCommunicator`, for ranks outside a process set).
Every method is collective: all workers call the same ones in the same order.
"""

from __future__ import annotations

import abc
import enum
import importlib
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache, cached_property
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_saef.staging import Staging, reaches_mpi
from hvd_saef.watch import Patience, Watch, say_goodbye_at_exit, start


def _import(name: str) -> Any:
    """The module, or None where it cannot be had: then only the simulation works."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library: RuntimeError
        _missing.append(f"{name} cannot be imported ({error})")
        return None


_missing: list[str] = []
# mpi4py first: whoever initializes MPI finalizes it, and Horovod would do so too early.
MPI: Any = _import("mpi4py.MPI")
hvd: Any = _import("horovod.torch")
if hvd and hvd.is_initialized():  # pragma: no cover - the tests import us first
    warnings.warn(
        "hvd_saef was imported after hvd.init(): Horovod then ends MPI under other ranks' feet when the job "
        "ends. Put `import hvd_saef` before hvd.init().",
        stacklevel=2,
    )

CHUNK_BYTES = 1 << 30
"""The most that one MPI call moves, in or out: counts and offsets are C ints, so it stays under 2 GiB."""


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

    def check(self) -> None:  # noqa: B027 - most can at any time
        """Raise RuntimeError if this rank cannot exchange anything any more."""

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

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """The ranks of each worker."""
        return [[rank] for rank in range(self.size)]

    @property
    def node(self) -> Communicator:
        """The ranks of this worker, among which gradients are averaged; here it is alone."""
        return SoloCommunicator()

    def passed_on(self, sizes: Iterable[int]) -> int:
        """How much this rank sends to its worker's others of pieces of such sizes from other workers."""
        return 0

    @abc.abstractmethod
    def part(self, ranks: Sequence[int]) -> Communicator:
        """A communicator of these of the ranks, with this one among them. Collective over them."""

    @abc.abstractmethod
    def find_hosts(self) -> list[list[int]]:
        """The ranks by the host that they run on. Collective."""

    def background(self, channel: Channel) -> Executor:
        """The channel's own thread, which does what it is given in order, while this one computes."""
        if channel not in self._threads:
            name = f"hvd_saef {channel.name} {self.rank}"
            self._threads[channel] = ThreadPoolExecutor(1, thread_name_prefix=name)
        return self._threads[channel]

    @cached_property
    def _threads(self) -> dict[Channel, Executor]:
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


class SoloCommunicator(Communicator):
    """One worker, alone."""

    rank, size, ranks = 0, 1, (0,)

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        return self

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


class MpiCommunicator(Communicator):
    """Some ranks: payloads by mpi4py, means by Horovod's allreduce.

    `ranks` are MPI's and Horovod's; messages about who does not arrive call them by `names`.
    """

    process_set: Any
    """Horovod's, of these ranks."""

    def __init__(self, ranks: Sequence[int], names: Sequence[int] | None = None) -> None:
        world, patience = MPI.COMM_WORLD, Patience.of_environment()
        self.ranks = ranks

        def create() -> tuple[Any, dict[Channel, Any]]:
            # Create_group involves the set's ranks alone; Split or Dup would need every rank.
            own = world.Create_group(world.Get_group().Incl(list(ranks)))
            return own, {channel: own.Dup() for channel in Channel if channel is not Channel.MEANS}

        created = start(create)
        _arrivals(patience).wait(created.done, f"creation {ranks}", "hvd_saef.DistributedOptimizer", ranks)
        own, self._mpi = created.result()
        self.rank, self.size = own.Get_rank(), own.Get_size()
        self._watch = Watch(own, patience, names)
        self._staging = {channel: Staging() for channel in Channel}
        say_goodbye_at_exit(self._watch, MPI.Is_finalized)

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        if len(ranks) == 1:
            return SoloCommunicator()
        key = tuple(self.ranks[rank] for rank in ranks), tuple(ranks)
        if key not in _of_parts:
            _of_parts[key] = MpiCommunicator(*key)
        return _of_parts[key]

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        shares = self._mpi[Channel.WORDS].Split_type(MPI.COMM_TYPE_SHARED)
        first = self.allgather_object(shares.bcast(self.rank))
        shares.Free()
        return [[rank for rank in range(self.size) if first[rank] == host] for host in sorted(set(first))]

    def check(self) -> None:  # noqa: D102
        if not hvd.is_initialized():
            raise RuntimeError("Horovod was shut down: step() comes before hvd.shutdown().")

    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        self._move(
            channel,
            lambda send, into: self._mpi[channel].Iallgatherv([_memory(send[0]), MPI.BYTE], _message(into)),
            [payload],
            out,
        )

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
        """In as many calls as the longest piece of any worker asks for: as many on all of them."""
        operation = "payloads to the server" if channel is Channel.UP else "the server's answers"
        # What goes out or what comes in says all workers' sizes, and the other is among these.
        longest = max(piece.numel() for piece in (*pieces, *out))
        most = max(1, CHUNK_BYTES // self.size)
        staging = self._staging[channel]
        if longest <= most and reaches_mpi(out[0].device):
            staging.ready(out[0].device)
            self._wait(channel, start(pieces, out), operation)
            return
        for first in range(0, longest, most):
            places = [place[first : first + most] for place in out]
            leaving, landed = (
                staging.leaving([piece[first : first + most] for piece in pieces]),
                staging.room(places),
            )
            self._wait(channel, start(leaving, landed), operation)
            staging.landed(landed, places)

    def _wait(self, channel: Channel, request: Any, operation: str) -> None:
        """Until the request is done, which holds the memory that it works on."""
        self._watch.wait(
            request.Test, channel.name, f"{operation}, {self.doing.get(channel, 'at the start')}"
        )

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        # Waited for before the next one is submitted, so that Horovod has nothing to fuse it with:
        # how tensors are fused decides how sums round.
        handle = hvd.allreduce_async_(
            tensor, name=f"hvd_saef.{name}", op=hvd.Average, process_set=self.process_set
        )
        what = f"the mean of {name}, {self.doing.get(Channel.WORDS, 'at the start')}"
        self._watch.wait(lambda: hvd.poll(handle), Channel.MEANS.name, what)
        hvd.synchronize(handle)

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        flat = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
        for first in range(0, flat.size, CHUNK_BYTES):
            chunk = [flat[first : first + CHUNK_BYTES], MPI.BYTE]
            self._wait(Channel.WORDS, self._mpi[Channel.WORDS].Ibcast(chunk, root=root), "a broadcast")
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape))

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        words = self._mpi[Channel.WORDS]
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._wait(
            Channel.WORDS, words.Iallgather(np.array([mine.size], np.int64), sizes), "a gather of objects"
        )
        together = np.empty(sizes.sum(), np.uint8)
        places = (sizes.tolist(), (np.cumsum(sizes) - sizes).tolist())
        self._wait(
            Channel.WORDS,
            words.Iallgatherv([mine, MPI.BYTE], [together, places, MPI.BYTE]),
            "a gather of objects",
        )
        return [pickle.loads(piece.tobytes()) for piece in np.split(together, np.cumsum(sizes)[:-1])]

    def combine(self, word: int) -> int:  # noqa: D102
        mine, all_of_them = np.array([word], np.int64), np.empty(1, np.int64)
        request = self._mpi[Channel.WORDS].Iallreduce(mine, all_of_them, op=MPI.BOR)
        self._wait(Channel.WORDS, request, "the agreement of all ranks")
        self._watch.tidy()
        return int(all_of_them[0])

    def finish(self) -> None:
        """Wait for all workers; where these are all ranks, also end Horovod and MPI.

        Once MPI is ended, `python -m mpi4py` does not take an exit code for a failure to abort the job on.
        """
        if MPI.Is_finalized():  # by another optimizer's
            return
        super().finish()
        if self.size == MPI.COMM_WORLD.Get_size():
            hvd.shutdown()
            MPI.Finalize()


@cache
def _arrivals(patience: Patience) -> Watch:
    """The watch over the creation of communicators, when the world's is the only one there is."""
    return Watch(MPI.COMM_WORLD, patience)


def _message(views: Sequence[Tensor]) -> Any:
    """Views of one buffer, as mpi4py takes the pieces of a collective on vectors."""
    buffer = torch.empty(0, dtype=torch.uint8, device=views[0].device).set_(views[0].untyped_storage())
    counts = [view.numel() for view in views]
    return [_memory(buffer), (counts, [int(view.storage_offset()) for view in views]), MPI.BYTE]


def _memory(buffer: Tensor) -> Any:
    """As mpi4py takes it; a tensor on a GPU as it is, by its __cuda_array_interface__."""
    return buffer.numpy() if buffer.is_cpu else buffer


def copy_pieces(pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy each piece to its place."""
    for place, piece in zip(out, pieces, strict=True):
        place.copy_(piece)


_here = threading.local()
_of_process_sets: dict[tuple[int, ...], MpiCommunicator] = {}
_of_parts: dict[tuple[tuple[int, ...], tuple[int, ...]], MpiCommunicator] = {}


def set_thread_communicator(communicator: Communicator | None) -> None:
    """Make `communicator` the one that this thread's optimizers find."""
    _here.communicator = communicator


def _abort_on_exceptions() -> None:
    """Let an exception that ends this rank end the job: the others would wait for it for ever.

    HVD_SAEF_NO_ABORT=1 leaves it to the launcher.
    """
    if os.environ.get("HVD_SAEF_NO_ABORT") == "1":
        return
    earlier, pid = sys.excepthook, os.getpid()

    def abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, error, traceback)
        if os.getpid() != pid:  # a process that was forked from this rank
            return
        print(f"hvd_saef: rank {MPI.COMM_WORLD.Get_rank()} failed and ends the job.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort


def find_communicator(process_set: Any) -> tuple[Communicator, bool]:
    """The communicator of this thread or of a Horovod process set, and whether this rank is in the set.

    Collective over the process set the first time; the communicator lives as long as the process.
    Raises RuntimeError if there is no Horovod on MPI to talk through, ValueError for a process set
    that Horovod does not know.
    """
    own: Communicator | None = getattr(_here, "communicator", None)
    if own is not None:
        if process_set is not None and process_set is not (hvd and hvd.global_process_set):
            raise ValueError(f"process_set={process_set}: a simulation has the global process set only.")
        return own, True
    if _missing:
        raise RuntimeError(
            f"{'; '.join(_missing)}: both are needed; launch/bootstrap.sh makes an environment with them. "
            "hvd_saef.simulation.run_workers works without."
        )
    if not hvd.is_initialized():
        raise RuntimeError(
            "Horovod is not initialized: call hvd.init() before hvd_saef.DistributedOptimizer."
        )
    world = MPI.COMM_WORLD
    if (hvd.rank(), hvd.size()) != (world.Get_rank(), world.Get_size()):
        raise RuntimeError(
            f"Horovod says rank {hvd.rank()} of {hvd.size()}, MPI says rank {world.Get_rank()} of "
            f"{world.Get_size()}. Payloads travel by MPI: start the job with mpirun, srun --mpi or "
            "horovodrun --mpi (not --gloo), and call hvd.init() without a communicator."
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialized without MPI_THREAD_MULTIPLE, but Horovod and hvd_saef both talk through it, "
            "from two threads. Leave mpi4py.rc.threads alone, or use an MPI that supports it."
        )
    process_set = hvd.global_process_set if process_set is None else process_set
    ranks = tuple(range(hvd.size())) if process_set is hvd.global_process_set else process_set.ranks
    if ranks is None or process_set.process_set_id is None:
        raise ValueError(
            f"process_set={process_set}: Horovod does not know it. Pass it to hvd.init(process_sets=[...]) "
            "or hvd.add_process_set(...) first."
        )
    if hvd.rank() not in ranks:
        return SoloCommunicator(), False
    key = tuple(ranks)
    if not _of_process_sets and hvd.size() > 1:
        _abort_on_exceptions()
    if key not in _of_process_sets:
        _of_process_sets[key] = MpiCommunicator(key)
    _of_process_sets[key].process_set = process_set  # Horovod's may have been removed and added anew
    return _of_process_sets[key], True
