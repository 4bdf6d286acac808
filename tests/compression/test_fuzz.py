"""Random and truncated payloads are refused or decoded, never more; whole steps against the oracle.

`make sanitize` runs the decoders here, and the kernels' tests, with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, Compressor, kernels
from hvd_saef.compression import BlockedTensor, Blocks, SignCompressor, TopKCompressor
from hvd_saef.memory.layout import is_gapless
from tests.oracle import Setup
from tests.oracle import run as run_oracle
from tests.problems import Outcome, run_library, torch_optimizer, worst, wrap
from tests.workers import NO_MODEL, bits, together

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
    for requested in (kernels.requested(), "twins"):
        memory, flat = guarded(blocks.numel, dtype)
        try:
            with kernels.only(requested):
                compressor.decode_add(payload, BlockedTensor(flat, blocks), 0.5)
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
    st.lists(st.integers(0, 5) | st.integers(1, 3), min_size=0, max_size=4).map(tuple), min_size=1, max_size=5
)


def plainly(tensor: Tensor) -> Tensor:
    return tensor


def reversed_axes(tensor: Tensor) -> Tensor:
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def with_gaps(tensor: Tensor) -> Tensor:
    memory = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
    memory[..., 1] = tensor
    return memory[..., 1]


FORMS = st.lists(st.sampled_from([plainly, reversed_axes, channels_last, with_gaps]), min_size=5, max_size=5)
"""How each parameter lies in memory."""


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
@given(shapes=SHAPES, chosen=setups(), forms=FORMS, groups=st.integers(1, 3))
def test_whole_steps_agree_with_the_oracle(
    shapes: list[tuple[int, ...]],
    chosen: tuple[Setup, dict[str, Any]],
    forms: list[Callable[[Tensor], Tensor]],
    groups: int,
) -> None:
    """Whatever the parameters' strides and groups. Blocks run through memory: without any, it is all one."""
    setup, options = chosen
    if setup.block_size is not None:  # the oracle cuts in logical order
        forms = [form if form is with_gaps else plainly for form in forms]
    generator = np.random.default_rng(len(shapes))
    start = [np.asarray(generator.standard_normal(shape)) for shape in shapes]
    truth = run_oracle(setup, start, slopes, 9)

    def grouped(parameters: list[nn.Parameter]) -> list[Any]:
        cut = [
            parameters[k * len(parameters) // groups : (k + 1) * len(parameters) // groups]
            for k in range(groups)
        ]
        return [{"params": some} for some in cut]

    def fn(rank: int) -> Outcome:
        return run_library(
            setup,
            rank,
            start,
            slopes,
            steps=9,
            place=lambda i, t: forms[i](t),
            into_groups=grouped,
            **options,
        )

    for rank, outcome in enumerate(together(setup.workers, fn)):
        assert worst(outcome.x, truth.x) <= 1e-10
        assert worst(outcome.parameters, truth.parameters[rank]) <= 1e-10
        assert worst(outcome.errors, truth.errors[rank]) <= 1e-10


DTYPES = st.lists(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), min_size=5, max_size=5
)
ROUNDS = 4


@dataclass
class Kept:
    """What one worker's run of :func:`conserving` gave."""

    x: dict[str, Tensor]
    errors: dict[str, Tensor]
    server: list[tuple[str, int, Tensor]]
    moved: dict[str, Tensor]
    """How far its local steps went together, float64."""
    largest: float
    """Of all numbers that were added."""
    bits: dict[str, bytes]


def conserving(setup: Setup, rank: int, start: list[Tensor], options: dict[str, Any]) -> Kept:
    """One worker's run, beside a plain optimizer over copies, which takes the same local steps."""
    parameters, copies = ([nn.Parameter(clone_in_place(t)) for t in start] for _ in range(2))
    optimizer = wrap(setup, torch_optimizer(setup, parameters), **options)
    plain = torch_optimizer(setup, copies)
    moved = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    generator = torch.Generator().manual_seed(rank)
    largest = 1.0
    for step in range(ROUNDS * setup.local_steps):
        optimizer.train()
        last = (step + 1) % setup.local_steps == 0
        for p, copy in zip(parameters, copies, strict=True):
            gradient = (p.detach() - 1 + torch.randn(p.shape, generator=generator)).to(p.dtype)
            p.grad, copy.grad = gradient, gradient.clone()
        with torch.no_grad():
            for p, copy, way in zip(parameters, copies, moved, strict=True):
                copy.copy_(p)
                way += copy.double()
        plain.step()
        optimizer.step()
        for p, copy, way in zip(parameters, copies, moved, strict=True):
            way -= copy.detach().double()
            assert last or torch.equal(p, copy)  # the very local step that the inner optimizer takes
            largest = max([largest, *copy.detach().double().abs().reshape(-1).tolist()])
        state = optimizer.state_dict()["hvd_saef"]
        pieces = [piece["values"] for piece in state["server_errors"].values()]
        for tensor in (*state["x"].values(), *state["errors"].values(), *pieces):
            largest = max([largest, *tensor.double().abs().reshape(-1).tolist()])
    names = [f"noname.0.{i}" for i in range(len(parameters))]
    return Kept(
        state["x"],
        state["errors"],
        [(name, piece["start"], piece["values"]) for name, piece in state["server_errors"].items()],
        dict(zip(names, moved, strict=True)),
        largest,
        bits({"parameters": parameters, "state": optimizer.state_dict()}),
    )


