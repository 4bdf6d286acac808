"""Workers that were set up differently, or whose x differs: told on all of them, by name and rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, ConfigurationMismatchError, ConsensusError
from hvd_saef.compression import BlockedTensor, SignCompressor
from tests.workers import NO_MODEL, Run, bits, caught, everything, sgd, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
DIFFERENT_SETTINGS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({}, {"feedback": "ef"}, ("feedback", "'saef' on ranks 0, 2", "'ef' on rank 1")),
    ({}, {"step_ahead": 0.5}, ("step_ahead", "1.0 on ranks 0, 2", "0.5 on rank 1")),
    ({}, {"server_step_ahead": 0.5}, ("server_step_ahead", "0.5 on rank 1")),
    ({}, {"double_compression": False}, ("double_compression", "False on rank 1")),
    ({}, {"averaging_period": 2}, ("averaging_period", "None on ranks 0, 2", "2 on rank 1")),
    ({}, {"local_steps": 2}, ("local_steps", "2 on rank 1")),
    ({}, {"warmup_steps": 2}, ("warmup_steps", "2 on rank 1")),
    ({}, {"block_size": 2}, ("block_size", "2 on rank 1")),
    ({}, {"server": "replicated"}, ("server", "'auto' on ranks 0, 2", "'replicated' on rank 1")),
    ({}, {"bucket_bytes": 64}, ("bucket_bytes", "64 on rank 1")),
    ({}, {"on_nonfinite": "skip"}, ("on_nonfinite", "'skip' on rank 1")),
    ({}, {"sparse_as_dense": True}, ("sparse_as_dense", "True on rank 1")),
    ({}, {"check_consensus_every": 1}, ("check_consensus_every", "0 on ranks 0, 2", "1 on rank 1")),
    ({}, {"compression": Compression.topk(0.1)}, ("compression of 'noname.0.0'", "0.1")),
    ({"compression": Compression.topk(0.1)}, {"compression": Compression.topk(0.2)}, ("0.1", "0.2")),
    ({}, DENSE, ("feedback", "'none' on rank 1")),
    (DENSE, {"compression": Compression.fp16}, ("compression of 'noname.0.0'", "FP16", "on rank 1")),
    ({}, {"feedback": "ef", "local_steps": 2}, ("feedback", "'ef' on rank 1")),
]


@pytest.mark.parametrize(
    ("common", "odd", "words"), DIFFERENT_SETTINGS, ids=[" ".join(row[2]) for row in DIFFERENT_SETTINGS]
)
def test_different_settings(common: dict[str, Any], odd: dict[str, Any], words: tuple[str, ...]) -> None:
    def fn(rank: int) -> None:
        Run(rank, **(common | (odd if rank == 1 else {}))).step()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        for word in words:
            assert word in str(failure)
        assert "rank 1" in str(failure)


def plain(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def transposed() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2).t()), *plain((4,))]


Parameters = Callable[[], list[nn.Parameter]]
DIFFERENT_PARAMETERS: list[tuple[Parameters, tuple[str, ...], tuple[str, ...]]] = [
    (
        lambda: plain((2, 3), (4,)),
        ("w", "c"),
        ("the name of parameter 1", "'b' on ranks 0, 2", "'c' on rank 1"),
    ),
    (
        lambda: plain((2, 3), (4,)),
        ("b", "w"),
        ("the name of parameter 0", "'w' on ranks 0, 2", "'b' on rank 1"),
    ),
    (lambda: plain((3, 2), (4,)), ("w", "b"), ("shape of 'w'", "[2, 3] on ranks 0, 2", "[3, 2] on rank 1")),
    (transposed, ("w", "b"), ("strides of 'w'", "[3, 1] on ranks 0, 2", "[1, 2] on rank 1")),
    (
        lambda: plain((2, 3), (4,), dtype=torch.bfloat16),
        ("w", "b"),
        ("dtype of 'w'", "'torch.float32' on ranks 0, 2", "'torch.bfloat16' on rank 1"),
    ),
    (lambda: plain((2, 3)), ("w",), ("number of parameters", "2 on ranks 0, 2", "1 on rank 1")),
    (lambda: plain((2, 3), (4,), (1,)), ("w", "b", "c"), ("number of parameters", "3 on rank 1")),
]


@pytest.mark.parametrize(
    ("odd", "names", "words"), DIFFERENT_PARAMETERS, ids=[row[2][0] for row in DIFFERENT_PARAMETERS]
)
@pytest.mark.parametrize("options", [{}, DENSE], ids=str)
def test_different_parameters(
    odd: Parameters, names: tuple[str, ...], words: tuple[str, ...], options: dict[str, Any]
) -> None:
    def fn(rank: int) -> None:
        parameters = odd() if rank == 1 else plain((2, 3), (4,))
        named = list(zip(names if rank == 1 else ("w", "b"), parameters, strict=True))
        optimizer = hvd_saef.DistributedOptimizer(sgd(parameters), named, **options)
        before = bits(parameters)
        try:
            optimizer.step()
        finally:
            assert bits(parameters) == before

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        for word in words:
            assert word in str(failure)


@pytest.mark.parametrize("options", [{}, {"server": "replicated"}, {"local_steps": 2}, DENSE], ids=str)
def test_different_start_parameters_and_how_it_goes_on(options: dict[str, Any]) -> None:
    def fn(rank: int, stumble: bool) -> dict[str, bytes]:
        run = Run(rank, **options)
        if stumble:
            with torch.no_grad():
                run.parameters[3][0, 0, 0].add_(1e-6 if rank == 1 else 0)
            with pytest.raises(ConsensusError, match=r"'noname\.0\.3'.*rank") as caught_here:
                run.step()
            assert "broadcast_parameters" in str(caught_here.value)
            assert "on ranks 0, 2" in str(caught_here.value)
            assert "on rank 1" in str(caught_here.value)
            with torch.no_grad():
                for mine, theirs in zip(run.parameters, Run(rank, **options).parameters, strict=True):
                    mine.copy_(theirs)
        return everything(run.step(4))

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


class Flipping(SignCompressor):
    """On one worker, flips the lowest bit of one element of x, in one round."""

    calls_left: int

    def __init__(self, call: int) -> None:
        object.__setattr__(self, "calls_left", call)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """As a sign's, but for the flip."""
        super().decode_add(payload, out, weight)
        object.__setattr__(self, "calls_left", self.calls_left - 1)
        if self.calls_left == 0:
            out.flat[36:37].view(torch.int32).bitwise_xor_(1)  # in parameter 1


