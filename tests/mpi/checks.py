"""What is true on real MPI and real Horovod: each check is run by all ranks of one job.

mpirun -np 3 python -m tests.mpi.checks OUTPUT.json [NAME ...]
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import hvd_saef
from hvd_saef import run_workers
from hvd_saef.transport import mpi
from tests.oracle import Setup, run
from tests.problems import (
    STEPS,
    Outcome,
    curved_valley,
    run_library,
    same_bits,
    schedule,
    start_point,
    worst,
)
from tests.problems import wrap as wrap_as
from tests.round.test_disagreement import Flipping
from tests.round.test_exchange_failures import Failing
from tests.transport.test_staging import device_of_its_own
from tests.workers import Run, everything

TOLERANCE = 1e-10
Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


def setup(**settings: Any) -> Setup:
    """An oracle's setup for this job's workers."""
    defaults: dict[str, Any] = {"compressor": "sign", "optimizer": "sgdm", "weight_decay": 0.01}
    return Setup(workers=hvd.size(), lr=schedule, **(defaults | settings))


def train(settings: Setup, **options: Any) -> Outcome:
    """This rank's run of the library."""
    return run_library(settings, hvd.rank(), start_point(), **options)


def same_everywhere(outcome: Outcome) -> bool:
    """Whether x has the same bits on all ranks, found by Horovod's allgather."""
    mine = torch.from_numpy(np.concatenate([array.reshape(-1) for array in outcome.x]))
    everyone = hvd.allgather(mine.unsqueeze(0))
    return all(torch.equal(row.view(torch.int64), everyone[0].view(torch.int64)) for row in everyone)


PAYLOAD_SETUPS: list[tuple[dict[str, Any], str]] = [
    ({"double_compression": False}, "auto"),
    ({}, "replicated"),
    ({"block_size": 17}, "sharded"),
    ({"feedback": "ef"}, "auto"),
    ({"server_step_ahead": 1.0, "step_ahead": 0.5}, "auto"),
    ({"compressor": "topk", "local_steps": 3, "optimizer": "adamw"}, "sharded"),
    ({"compressor": "topk", "feedback": "none"}, "auto"),
]
REDUCED_SETUPS: list[tuple[dict[str, Any], str]] = [
    ({"averaging_period": 4}, "auto"),
    ({"averaging_period": 2, "compressor": "topk", "server_step_ahead": 1.0}, "auto"),
    ({"warmup_steps": 5, "block_size": 17}, "sharded"),
    ({"compressor": "none"}, "auto"),
    ({"compressor": "none", "feedback": "none", "optimizer": "sgd", "weight_decay": 0.0}, "auto"),
]


@check
def agrees_with_the_oracle() -> None:
    for settings, server in PAYLOAD_SETUPS + REDUCED_SETUPS:
        wanted = setup(**settings)
        truth = run(wanted, start_point(), curved_valley, STEPS)
        outcome = train(wanted, server=server)
        if wanted.feedback == "none" and wanted.compressor == "none":
            assert worst(outcome.parameters, truth.x) <= TOLERANCE
            continue
        assert same_everywhere(outcome)
        assert worst(outcome.x, truth.x) <= TOLERANCE
        assert worst(outcome.parameters, truth.parameters[hvd.rank()]) <= TOLERANCE
        assert worst(outcome.errors, truth.errors[hvd.rank()]) <= TOLERANCE


def is_as_with_threads(outcome: Outcome, wanted: Setup, ranks: int = 1, **options: Any) -> None:
    """Whether threads in the places of this job's ranks come to the same bits, and send as much."""

    def simulated(rank: int) -> Outcome:
        return run_library(wanted, rank, start_point(), **options)

    twin = run_workers(wanted.workers, simulated, ranks=ranks)[hvd.rank()]
    assert same_bits(outcome.x, twin.x)
    assert same_bits(outcome.errors, twin.errors)
    for name in ("payload_bytes_sent", "node_bytes_sent"):
        assert outcome.stats[name] == twin.stats[name]


@check
def has_the_bits_of_threads() -> None:
    for settings, server in PAYLOAD_SETUPS:
        wanted = setup(**settings)
        is_as_with_threads(train(wanted, server=server), wanted, server=server)


