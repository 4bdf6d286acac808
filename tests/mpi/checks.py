"""What is true on real MPI and real Horovod: each check is run by all ranks of one job.

mpirun -np 3 python -m tests.mpi.checks OUTPUT [NAME ...]
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn

import hvd_saef
from hvd_saef.transport import mpi
from tests.oracle import Setup, run
from tests.problems import STEPS, curved_valley, run_library, same_bits, schedule, start_point, worst
from tests.transport import checks as everywhere
from tests.transport.checks import TOLERANCE, Check, backward, run_checks, setup, small_model, train

CHECKS: dict[str, Check] = dict(everywhere.CHECKS)


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


@check
def small_chunks_change_nothing() -> None:
    whole = [train(setup(block_size=17), server=server) for server in ("sharded", "replicated")]
    before = mpi.CHUNK_BYTES
    mpi.CHUNK_BYTES = 7 * hvd.size()
    try:
        cut = [train(setup(block_size=17), server=server) for server in ("sharded", "replicated")]
    finally:
        mpi.CHUNK_BYTES = before
    for a, b in zip(whole, cut, strict=True):
        assert same_bits(a.x, b.x)
        assert a.stats["payload_bytes_sent"] == b.stats["payload_bytes_sent"]


@check
def broadcasts_before_and_after_wrapping() -> None:
    for when in ("before", "after"):
        model = small_model(seed=hvd.rank())
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if when == "before":
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = hvd_saef.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), model=model
        )
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        assert optimizer.stats()["rounds"] == 0
        for parameter, value in zip(model.parameters(), start, strict=True):
            assert torch.equal(parameter, value)
        backward(model, 0)
        optimizer.step()
        assert optimizer.stats()["rounds"] == 1
        moved = [not torch.equal(p, v) for p, v in zip(model.parameters(), start, strict=True)]
        assert all(moved)
        state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0)
        optimizer.load_state_dict(state)
        backward(model, 1)
        optimizer.step()


@check
def rank_0_alone_resumed() -> None:
    for server in ("replicated", "auto"):
        rank_0_alone_resumed_with(server)


def rank_0_alone_resumed_with(server: Any) -> None:
    def made(seed: int) -> tuple[nn.Module, Any]:
        model = small_model(seed)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, hvd_saef.DistributedOptimizer(inner, model=model, server=server)

    model, optimizer = made(seed=0)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    optimizer.consolidate()
    # Copied: torch's state dicts share their tensors with the optimizer they came from.
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed, second = made(seed=hvd.rank() + 1)
    if hvd.rank() == 0:
        resumed.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
    hvd.broadcast_parameters(resumed.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(second, root_rank=0)
    # The others learn e at their first step, so that one gradient is taken at x: give it no weight.
    for step, rate in ((3, 0.0), (4, 0.1), (5, 0.1)):
        for net, its_optimizer in ((model, optimizer), (resumed, second)):
            its_optimizer.param_groups[0]["lr"] = rate
            backward(net, step)
            its_optimizer.step()
    assert second.stats()["rounds"] == 6
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@check
def process_sets_train_apart() -> None:
    if hvd.size() < 3:
        return
    pair, rest = PROCESS_SETS
    mine = pair if pair.included() else rest
    wanted = Setup(workers=len(mine.ranks), compressor="sign", lr=schedule)
    outcome = run_library(wanted, mine.rank(), start_point(), process_set=mine)
    truth = run(wanted, start_point(), curved_valley, STEPS)
    assert worst(outcome.x, truth.x) <= TOLERANCE
    # A rank outside the set that it names trains alone, without waiting for anyone.
    other = rest if mine is pair else pair
    alone = run_library(Setup(1, "none", feedback="none", lr=schedule), 0, start_point(), process_set=other)
    truth = run(Setup(1, "none", feedback="none", lr=schedule), start_point(), curved_valley, STEPS)
    assert worst(alone.parameters, truth.x) <= TOLERANCE
    assert alone.stats["dense_bytes_sent"] == 0


@check
def without_feedback_it_is_horovod() -> None:
    trained = []
    for wrap in (hvd.DistributedOptimizer, hvd_saef.DistributedOptimizer):
        model = small_model(seed=0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        options: dict[str, Any] = {} if wrap is hvd.DistributedOptimizer else {"feedback": "none"}
        optimizer = wrap(inner, model.named_parameters(), hvd.Compression.none, **options)
        for step in range(10):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        trained.append([parameter.detach() for parameter in model.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@check
def horovods_own_optimizer_gets_dense_tensors() -> None:
    model = small_model(seed=0)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), hvd_saef.Compression.sign)
    backward(model, 0)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    own = (
        [hvd_saef.Compression.sign.compress(gradient)[0] for gradient in gradients]
        if hvd.size() == 1
        else None
    )
    optimizer.step()
    for i, (parameter, start) in enumerate(zip(model.parameters(), before, strict=True)):
        moved = start - parameter.detach()
        assert bool(torch.isfinite(moved).all())
        if own is not None:
            return  # Horovod exchanges nothing with itself, and so compresses nothing
        # The mean of K matrices ±scale_k: every entry is a signed mean of the K scales.
        scales = hvd.allgather(hvd_saef.Compression.sign.apply(local_gradient(i)).abs().reshape(1, -1)[:, :1])
        assert float(moved.abs().max()) <= float(scales.mean()) * (1 + 1e-5)


def local_gradient(index: int) -> torch.Tensor:
    """What :func:`backward` of a fresh model gives this rank's parameter number `index`."""
    model = small_model(seed=0)
    backward(model, 0)
    gradient = list(model.parameters())[index].grad
    return torch.zeros(()) if gradient is None else gradient


@check
def objects_in_small_chunks() -> None:
    communicator = mpi.MpiCommunicator(tuple(range(hvd.size())))
    mine = {"rank": hvd.rank(), "values": np.arange(1000 * hvd.rank()), "empty": b""}
    before = mpi.CHUNK_BYTES
    mpi.CHUNK_BYTES = 101 * hvd.size()
    try:
        everyone = communicator.allgather_object(mine)
        nothing = communicator.allgather_object(None)
    finally:
        mpi.CHUNK_BYTES = before
    assert nothing == hvd.size() * [None]
    for rank, theirs in enumerate(everyone):
        assert (theirs["rank"], theirs["empty"]) == (rank, b"")
        assert np.array_equal(theirs["values"], np.arange(1000 * rank))
    assert communicator.allgather_object(hvd.rank()) == list(range(hvd.size()))


PROCESS_SETS: list[Any] = []


def main() -> None:
    """Start Horovod with two process sets, and run the checks."""
    hvd.init()
    if hvd.size() >= 3:
        ranks = [[0, 2], [r for r in range(hvd.size()) if r not in (0, 2)]]
        PROCESS_SETS.extend(hvd.ProcessSet(members) for members in ranks)
        hvd.shutdown()
        hvd.init(process_sets=PROCESS_SETS)
    run_checks(CHECKS, sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
