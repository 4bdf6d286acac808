"""stats(): every number that the design promises, bytes exactly by formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import hvd_saef
from hvd_saef import Compression
from tests.codes import topk_bytes
from tests.problems import SHAPES
from tests.workers import NO_MODEL, Run, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

SIZES = [math.prod(shape) for shape in SHAPES]  # 35, 3, 1, 24
TOTAL = sum(SIZES)
BYTES = (
    "payload_bytes_sent",
    "payload_bytes_received",
    "averaging_bytes_sent",
    "dense_bytes_sent",
    "ring_allreduce_bytes",
)
ROUNDS = 6


def sign_bytes(width: int = 4) -> int:
    return sum(width + math.ceil(size / 8) for size in SIZES)


def ring(workers: int, size: int) -> int:
    return 2 * (workers - 1) * size // workers


def stats(workers: int, steps: int = ROUNDS, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    return together(workers, lambda rank: Run(rank, dtype=dtype, **options).step(steps).optimizer.stats())


def count(found: Mapping[str, float]) -> dict[str, float]:
    return {name: found[name] for name in BYTES if found[name]}


def test_every_number_is_there() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, averaging_period=2)
        assert run.optimizer.stats()["rounds"] == 0
        found = run.step(3).optimizer.stats()
        assert {"rounds", "skipped", "compression_ratio", "error_norm", "server_error_norm", *BYTES} <= set(
            found
        )
        assert all(isinstance(value, (int, float)) for value in found.values())
        assert (found["rounds"], found["skipped"]) == (3, 0)
        norm = math.sqrt(sum(float(e.double().square().sum()) for e in run.ours("errors").values()))
        assert found["error_norm"] == pytest.approx(norm, rel=1e-6)
        pieces = [piece["values"].double() for piece in run.ours("server_errors").values()]
        norm = math.sqrt(sum(float(piece.square().sum()) for piece in pieces))
        assert found["server_error_norm"] == pytest.approx(norm, rel=1e-6)
        assert norm > 0
        seconds = {name: value for name, value in found.items() if name.startswith("seconds_")}
        assert seconds.pop("seconds_node") == found["node_bytes_sent"] == 0  # each rank is a worker
        assert len(seconds) >= 4
        assert all(value > 0 for value in seconds.values()), seconds

    together(2, fn)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{"double_compression": False}, {"server": "replicated"}], ids=str)
def test_replicated_and_single_way(workers: int, options: dict[str, Any]) -> None:
    for found in stats(workers, **options):
        payloads = ROUNDS * (workers - 1) * sign_bytes()
        ours = {"payload_bytes_sent": payloads, "payload_bytes_received": payloads}
        theirs = {"ring_allreduce_bytes": ROUNDS * ring(workers, 4 * TOTAL)}
        assert count(found) == {k: v for k, v in (ours | theirs).items() if v}
        ratio = ROUNDS * ring(workers, 4 * TOTAL) / payloads if payloads else 1.0
        assert found["compression_ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("block_size", [1, 4])
def test_sharded(workers: int, block_size: int) -> None:
    """Each worker sends what the others serve, and its answer to each of them."""
    found = stats(workers, server="sharded", block_size=block_size)
    blocks = [min(block_size, size - i) for size in SIZES for i in range(0, size, block_size)]
    payload = {1: 1 + 4, 2: 1 + 4, 3: 1 + 4, 4: 1 + 4}
    total = sum(payload[block] for block in blocks)
    shares = []
    for numbers in found:
        # (total - own) up and (workers - 1) * own down: `own` from one, to be checked by the other
        own = (numbers["payload_bytes_sent"] / ROUNDS - total) / (workers - 2) if workers > 2 else None
        if own is not None:
            assert own % 5 == 0
            assert abs(own - total / workers) <= 5 * 2
            assert numbers["payload_bytes_received"] / ROUNDS == (workers - 1) * own + total - own
            shares.append(own)
        else:
            assert numbers["payload_bytes_sent"] == numbers["payload_bytes_received"] == ROUNDS * total
    assert sum(shares) == (total if workers > 2 else 0)


def test_auto_is_sharded_where_it_can_be() -> None:
    for options in ({}, {"server_step_ahead": 0.5}, {"double_compression": False}):
        same = stats(3, server="replicated" if options else "sharded", **options)
        other = stats(3, server="replicated", double_compression=True)
        found = [count(numbers) for numbers in stats(3, **options)]
        assert found == [count(numbers) for numbers in same]
        assert (found == [count(numbers) for numbers in other]) is bool(options)


def test_no_worker_serves_all_large_blocks() -> None:
    """Each is alone in its bucket, and a bucket's parts are as uneven as can be."""

    def served(rank: int) -> float:
        parameters = [torch.nn.Parameter(torch.ones(100)) for _ in range(9)]
        inner = torch.optim.SGD(parameters, lr=0.1)
        optimizer = hvd_saef.DistributedOptimizer(inner, server="sharded", bucket_bytes=400)
        for parameter in parameters:
            parameter.grad = torch.ones(100)
        optimizer.step()
        pieces = optimizer.state_dict()["hvd_saef"]["server_errors"].values()
        return float(sum(piece["values"].numel() for piece in pieces))

    assert together(3, served) == [300, 300, 300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_k_and_wider_dtypes(dtype: torch.dtype) -> None:
    width = 8 if dtype == torch.float64 else 4
    payload = sum(topk_bytes(0.1, size, width) for size in SIZES)
    for found in stats(2, dtype=dtype, compression=Compression.topk(0.1)):
        assert found["payload_bytes_sent"] == ROUNDS * payload
        assert found["ring_allreduce_bytes"] == ROUNDS * ring(2, 4 * TOTAL)
    for found in stats(2, dtype=dtype):
        assert found["payload_bytes_sent"] == ROUNDS * sign_bytes(width)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("period", "averagings"), [(2, 3), (3, 2), (4, 1), (7, 1), (8, 0)])