@check
def has_the_same_bits_twice_and_with_either_server() -> None:
    for settings, server in PAYLOAD_SETUPS + REDUCED_SETUPS:
        first, second = (train(setup(**settings), server=server) for _ in range(2))
        assert same_bits(first.parameters, second.parameters)
    for compressor in ("sign", "topk"):
        cut, whole = (train(setup(compressor=compressor), server=s) for s in ("sharded", "replicated"))
        assert same_bits(cut.x, whole.x)
        assert same_bits(cut.errors, whole.errors)


@check
def float32_and_bfloat16_agree_on_x() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for settings in ({"averaging_period": 3}, {"compressor": "none"}, {"compressor": "topk"}):
            assert same_everywhere(train(setup(**settings), dtype=dtype))
    assert same_everywhere(train(setup(), compression=hvd_saef.Compression.fp16, dtype=torch.float32))


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
def memory_that_mpi_does_not_reach_changes_nothing() -> None:
    whole = [train(setup(), server=server) for server in ("sharded", "replicated")]
    with device_of_its_own() as calls:
        staged = [train(setup(), server=server) for server in ("sharded", "replicated")]
    for a, b in zip(whole, staged, strict=True):
        assert same_bits(a.x, b.x)
    assert sum(call.endswith("is waited for") for call in calls) >= 2 * STEPS


def small_model(seed: int) -> nn.Module:
    """A model whose start depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def backward(model: nn.Module, step: int) -> None:
    """A gradient of this rank's own data."""
    generator = torch.Generator().manual_seed(100 * step + hvd.rank())
    model.zero_grad()
    model(torch.randn(8, 6, generator=generator)).square().sum().backward()


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
def checkpoints_resume_to_the_bit() -> None:
    folder = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None, root_rank=0, name="folder")

    def made(seed: int) -> tuple[nn.Module, Any]:
        model = small_model(seed)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, hvd_saef.DistributedOptimizer(inner, model=model, block_size=4, local_steps=2)

    model, optimizer = made(seed=0)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    hvd_saef.save_checkpoint(folder, model, optimizer, step=5)
    resumed, second = made(seed=hvd.rank() + 1)
    first_step = hvd_saef.load_checkpoint(folder, resumed, second)["step"]
    for step in range(first_step, 10):
        for net, its_optimizer in ((model, optimizer), (resumed, second)):
            backward(net, step)
            its_optimizer.step()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@check
def frozen_layers_are_unfrozen_by_all_or_none() -> None:
    for odd in (False, True):
        model = small_model(seed=0)
        for parameter in list(model.parameters())[:2]:
            parameter.requires_grad_(False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model)
        for step in range(6):
            if step == 3 and not (odd and hvd.rank() == 0):
                model.requires_grad_(True)
            backward(model, step)
            if step == 3 and odd and hvd.size() > 1:
                with pytest.raises(hvd_saef.ConfigurationMismatchError, match=r"'0\.weight' takes part"):
                    optimizer.step()
                return
            optimizer.step()
        x = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
        assert all(torch.equal(row, x) for row in hvd.allgather(x.unsqueeze(0)))
        assert optimizer.stats()["rounds"] == 6


@check
def batchnorm_and_uneven_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    hvd_saef.recalibrate_batchnorm(model, [torch.full((4, 2), float(hvd.rank()))])
    expected = (hvd.size() - 1) / 2
    assert torch.allclose(model[0].get_buffer("running_mean"), torch.full((2,), expected))
    assert hvd_saef.common_steps(10 + hvd.rank()) == 10


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
def everyone_is_told_of_a_mismatch() -> None:
    if hvd.size() == 1:
        return
    wanted = setup(block_size=3 if hvd.rank() == hvd.size() - 1 else 4)
    with pytest.raises(hvd_saef.ConfigurationMismatchError, match=r"block_size: 4 on rank.* 3 on rank"):
        train(wanted)


@check
def everyone_is_told_of_a_nan() -> None:
    def poisoned(worker: int, step: int, parameters: list[Any]) -> list[Any]:
        gradients = curved_valley(worker, step, parameters)
        if step == 3 and worker == hvd.size() - 1 and gradients[0] is not None:
            gradients[0][0, 0] = np.nan
        return gradients

    with pytest.raises(hvd_saef.NonFiniteUpdateError, match=rf"'noname\.0\.0' on rank {hvd.size() - 1}"):
        train(setup(), gradient=poisoned)
    assert train(setup(), gradient=poisoned, on_nonfinite="skip").stats["skipped"] == 1