def clone_in_place(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)


def in_shape(flat: Tensor, like: Tensor) -> Tensor:
    """What lies in memory as the parameter `like` does, in its shape."""
    return flat.as_strided(like.shape, like.stride()) if is_gapless(like) else flat.view(like.shape)


@settings(FEWER, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(shapes=SHAPES, chosen=setups(), forms=FORMS, dtypes=DTYPES)
def test_nothing_is_lost_in_any_dtype(
    shapes: list[tuple[int, ...]],
    chosen: tuple[Setup, dict[str, Any]],
    forms: list[Callable[[Tensor], Tensor]],
    dtypes: list[torch.dtype],
) -> None:
    """Error feedback's law: x̃ = x - s - mean e has moved by the mean of the local steps, to roundings.

    x has the same bits on all workers, and the whole run the same bits twice.
    """
    setup, options = chosen
    feedback = "ef" if setup.feedback == "none" else setup.feedback
    setup = replace(setup, feedback=feedback, eps=1e-3)  # Adam's 1e-8 is 0 in float16
    generator = torch.Generator().manual_seed(len(shapes))
    start = [
        form(torch.randn(shape, generator=generator).to(dtype))
        for shape, form, dtype in zip(shapes, forms, dtypes, strict=False)
    ]
    kept, again = (
        together(setup.workers, lambda rank: conserving(setup, rank, start, options)) for _ in range(2)
    )
    assert [one.bits for one in kept] == [one.bits for one in again]
    assert all(bits(one.x) == bits(kept[0].x) for one in kept)
    largest = max(one.largest for one in kept)
    for number, parameter in enumerate(start):
        name = f"noname.0.{number}"
        server = torch.zeros(parameter.numel(), dtype=torch.float64)
        sharded = len({len(one.server) for one in kept}) > 1 or any(
            values.numel() < parameter.numel() for one in kept for key, _, values in one.server if key == name
        )
        for one in kept if sharded else kept[:1]:
            for key, first, values in one.server:
                if key == name:
                    server[first : first + values.numel()] += values
        errors = torch.stack([one.errors[name].double() for one in kept]).mean(0)
        moved = torch.stack([one.moved[name] for one in kept]).mean(0)
        reached = kept[0].x[name].double() - in_shape(server, parameter) - errors
        # A round rounds each of x, e, s and Δ once or twice, and once for each payload that is added.
        eps = torch.finfo(torch.promote_types(parameter.dtype, torch.float32)).eps
        bound = ROUNDS * (16 + 4 * setup.workers) * eps * largest
        assert bool(((reached - (parameter.double() - moved)).abs() <= bound).all())


@pytest.mark.parametrize("options", [{}, {"feedback": "none", "compression": Compression.none}], ids=str)
def test_one_number_out_of_many(options: dict[str, Any]) -> None:
    """Contiguous for torch, with a stride of 3: found here first."""

    def fn(rank: int) -> dict[str, bytes]:
        parameter = nn.Parameter(torch.ones(1, 3)[:, 1])
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=0.5), check_consensus_every=1, **options
        )
        parameter.grad = torch.ones(1)
        optimizer.step()
        optimizer.eval()
        assert parameter.item() == 0.5
        return bits(parameter)

    one, other = together(2, fn)
    assert one == other


def test_expanded_parameters_are_refused() -> None:
    def fn(rank: int) -> None:
        parameter = nn.Parameter(torch.ones(3).expand(2, 3))
        hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), [("mask", parameter)])

    with pytest.raises(ValueError, match=r"'mask' of shape \(2, 3\) is expanded .*clone\(\) it"):
        together(1, fn)