def test_averaging(workers: int, period: int, averagings: int) -> None:
    """Before rounds t with (t + 1) mod p = 0; the one before the next round is done as well."""
    for found in stats(workers, server="replicated", averaging_period=period):
        assert found["averaging_bytes_sent"] == averagings * ring(workers, 4 * TOTAL)
        assert found["payload_bytes_sent"] == ROUNDS * (workers - 1) * sign_bytes()
        sent = found["averaging_bytes_sent"] + found["payload_bytes_sent"]
        assert found["compression_ratio"] == pytest.approx(found["ring_allreduce_bytes"] / sent)


@pytest.mark.parametrize("workers", [2, 3])
def test_warm_up_and_dense(workers: int) -> None:
    whole, half = ring(workers, 4 * TOTAL), ring(workers, 2 * TOTAL)
    for found in stats(workers, server="replicated", warmup_steps=4):
        assert found["dense_bytes_sent"] == 4 * whole
        assert found["payload_bytes_sent"] == (ROUNDS - 4) * (workers - 1) * sign_bytes()
    for feedback in ("saef", "none"):
        for found in stats(workers, compression=Compression.none, feedback=feedback):
            assert count(found) == {
                "dense_bytes_sent": ROUNDS * whole,
                "ring_allreduce_bytes": ROUNDS * whole,
            }
            assert found["compression_ratio"] == 1
        for found in stats(workers, compression=Compression.fp16, feedback=feedback):
            assert count(found) == {"dense_bytes_sent": ROUNDS * half, "ring_allreduce_bytes": ROUNDS * whole}
            assert found["compression_ratio"] == 2


def test_local_steps_send_once_a_round() -> None:
    for found in stats(2, steps=7, local_steps=3):
        assert found["rounds"] == 2
        assert found["payload_bytes_sent"] == 2 * sign_bytes()
        assert found["ring_allreduce_bytes"] == 2 * ring(2, 4 * TOTAL)