@check
def everyone_is_told_of_different_starts() -> None:
    if hvd.size() == 1:
        return
    start = start_point(seed=hvd.rank())
    with pytest.raises(hvd_saef.ConsensusError, match=r"'noname\.0\.0'.*broadcast_parameters"):
        run_library(setup(), hvd.rank(), start)


@check
def everyone_is_told_of_an_update_that_overflows() -> None:
    def exploding(worker: int, step: int, parameters: list[Any]) -> list[Any]:
        gradients = curved_valley(worker, step, parameters)
        if step == 3 and worker == hvd.size() - 1 and gradients[0] is not None:
            gradients[0][0, 0] = 1e308
        return gradients

    with pytest.raises(hvd_saef.NonFiniteUpdateError, match=rf"on rank {hvd.size() - 1}"):
        train(setup(), gradient=exploding)
    assert train(setup(), gradient=exploding, on_nonfinite="skip").stats["skipped"] == 1


@check
def everyone_is_told_of_an_exception_in_a_closure() -> None:
    failing = hvd.size() - 1
    run = Run(hvd.rank()).step(2)

    def closure() -> float:
        if hvd.rank() == failing:
            raise ZeroDivisionError("no batch")
        return 1.0

    run.set_gradients()
    before = everything(run)
    error = ZeroDivisionError if hvd.rank() == failing else hvd_saef.WorkerError
    with pytest.raises(error, match="no batch" if hvd.rank() == failing else f"rank {failing} raised Zero"):
        run.optimizer.step(closure)
    assert everything(run) == before
    run.step(2)


@check
def a_flipped_bit_of_x_is_found() -> None:
    if hvd.size() == 1:
        return
    flips = hvd.rank() == hvd.size() - 1  # single-way: a round decodes the payload of every worker
    flipping = Flipping(3 * hvd.size() if flips else -1)
    run = Run(hvd.rank(), compression=flipping, double_compression=False, check_consensus_every=2).step(3)
    with pytest.raises(hvd_saef.ConsensusError, match=rf"'noname\.0\.1'.*on rank {hvd.size() - 1}"):
        run.step()
    run.optimizer.reanchor()
    run.step(2)


@check
def one_number_out_of_many_is_broadcast() -> None:
    parameter = nn.Parameter(torch.full((1, 3), float(hvd.rank()))[:, 1])
    optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.5))
    optimizer.reanchor()
    parameter.grad = torch.ones(1)
    optimizer.step()
    optimizer.eval()
    assert parameter.item() == -0.5


@check
def a_second_optimizer_does_not_mind_the_first() -> None:
    settings: list[dict[str, Any]] = [{"averaging_period": 2}, {"compressor": "topk", "averaging_period": 3}]

    def trained(which: list[int]) -> list[bytes]:
        models = [small_model(seed=k) for k in which]
        optimizers = [
            wrap_as(
                setup(**settings[k]),
                torch.optim.SGD(model.parameters(), lr=0.1),
                named_parameters=model.named_parameters(),
                model=model,
                overlap=True,
            )
            for k, model in zip(which, models, strict=True)
        ]
        for step in range(6):
            for model, optimizer in zip(models, optimizers, strict=True):
                model.zero_grad()
                backward(model, step)
                optimizer.step()
        return [p.detach().numpy().tobytes() for model in models for p in model.state_dict().values()]

    assert trained([0, 1]) == trained([0]) + trained([1])


@check
def objects_in_small_chunks_and_objects_that_cannot_be_sent() -> None:
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
    last = hvd.rank() == hvd.size() - 1
    with pytest.raises(Exception if last else hvd_saef.WorkerError, match=r"pickle|local object"):
        communicator.allgather_object((lambda: None) if last else 1)
    assert communicator.allgather_object(hvd.rank()) == list(range(hvd.size()))


@check
def several_optimizers_get_their_own_payloads() -> None:
    dense: dict[str, Any] = {
        "compression": lambda name, _: (
            hvd_saef.Compression.none if "bias" in name else hvd_saef.Compression.sign
        )
    }
    for more in ({}, {"averaging_period": 2}, {"warmup_steps": 2}, {"double_compression": False}):
        for kinds in ((True, True), (True, False)):
            alone, among = (
                several_trained([overlap and kind for kind in kinds], **more) for overlap in (False, True)
            )
            assert alone == among
    assert several_trained([False, False], **dense) == several_trained([True, True], **dense)


