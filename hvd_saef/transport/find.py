"""Finds the communicator of an optimizer: that of its thread, a Horovod process set or a torch group."""

from __future__ import annotations

import threading
from typing import Any

import torch.distributed as dist

from hvd_saef.transport.abort import abort_on_exceptions
from hvd_saef.transport.communicator import Communicator, SoloCommunicator
from hvd_saef.transport.libraries import loaded_horovod, missing, mpi4py

_here = threading.local()
_of_process_sets: dict[tuple[int, ...], Communicator] = {}
NOBODY = (
    "nothing carries the updates yet: call hvd.init() (Horovod with MPI) or "
    "torch.distributed.init_process_group() before hvd_saef.DistributedOptimizer,\n"
    "or pass process_group=, a torch.distributed group. hvd_saef.simulation.run_workers needs none of them."
)


def set_thread_communicator(communicator: Communicator | None) -> None:
    """Sets the communicator that :func:`find_communicator` finds in this thread; None unsets it. Local."""
    _here.communicator = communicator


def find_communicator(process_set: Any = None, process_group: Any = None) -> tuple[Communicator, bool]:
    """Returns the communicator of this thread, a process set or a group; and whether this rank is in it.

    The first that there is carries the bytes: the thread's own communicator within a simulation; the
    torch.distributed `process_group`; Horovod with MPI, after hvd.init(); the default group of
    torch.distributed, after init_process_group().

    The first call for a set or group is collective over it; the communicator is kept as long as the process
    lives. Raises RuntimeError if there is none of them or Horovod on MPI cannot be used, and ValueError for a
    process set or group that the library does not know, or that does not fit.
    """
    own: Communicator | None = getattr(_here, "communicator", None)
    hvd = loaded_horovod()
    if own is not None:
        if process_group is not None or process_set not in (None, hvd and hvd.global_process_set):
            raise ValueError(
                f"process_set={process_set}, process_group={process_group}: a simulation has the global "
                "process set only, which None stands for."
            )
        return own, True
    if process_group is not None and process_set is not None:
        raise ValueError(
            f"process_set={process_set}, process_group={process_group}: one of them is allowed. Process sets "
            "are Horovod's, groups are torch.distributed's."
        )
    if process_group is None and hvd and hvd.is_initialized():
        return _of_horovod(hvd, process_set)
    if dist.is_available() and dist.is_initialized():
        if process_set is not None:
            raise ValueError(
                f"process_set={process_set}: process sets are Horovod's, and torch.distributed carries the "
                "updates here: pass process_group=, or call hvd.init()."
            )
        from hvd_saef.transport.torch_distributed import communicator_of

        return communicator_of(process_group)
    raise RuntimeError(NOBODY)


def _abort(mpi: Any) -> None:
    if not mpi.Is_finalized():  # Horovod ends MPI on all ranks when another rank ends
        mpi.COMM_WORLD.Abort(1)


def _of_horovod(hvd: Any, process_set: Any) -> tuple[Communicator, bool]:
    if missing():
        raise RuntimeError(
            f"{'; '.join(missing())}: both are needed; launch/bootstrap.sh makes an environment with them. "
            "torch.distributed works without, and so does hvd_saef.simulation.run_workers."
        )
    MPI = mpi4py()  # noqa: N806 - mpi4py's name for it
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
    from hvd_saef.transport.mpi import MpiCommunicator

    key = tuple(ranks)
    if not _of_process_sets and hvd.size() > 1:
        abort_on_exceptions(world.Get_rank(), lambda: _abort(MPI))
    if key not in _of_process_sets:
        _of_process_sets[key] = MpiCommunicator(key)
    _of_process_sets[key].process_set = process_set  # the set may have been removed and added anew
    return _of_process_sets[key], True
