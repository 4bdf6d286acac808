"""What is true on every transport: each check is run by all ranks of one job.

`tests.mpi.checks` runs them on MPI and Horovod, `tests.torch_distributed.checks` on torch.distributed.
"""

from __future__ import annotations

import gc
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hvd_saef
from benchmarks.job import TorchJob, job
from hvd_saef import kernels, run_workers
from hvd_saef.transport.find import find_communicator
from tests.oracle import Setup, run
from tests.problems import (
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
from tests.stand_in import stand_in
from tests.workers import Run, everything

TOLERANCE = 1e-10
STEPS = 12
"""Fewer than among threads: ranks that share cores take turns at each collective."""
Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


def setup(**settings: Any) -> Setup:
    """An oracle's setup for this job's workers."""
    defaults: dict[str, Any] = {"compressor": "sign", "optimizer": "sgdm", "weight_decay": 0.01}
    return Setup(workers=job.size(), lr=schedule, **(defaults | settings))


def train(settings: Setup, **options: Any) -> Outcome:
    """This rank's run of the library."""
    return run_library(settings, job.rank(), start_point(), steps=STEPS, **options)


def same_bits_everywhere(mine: torch.Tensor) -> bool:
    """Whether all ranks have these bits."""
    everyone = job.gather(mine.detach().contiguous().view(torch.uint8))
    return all(torch.equal(theirs, everyone[0]) for theirs in everyone)


def same_everywhere(outcome: Outcome) -> bool:
    """Whether x has the same bits on all ranks, found without hvd_saef."""
    return same_bits_everywhere(torch.from_numpy(np.concatenate([a.reshape(-1) for a in outcome.x])))


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
        assert worst(outcome.parameters, truth.parameters[job.rank()]) <= TOLERANCE
        assert worst(outcome.errors, truth.errors[job.rank()]) <= TOLERANCE


def is_as_with_threads(outcome: Outcome, wanted: Setup, ranks: int = 1, **options: Any) -> None:
    """Whether threads in the places of this job's ranks come to the same bits, and send as much."""

    def simulated(rank: int) -> Outcome:
        return run_library(wanted, rank, start_point(), steps=STEPS, **options)

    twin = run_workers(wanted.workers, simulated, ranks=ranks)[job.rank()]
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
def memory_that_the_transport_does_not_reach_changes_nothing() -> None:
    whole = [train(setup(), server=server) for server in ("sharded", "replicated")]
    with kernels.only("twins"), stand_in() as recorder:

        def place(number: int, start: torch.Tensor) -> torch.Tensor:
            return recorder.to_gpu(start)

        staged = [train(setup(), server=server, place=place) for server in ("sharded", "replicated")]
    for a, b in zip(whole, staged, strict=True):
        assert same_bits(a.x, b.x)
    assert len(recorder.pinned) > 0 or job.size() == 1
    assert not recorder.complaints, recorder.complaints[:5]


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
    generator = torch.Generator().manual_seed(100 * step + job.rank())
    model.zero_grad()
    model(torch.randn(8, 6, generator=generator)).square().sum().backward()


@check
def checkpoints_resume_to_the_bit() -> None:
    folder = job.gather(tempfile.mkdtemp() if job.rank() == 0 else None)[0]

    def made(seed: int) -> tuple[nn.Module, Any]:
        model = small_model(seed)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, hvd_saef.DistributedOptimizer(inner, model=model, block_size=4, local_steps=2)

    model, optimizer = made(seed=0)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    hvd_saef.save_checkpoint(folder, model, optimizer, step=5)
    resumed, second = made(seed=job.rank() + 1)
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
            if step == 3 and not (odd and job.rank() == 0):
                model.requires_grad_(True)
            backward(model, step)
            if step == 3 and odd and job.size() > 1:
                with pytest.raises(hvd_saef.ConfigurationMismatchError, match=r"'0\.weight' takes part"):
                    optimizer.step()
                return
            optimizer.step()
        x = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
        assert same_bits_everywhere(x)
        assert optimizer.stats()["rounds"] == 6


@check
def batchnorm_and_uneven_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    hvd_saef.recalibrate_batchnorm(model, [torch.full((4, 2), float(job.rank()))])
    expected = (job.size() - 1) / 2
    assert torch.allclose(model[0].get_buffer("running_mean"), torch.full((2,), expected))
    assert hvd_saef.common_steps(10 + job.rank()) == 10


@check
def everyone_is_told_of_a_mismatch() -> None:
    if job.size() == 1:
        return
    wanted = setup(block_size=3 if job.rank() == job.size() - 1 else 4)
    with pytest.raises(hvd_saef.ConfigurationMismatchError, match=r"block_size: 4 on rank.* 3 on rank"):
        train(wanted)


@check
def everyone_is_told_of_a_nan() -> None:
    def poisoned(worker: int, step: int, parameters: list[Any]) -> list[Any]:
        gradients = curved_valley(worker, step, parameters)
        if step == 3 and worker == job.size() - 1 and gradients[0] is not None:
            gradients[0][0, 0] = np.nan
        return gradients

    with pytest.raises(hvd_saef.NonFiniteUpdateError, match=rf"'noname\.0\.0' on rank {job.size() - 1}"):
        train(setup(), gradient=poisoned)
    assert train(setup(), gradient=poisoned, on_nonfinite="skip").stats["skipped"] == 1


@check
def everyone_is_told_of_different_starts() -> None:
    if job.size() == 1:
        return
    start = start_point(seed=job.rank())
    with pytest.raises(hvd_saef.ConsensusError, match=r"'noname\.0\.0'.*broadcast_parameters"):
        run_library(setup(), job.rank(), start)


@check
def everyone_is_told_of_an_update_that_overflows() -> None:
    def exploding(worker: int, step: int, parameters: list[Any]) -> list[Any]:
        gradients = curved_valley(worker, step, parameters)
        if step == 3 and worker == job.size() - 1 and gradients[0] is not None:
            gradients[0][0, 0] = 1e308
        return gradients

    with pytest.raises(hvd_saef.NonFiniteUpdateError, match=rf"on rank {job.size() - 1}"):
        train(setup(), gradient=exploding)
    assert train(setup(), gradient=exploding, on_nonfinite="skip").stats["skipped"] == 1


@check
def everyone_is_told_of_an_exception_in_a_closure() -> None:
    failing = job.size() - 1
    run = Run(job.rank()).step(2)

    def closure() -> float:
        if job.rank() == failing:
            raise ZeroDivisionError("no batch")
        return 1.0

    run.set_gradients()
    before = everything(run)
    error = ZeroDivisionError if job.rank() == failing else hvd_saef.WorkerError
    with pytest.raises(error, match="no batch" if job.rank() == failing else f"rank {failing} raised Zero"):
        run.optimizer.step(closure)
    assert everything(run) == before
    run.step(2)


@check
def a_flipped_bit_of_x_is_found() -> None:
    if job.size() == 1:
        return
    flips = job.rank() == job.size() - 1  # single-way: a round decodes the payload of every worker
    flipping = Flipping(3 * job.size() if flips else -1)
    run = Run(job.rank(), compression=flipping, double_compression=False, check_consensus_every=2).step(3)
    with pytest.raises(hvd_saef.ConsensusError, match=rf"'noname\.0\.1'.*on rank {job.size() - 1}"):
        run.step()
    run.optimizer.reanchor()
    run.step(2)


@check
def one_number_out_of_many_is_broadcast() -> None:
    parameter = nn.Parameter(torch.full((1, 3), float(job.rank()))[:, 1])
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
def several_optimizers_get_their_own_payloads() -> None:
    dense: dict[str, Any] = {
        "compression": lambda name, _: (
            hvd_saef.Compression.none if "bias" in name else hvd_saef.Compression.sign
        )
    }
    for more in ({}, {"averaging_period": 2}, {"warmup_steps": 2}, {"double_compression": False}):
        alone = several_trained([False, False], **more)
        for overlaps in ([True, True], [True, False]):
            assert several_trained(overlaps, **more) == alone
    assert several_trained([False, False], **dense) == several_trained([True, True], **dense)


def several_trained(overlaps: list[bool], steps: int = 6, **settings: Any) -> list[bytes]:
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
    for step in range(steps):
        for model, _ in pairs:
            if model is pairs[0][0] and job.rank() == job.size() - 1 and step % 2:
                model.zero_grad()
                next(model.children())(
                    torch.ones(8, 6)
                ).square().sum().backward()  # the last layer has no gradients
            else:
                backward(model, step)
        for _, optimizer in reversed(pairs):
            optimizer.step()
    bits = [value.numpy().tobytes() for model, _ in pairs for value in model.state_dict().values()]
    assert job.gather(bits) == job.size() * [bits]
    return bits


@check
def lines_come_back() -> None:
    for _ in range(12):
        several_trained([True, True], steps=2)
    optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD(small_model(0).parameters(), lr=0.1))
    assert optimizer._saef._lease.lines._made <= 4


