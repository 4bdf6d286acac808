"""Finds the communicator of an optimizer: that of its thread, or that of a Horovod process set."""

from __future__ import annotations

import threading
from typing import Any

from hvd_saef.transport.communicator import Communicator, SoloCommunicator
from hvd_saef.transport.libraries import horovod, missing, mpi4py

_here = threading.local()
_of_process_sets: dict[tuple[int, ...], Communicator] = {}


def set_thread_communicator(communicator: Communicator | None) -> None:
    """Sets the communicator that :func:`find_communicator` finds in this thread; None unsets it. Local."""
    _here.communicator = communicator


def find_communicator(process_set: Any) -> tuple[Communicator, bool]:
    """Returns the communicator of this thread or of a process set, and whether this rank is in the set.

    The first call for a process set is collective over it; the communicator is kept as long as the process
    lives. Raises RuntimeError if Horovod on MPI cannot be used, ValueError if Horovod does not know the
    process set.
    """
    own: Communicator | None = getattr(_here, "communicator", None)
    hvd = horovod()
    if own is not None:
        if process_set is not None and process_set is not (hvd and hvd.global_process_set):
            raise ValueError(f"process_set={process_set}: a simulation has the global process set only.")
        return own, True
    if hvd and not hvd.is_initialized():  # this check comes first, since importing mpi4py starts MPI
        raise RuntimeError(
            "Horovod is not initialized: call hvd.init() before hvd_saef.DistributedOptimizer."
        )
    if missing():
        raise RuntimeError(
            f"{'; '.join(missing())}: both are needed; launch/bootstrap.sh makes an environment with them. "
            "hvd_saef.simulation.run_workers works without."
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
    from hvd_saef.transport.mpi import MpiCommunicator, abort_on_exceptions

    key = tuple(ranks)
    if not _of_process_sets and hvd.size() > 1:
        abort_on_exceptions()
    if key not in _of_process_sets:
        _of_process_sets[key] = MpiCommunicator(key)
    _of_process_sets[key].process_set = process_set  # the set may have been removed and added anew
    return _of_process_sets[key], True