def several_trained(overlaps: list[bool], **settings: Any) -> list[bytes]:
    """The bits of x, the same everywhere, after some steps with gradients that not all ranks have."""
    compression = settings.pop("compression", None)
    pairs = []
    for seed, overlap in enumerate(overlaps):
        model = small_model(seed)
        made = setup(**settings)
        more = {} if compression is None else {"compression": compression}
        pairs.append(
            (
                model,
                wrap_as(
                    made,
                    torch.optim.AdamW(model.parameters(), lr=0.01),
                    named_parameters=model.named_parameters(),
                    model=model,
                    bucket_bytes=100,
                    overlap=overlap,
                    **more,
                ),
            )
        )
    for step in range(6):
        for model, _ in pairs:
            if model is pairs[0][0] and hvd.rank() == hvd.size() - 1 and step % 2:
                model.zero_grad()
                next(model.children())(
                    torch.ones(8, 6)
                ).square().sum().backward()  # the last layer has no gradients
            else:
                backward(model, step)
        for _, optimizer in reversed(pairs):
            optimizer.step()
    bits = [value.numpy().tobytes() for model, _ in pairs for value in model.state_dict().values()]
    assert hvd.allgather_object(bits) == hvd.size() * [bits]
    return bits


@check
def lines_come_back() -> None:
    for _ in range(12):
        several_trained([True, True])
    optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD(small_model(0).parameters(), lr=0.1))
    assert optimizer._saef._lease.lines._made <= 4


@check
def everyone_is_told_of_an_exception_in_an_exchange() -> None:
    for where in ("encode", "decode_add"):
        odd = hvd.rank() == hvd.size() - 1
        failing = Failing(where, 0)
        run = Run(hvd.rank(), compression=failing, bucket_bytes=64).step()
        failing.left[where] = 11 if odd else 0
        with pytest.raises(hvd_saef.errors.ExchangeError, match=f"rank {hvd.size() - 1} raised Arithmetic"):
            run.step(20)
        run.optimizer.reanchor()
        run.step(2)


@check
def everyone_is_told_of_a_wrong_argument() -> None:
    odd = hvd.rank() == hvd.size() - 1
    parameter = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([parameter], lr=0.5)
    with pytest.raises(ValueError if odd else hvd_saef.WorkerError, match="local_steps=0"):
        hvd_saef.DistributedOptimizer(inner, local_steps=0 if odd else 1)
    with pytest.raises(ValueError if odd else hvd_saef.WorkerError, match="steps=-1"):
        hvd_saef.common_steps(-1 if odd else 3)
    hvd_saef.DistributedOptimizer(inner)


PROCESS_SETS: list[Any] = []


def run_checks(checks: dict[str, Check], output: str, names: list[str]) -> None:
    """Run the checks on all ranks, and write on rank 0 what failed where."""
    warnings.filterwarnings("ignore", message="parameters are stepped ahead")
    warnings.filterwarnings("ignore", message="the largest block")
    warnings.filterwarnings("ignore", message="SignCompressor was given")
    warnings.filterwarnings("ignore", message="compression=.* is Horovod's own")
    torch.set_num_threads(1)
    report: dict[str, list[str]] = {}
    for name in [name for name in checks if not names or name in names]:
        failure = None
        try:
            checks[name]()
        except BaseException:
            failure = traceback.format_exc()
        report[name] = [
            f"rank {rank}: {text}" for rank, text in enumerate(hvd.allgather_object(failure, name)) if text
        ]
    failure = after_shutdown()
    everyone = MPI.COMM_WORLD.allgather(failure)
    report["after_shutdown_a_step_says_so"] = [f"rank {k}: {text}" for k, text in enumerate(everyone) if text]
    if MPI.COMM_WORLD.Get_rank() == 0:
        with open(output, "w") as file:
            json.dump(report, file)


def after_shutdown() -> str | None:
    """What is wrong with an optimizer that is used after hvd.shutdown(), the last thing that happens."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones(3)
    optimizer.step()
    hvd.shutdown()
    try:
        optimizer.step()
    except RuntimeError as error:
        return None if "shut down" in str(error) else str(error)
    return "no error"


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
