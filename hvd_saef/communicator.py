"""What workers say to each other: gathers of bytes, means of tensors, small objects.

Three ways to say it, one interface: MPI and Horovod (`MpiCommunicator`), threads of one process
(`ThreadCommunicator`), and nobody to talk to (`SoloCommunicator`, for ranks outside a process set).
Every method is collective: all workers call the same ones in the same order.
"""

from __future__ import annotations

import abc
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_saef.errors import SaefError


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


class Communicator(abc.ABC):
    """K workers, of which this is number `rank`. Tensors are contiguous; payloads are 1-D uint8."""

    rank: int
    size: int

    @abc.abstractmethod
    def allgather(self, payload: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Everyone's payload, in rank order, on this payload's device. Worker k sends counts[k] bytes."""

    @abc.abstractmethod
    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Send piece j to worker j; piece j is of the same size on all workers.

        Returns the pieces sent to this worker, its own among them, in rank order.
        """

    @abc.abstractmethod
    def allreduce_mean(self, tensor: Tensor, name: str) -> None:
        """Replace a floating tensor by its mean over workers: the same bits on every worker."""

    @abc.abstractmethod
    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Replace a tensor by worker `root`'s, to the bit."""

    @abc.abstractmethod
    def allgather_object(self, value: Any) -> list[Any]:
        """Everyone's small picklable object, in rank order."""

    @abc.abstractmethod
    def combine(self, word: int) -> int:
        """The bitwise or of everyone's word (up to 63 bits)."""


class SoloCommunicator(Communicator):
    """One worker, alone."""

    rank, size = 0, 1

    def allgather(self, payload: Tensor, counts: Sequence[int]) -> list[Tensor]:  # noqa: D102
        return [payload]

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return list(pieces)

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        pass

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        pass

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return [value]

    def combine(self, word: int) -> int:  # noqa: D102
        return word


class MpiCommunicator(Communicator):
    """The ranks of a Horovod process set: payloads by mpi4py, means by Horovod's allreduce."""

    process_set: Any
    """Horovod's, of these ranks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        group = MPI.COMM_WORLD.Get_group().Incl(list(ranks))
        # Create_group involves the set's ranks alone; Split or Dup would need every rank.
        self._mpi = MPI.COMM_WORLD.Create_group(group)
        self.rank, self.size = self._mpi.Get_rank(), self._mpi.Get_size()

    def allgather(self, payload: Tensor, counts: Sequence[int]) -> list[Tensor]:  # noqa: D102
        send = payload.cpu().numpy()
        received = [torch.empty(count, dtype=torch.uint8) for count in counts]
        step = max(1, CHUNK_BYTES // self.size)
        for start in range(0, max(counts), step):
            sizes = [max(0, min(step, count - start)) for count in counts]
            chunk = np.empty(sum(sizes), np.uint8)
            mine = send[start : start + sizes[self.rank]]
            self._mpi.Allgatherv([mine, MPI.BYTE], [chunk, (sizes, None), MPI.BYTE])
            for k, piece in enumerate(np.split(chunk, np.cumsum(sizes)[:-1])):
                received[k].numpy()[start : start + sizes[k]] = piece
        return [piece.to(payload.device) for piece in received]

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        arrays = [piece.cpu().numpy() for piece in pieces]
        counts = [array.size for array in arrays]
        received = [torch.empty(counts[self.rank], dtype=torch.uint8) for _ in counts]
        step = max(1, CHUNK_BYTES // self.size)
        for start in range(0, max(counts), step):
            sizes = [max(0, min(step, count - start)) for count in counts]
            out = np.concatenate([piece[start : start + n] for piece, n in zip(arrays, sizes, strict=True)])
            own = sizes[self.rank]
            chunk = np.empty(own * self.size, np.uint8)
            incoming = ([own] * self.size, None)
            self._mpi.Alltoallv([out, (sizes, None), MPI.BYTE], [chunk, incoming, MPI.BYTE])
            for k in range(self.size):
                received[k].numpy()[start : start + own] = chunk[k * own : (k + 1) * own]
        return [piece.to(pieces[0].device) for piece in received]

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        # Waited for before the next one is submitted, so that Horovod has nothing to fuse it with:
        # how tensors are fused decides how sums round.
        hvd.allreduce_(tensor, name=f"hvd_saef.{name}", op=hvd.Average, process_set=self.process_set)

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        flat = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
        for start in range(0, flat.size, CHUNK_BYTES):
            self._mpi.Bcast([flat[start : start + CHUNK_BYTES], MPI.BYTE], root=root)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape))

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return list(self._mpi.allgather(value))

    def combine(self, word: int) -> int:  # noqa: D102
        mine, all_of_them = np.array([word], np.int64), np.empty(1, np.int64)
        self._mpi.Allreduce(mine, all_of_them, op=MPI.BOR)
        return int(all_of_them[0])


class Meeting:
    """Where the threads of a simulation meet: everyone brings something, everyone sees everything."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._brought: dict[int, tuple[str, Any]] = {}
        self._seen: list[tuple[str, Any]] = []
        self._meetings = 0
        self._left: int | None = None

    def exchange(self, rank: int, operation: str, value: Any) -> list[Any]:
        """Everyone's `value`, in rank order. Raises SaefError if somebody left or does something else."""
        with self._changed:
            number = self._meetings
            self._brought[rank] = (operation, value)
            if len(self._brought) == self.size:
                self._seen = [self._brought[k] for k in range(self.size)]
                self._brought = {}
                self._meetings += 1
                self._changed.notify_all()
            else:
                self._changed.wait_for(lambda: self._meetings != number or self._left is not None)
            if self._meetings == number:
                raise SaefError(
                    f"worker {self._left} has ended, and worker {rank} waits for it in {operation}."
                )
            operations = [name for name, _ in self._seen]
            if len(set(operations)) > 1:
                raise SaefError(f"workers called different collectives at the same time: {operations}.")
            return [brought for _, brought in self._seen]

    def leave(self, rank: int) -> None:
        """Say that worker `rank` will not come again."""
        with self._changed:
            self._left = rank if self._left is None else self._left
            self._changed.notify_all()


class ThreadCommunicator(Communicator):
    """One of the threads that :func:`hvd_saef.simulation.run_workers` started."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank, self.size = rank, meeting.size

    def allgather(self, payload: Tensor, counts: Sequence[int]) -> list[Tensor]:  # noqa: D102
        return self._meeting.exchange(self.rank, "allgather", payload.clone())

    def alltoall(self, pieces: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        sent = [piece.clone() for piece in pieces]
        return [theirs[self.rank] for theirs in self._meeting.exchange(self.rank, "alltoall", sent)]

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        tensors = self._meeting.exchange(self.rank, f"allreduce {name}", tensor.detach().clone())
        total = tensors[0].clone()
        for other in tensors[1:]:
            total += other
        with torch.no_grad():
            tensor.copy_(total / self.size)

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        tensors = self._meeting.exchange(self.rank, "broadcast", tensor.detach().clone())
        with torch.no_grad():
            tensor.copy_(tensors[root])

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return self._meeting.exchange(self.rank, "allgather_object", value)

    def combine(self, word: int) -> int:  # noqa: D102
        combined = 0
        for other in self._meeting.exchange(self.rank, "combine", word):
            combined |= other
        return combined


_here = threading.local()
_of_process_sets: dict[tuple[int, ...], MpiCommunicator] = {}


def set_thread_communicator(communicator: ThreadCommunicator | None) -> None:
    """Make `communicator` the one that this thread's optimizers find."""
    _here.communicator = communicator


def _abort_on_exceptions() -> None:
    """Let an exception that ends this rank end the job: the others would wait for it for ever.

    HVD_SAEF_NO_ABORT=1 leaves it to the launcher.
    """
    if os.environ.get("HVD_SAEF_NO_ABORT") == "1":
        return
    earlier = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, error, traceback)
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
    own: ThreadCommunicator | None = getattr(_here, "communicator", None)
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
