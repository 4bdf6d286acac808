"""Random and truncated payloads are refused or decoded, never more; whole steps against the oracle.

`make sanitize` runs the decoders here, and the kernels' tests, with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_saef import Compression, Compressor
from hvd_saef.compression import BlockedTensor, Blocks, SignCompressor, TopKCompressor
from tests.oracle import Setup
from tests.oracle import run as run_oracle
from tests.problems import run_library, worst
from tests.workers import NO_MODEL, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

COMPRESSORS = st.sampled_from(
    [
        Compression.sign,
        SignCompressor(dense_below=40),
        Compression.none,
        Compression.fp16,
        Compression.topk(0.1),
        Compression.topk(0.5, value_dtype=torch.float16),
        TopKCompressor(0.01, dense_below=10),
    ]
)
SIZES = st.lists(st.integers(1, 200) | st.sampled_from([65_536, 65_537, 140_000]), min_size=1, max_size=4)
FEWER = settings(max_examples=int(os.environ.get("HVD_SAEF_FUZZ", "60")), deadline=None, derandomize=True)


def guarded(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory of `size` elements amid others, which must stay as they are."""
    memory = torch.full((size + 128,), 7, dtype=dtype)
    return memory, memory[64 : 64 + size]


def untouched(memory: Tensor) -> bool:
    return bool((memory[:64] == 7).all() and (memory[-64:] == 7).all())


@FEWER
@given(
    compressor=COMPRESSORS,
    sizes=SIZES,
    block_size=st.none() | st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1 << 30),
    spoil=st.sampled_from(["random", "flip", "zeros", "ones", "truncated", "longer"]),
)
def test_decoders_take_or_refuse_any_bytes(
    compressor: Compressor,
    sizes: list[int],
    block_size: int | None,
    dtype: torch.dtype,
    seed: int,
    spoil: str,
) -> None:
    """With the kernels and with the twins: both refuse, or give the same bits; nothing else is written."""
    generator = np.random.default_rng(seed)
    blocks = Blocks.cut(sizes, block_size if sum(sizes) < 1000 else None, dtype)
    delta = torch.from_numpy(generator.standard_normal(blocks.numel)).to(dtype)
    payload = torch.empty(compressor.payload_bytes(blocks), dtype=torch.uint8)
    compressor.encode(BlockedTensor(delta, blocks), payload)
    raw = payload.numpy()
    if spoil == "random":
        raw[:] = generator.integers(0, 256, raw.size)
    elif spoil == "flip":
        for place in generator.integers(0, raw.size, 5):
            raw[place] ^= 1 << int(generator.integers(8))
    elif spoil in ("zeros", "ones"):
        raw[:] = 0 if spoil == "zeros" else 255
    elif spoil == "truncated":
        payload = payload[: int(generator.integers(raw.size))].clone()
    else:
        payload = torch.cat([payload, payload[:1]])
    outcomes: list[Any] = []
    for decode in (compressor.decode_add, getattr(compressor, "_decode_add", compressor.decode_add)):
        memory, flat = guarded(blocks.numel, dtype)
        try:
            decode(payload, BlockedTensor(flat, blocks), 0.5)
            outcomes.append(flat.nan_to_num(12345.0))
        except (ValueError, RuntimeError) as error:
            outcomes.append(error)
        assert untouched(memory)
    refused = [isinstance(outcome, Exception) for outcome in outcomes]
    assert refused[0] == refused[1], outcomes
    if spoil in ("truncated", "longer"):
        assert refused[0]
    if not refused[0]:
        assert torch.equal(*outcomes)


SHAPES = st.lists(
    st.lists(st.integers(0, 5) | st.integers(1, 3), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5
)


@st.composite
def setups(draw: Any) -> tuple[Setup, dict[str, Any]]:
    """Any settings that go together."""
    feedback = draw(st.sampled_from(["saef", "saef", "ef", "none"]))
    double = draw(st.booleans())
    fixed: dict[str, Any] = {"step_ahead": 1.0}
    if feedback == "saef":
        fixed["step_ahead"] = draw(st.sampled_from([1.0, 0.5, 0.0]))
        if double:
            fixed["server_step_ahead"] = draw(st.sampled_from([0.0, 1.0, 0.25]))
    if feedback != "none":
        fixed["averaging_period"] = draw(st.sampled_from([None, 2, 3]))
    beta = fixed.get("server_step_ahead", 0.0)
    servers = ["auto", "replicated"] + (["sharded"] if double and beta == 0 else [])
    setup = Setup(
        workers=draw(st.integers(1, 3)),
        compressor=draw(st.sampled_from(["sign", "topk"])),
        lr=lambda step: 0.05,
        feedback=feedback,
        double_compression=double,
        local_steps=draw(st.integers(1, 3)),
        warmup_steps=draw(st.sampled_from([0, 2])),
        block_size=draw(st.none() | st.integers(1, 20)),
        optimizer=draw(st.sampled_from(["sgd", "sgdm", "nesterov", "adamw"])),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        **fixed,
    )
    options = {
        "server": draw(st.sampled_from(servers)),
        "bucket_bytes": draw(st.sampled_from([1, 300, 1 << 20])),
    }
    return setup, options


def slopes(worker: int, step: int, parameters: list[Any]) -> list[Any]:
    """Gradients of a bowl with noise, of any shapes; some are missing."""
    noise = np.random.default_rng([3, worker, step])
    gradients = [np.asarray(p - 1 + noise.standard_normal(p.shape)) for p in parameters]
    return [None if noise.random() < 0.1 else gradient for gradient in gradients]


@settings(FEWER, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(shapes=SHAPES, chosen=setups())
def test_whole_steps_agree_with_the_oracle(
    shapes: list[tuple[int, ...]], chosen: tuple[Setup, dict[str, Any]]
) -> None:
    setup, options = chosen
    generator = np.random.default_rng(len(shapes))
    start = [np.asarray(generator.standard_normal(shape)) for shape in shapes]
    truth = run_oracle(setup, start, slopes, 9)
    outcomes = together(
        setup.workers, lambda rank: run_library(setup, rank, start, slopes, steps=9, **options)
    )
    for rank, outcome in enumerate(outcomes):
        assert worst(outcome.x, truth.x) <= 1e-10
        assert worst(outcome.parameters, truth.parameters[rank]) <= 1e-10
        assert worst(outcome.errors, truth.errors[rank]) <= 1e-10