@check
def everyone_is_told_of_an_exception_in_an_exchange() -> None:
    for where in ("encode", "decode_add"):
        odd = job.rank() == job.size() - 1
        failing = Failing(where, 0)
        run = Run(job.rank(), compression=failing, bucket_bytes=64).step()
        failing.left[where] = 11 if odd else 0
        with pytest.raises(hvd_saef.errors.ExchangeError, match=f"rank {job.size() - 1} raised Arithmetic"):
            run.step(20)
        run.optimizer.reanchor()
        run.step(2)


@check
def everyone_is_told_of_a_wrong_argument() -> None:
    odd = job.rank() == job.size() - 1
    parameter = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([parameter], lr=0.5)
    with pytest.raises(ValueError if odd else hvd_saef.WorkerError, match="local_steps=0"):
        hvd_saef.DistributedOptimizer(inner, local_steps=0 if odd else 1)
    with pytest.raises(ValueError if odd else hvd_saef.WorkerError, match="steps=-1"):
        hvd_saef.common_steps(-1 if odd else 3)
    hvd_saef.DistributedOptimizer(inner)


@check
def objects_that_cannot_be_sent() -> None:
    if job.size() == 1:
        return
    communicator, _ = find_communicator()
    mine = {"rank": job.rank(), "values": np.arange(1000 * job.rank()), "empty": b""}
    for rank, theirs in enumerate(communicator.allgather_object(mine)):
        assert (theirs["rank"], theirs["empty"]) == (rank, b"")
        assert np.array_equal(theirs["values"], np.arange(1000 * rank))
    last = job.rank() == job.size() - 1
    with pytest.raises(Exception if last else hvd_saef.WorkerError, match=r"pickle|local object"):
        communicator.allgather_object((lambda: None) if last else 1)
    assert communicator.allgather_object(job.rank()) == list(range(job.size()))