@pytest.mark.parametrize(("every", "found"), [(1, 3), (2, 4), (3, 3), (5, 5), (0, None)])
def test_a_flipped_bit_of_x_is_found(every: int, found: int | None) -> None:
    workers, flipped = 2, 3  # single-way: a round decodes the payload of every worker into x

    def fn(rank: int) -> None:
        flipping = Flipping(workers * flipped if rank == 1 else -1)
        run = Run(rank, compression=flipping, double_compression=False, check_consensus_every=every)
        for number in range(1, 7):
            if number == found:
                words = r"x differs between workers in 'noname\.0\.1'.*on rank 0.*on rank 1.*reanchor\(\)"
                with pytest.raises(ConsensusError, match=words):
                    run.step()
                run.optimizer.reanchor()
            else:
                run.step()
        if found is None:
            raise LookupError(str(bits(run.x())))

    if found is None:  # the counter-test: there is something to be found
        one, other = caught(workers, fn)
        assert isinstance(one, LookupError)
        assert str(one) != str(other)
    else:
        together(workers, fn)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    plain_run = together(3, lambda rank: bits(Run(rank).step(6).x()))
    assert together(3, lambda rank: bits(Run(rank, check_consensus_every=2).step(6).x())) == plain_run
    checked = together(2, lambda rank: bits(Run(rank, check_consensus_every=1, **DENSE).step(6).parameters))
    assert checked[0] == checked[1]