def run_checks(checks: dict[str, Check], output: str, names: list[str]) -> None:
    """Run the checks on all ranks, and write on rank 0 what failed where."""
    warnings.filterwarnings("ignore", message="parameters are stepped ahead")
    warnings.filterwarnings("ignore", message="the largest block")
    warnings.filterwarnings("ignore", message="SignCompressor was given")
    warnings.filterwarnings("ignore", message="compression=.* is Horovod's own")
    torch.set_num_threads(1)
    import_for_good()
    report: dict[str, list[str]] = {}
    rank = job.rank()
    for name in [name for name in checks if not names or name in names]:
        failure = None
        try:
            checks[name]()
        except BaseException:
            failure = traceback.format_exc()
        report[name] = [f"rank {k}: {text}" for k, text in enumerate(job.gather(failure)) if text]
    failure = after_the_end()
    report["after_the_end_a_step_says_so"] = [failure] if failure else []
    Path(f"{output}.{rank}").write_text(json.dumps(report))


def import_for_good() -> None:
    """Loads what torch loads with the first optimizer, and lets later garbage collections pass by all of it.

    Each wrapping collects garbage, and 500,000 objects of imported modules cost more than the rest of it.
    """
    torch.optim.SGD([torch.zeros(1)], lr=0.1)
    gc.freeze()


def after_the_end() -> str | None:
    """What is wrong with an optimizer that is used after the job's last word, the last thing that happens."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones(3)
    optimizer.step()
    alone = job.size() == 1 and isinstance(job, TorchJob)
    job.end()
    try:
        optimizer.step()
    except RuntimeError as error:
        return None if "shut down" in str(error) or "destroyed" in str(error) else str(error)
    return None if alone else "no error"  # a rank that talks to nobody may go on


def reports(output: Path, ranks: int) -> dict[str, list[str]]:
    """What all ranks wrote: what failed, check by check."""
    found = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(ranks)]
    return {name: sorted({text for one in found for text in one[name]}) for name in found[0]}
