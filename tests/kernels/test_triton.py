"""The Triton kernels give the bits of the others, through Triton's interpreter; how often they are launched.

The interpreter needs some milliseconds a program, so memory is small here and programs take few elements.
`make test-triton` sets HVD_SAEF_LONG=1 and runs more of everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_saef import Compression, Compressor, kernels
from hvd_saef.compression import BlockedTensor, Blocks, Fused, Memory, SignCompressor, TopKCompressor
from hvd_saef.compression.sign import _FusedSign
from hvd_saef.compression.topk import _FusedTopK
from hvd_saef.errors import ExchangeError
from hvd_saef.kernels import Stretch
from hvd_saef.memory import algorithm
from tests.kernels import test_kernels, test_kernels_sign, test_kernels_topk
from tests.kernels.rounds import NARROW, NASTY, Copying, Worker
from tests.kernels.test_kernels_sign import Case, same
from tests.kernels.test_kernels_topk import PAGE, clustered, mostly_zeros, normal, ties
from tests.kernels.versions import Direct, compiled, without_interpreter
from tests.oracle import Setup, run
from tests.problems import Outcome, curved_valley, run_library, same_bits, schedule, start_point, worst
from tests.workers import NO_MODEL, Run, caught, together

pytest.importorskip("triton", "3.6", reason="needs Triton 3.6 or newer")
if without_interpreter():
    pytest.skip(without_interpreter(), allow_module_level=True)
pytestmark = pytest.mark.filterwarnings(NO_MODEL)
LONG = os.environ.get("HVD_SAEF_LONG") == "1"
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def triton() -> Any:
    """The version in Triton; tests/conftest.py chose its interpreter."""
    version: Any = kernels.load("on_triton")
    assert version.INTERPRETED
    return version


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that take few elements, so that blocks have several."""
    from hvd_saef.kernels.on_triton import sign, topk

    monkeypatch.setattr(sign, "TILE", 64)
    monkeypatch.setattr(sign, "TILES", 2)
    monkeypatch.setattr(sign, "CHUNK", 2)
    monkeypatch.setattr(topk, "TILE", 128)


# -- sign ----------------------------------------------------------------------------------------------

SMALL: list[list[tuple[int, int, bool]]] = [
    [(5, 3, False), (100, 2, False), (40, 1, True)],
    [(1000, 1, False), (300, 1, True), (7, 1, False)],
    [(1, 3, False)],
]


@pytest.mark.parametrize("check", test_kernels_sign.CHECKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign(check: Any, dtype: torch.dtype, triton: Any, few: None) -> None:
    for number, runs in enumerate(SMALL):
        alpha, beta = [(1.0, 0.0), (0.3, 1.0), (0.0, 0.7)][number]
        pool = NASTY if number == 0 else None
        check(Case(runs, dtype, 3, pool, alpha=alpha, beta=beta, weight=1 / 3), Direct(triton))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_as_large_as_it_is(dtype: torch.dtype, triton: Any) -> None:
    """With as many elements a program as on a GPU."""
    runs = [(9001, 1, False), (1025, 1, False), (2000, 1, True)]
    for check in (*test_kernels_sign.CHECKS[: 3 if LONG else 1], test_kernels_sign.check_alone):
        check(Case(runs, dtype, 0), Direct(triton))


@pytest.mark.skipif(not LONG, reason="the interpreter is slow: make test-triton")
@pytest.mark.parametrize("check", test_kernels_sign.CHECKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in test_kernels_sign.LARGE if name != "small blocks"])
def test_sign_of_large_blocks(name: str, dtype: torch.dtype, check: Any, triton: Any) -> None:
    check(Case(test_kernels_sign.LARGE[name], dtype, 0), Direct(triton))


def test_sign_refuses_what_the_others_refuse(triton: Any) -> None:
    test_kernels_sign.refuses_malformed_arguments(Direct(triton))


# -- Top-K ---------------------------------------------------------------------------------------------


def coded(version: Any, compressor: TopKCompressor, blocks: Blocks, values: Tensor) -> list[Tensor]:
    """The payload, what is left of the values, and what two payloads add to ones."""
    rest, out, table = values.clone(), torch.ones_like(values), blocks.table(compressor.kept)
    payload = torch.full((compressor.payload_bytes(blocks) + 1,), 0xAA, dtype=torch.uint8)[1:]
    version.topk_encode([Stretch(rest, table, payload)], compressor._wire(blocks.dtype))
    stretch = Stretch(out, table, payloads=[payload, payload])
    version.topk_decode([stretch], compressor._wire(blocks.dtype), weights=[0.3, -1.0])
    return [payload, rest, out]


TOPK: list[tuple[list[int], int | None, float, torch.dtype | None, torch.dtype, Any]] = [
    ([5, 100, 33], None, 0.3, torch.float16, torch.float64, ties),
    ([5, 100, 33], 7, 0.3, torch.bfloat16, torch.float32, ties),
    ([5, 33, 300], None, 0.3, None, torch.float32, mostly_zeros),
    ([5, 33, 300], None, 0.1, None, torch.float64, clustered),
    ([300, 40], 250, 1, torch.bfloat16, torch.float32, normal),
    ([129, 1], None, 1e-9, None, torch.float32, normal),
]


@pytest.mark.parametrize("number", range(len(TOPK)))
def test_topk(number: int, triton: Any, few: None) -> None:
    sizes, block_size, ratio, value_dtype, dtype, make = TOPK[number]
    blocks, compressor = Blocks.cut(sizes, block_size, dtype), TopKCompressor(ratio, value_dtype)
    values = make(blocks.numel, dtype)
    values[::50] = NASTY[number % len(NASTY)]
    if number == 2:
        values[::40], values[7::90] = torch.inf, torch.nan
    twins = kernels.load("twins")
    for ours, theirs in zip(
        coded(triton, compressor, blocks, values), coded(twins, compressor, blocks, values), strict=True
    ):
        assert same(ours, theirs)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1e-9] if LONG else [0.01])
@pytest.mark.parametrize("make", [ties, mostly_zeros, clustered] if LONG else [ties])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_pages(dtype: torch.dtype, make: Any, ratio: float, triton: Any) -> None:
    """Blocks of more than a page, with as many elements a program as on a GPU."""
    blocks, compressor = Blocks.cut([PAGE + 1, 5, PAGE], None, dtype), TopKCompressor(ratio)
    values, twins = make(blocks.numel, dtype), kernels.load("twins")
    for ours, theirs in zip(
        coded(triton, compressor, blocks, values), coded(twins, compressor, blocks, values), strict=True
    ):
        assert same(ours, theirs)


def test_topk_refuses_what_the_twins_refuse() -> None:
    test_kernels_topk.refuse_alike(60 if LONG else 12, ("triton", "twins"))


# -- the rows around C ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor", [Compression.sign, SignCompressor(dense_below=60), TopKCompressor(0.2)]
)
@pytest.mark.parametrize(("dtype", "dtypes"), [(torch.float32, NARROW), (torch.float64, [torch.float64])])
def test_rows(
    compressor: Compressor, dtype: torch.dtype, dtypes: list[torch.dtype], triton: Any, few: None
) -> None:
    """Several parts in one launch, unequal weights, parameters of 16 bits: the bits of PlainRows."""
    parts, weights = [[60, 150], [3, 40, 71]], [0.7, 0.2]
    with kernels.only("twins"):
        expected = Worker.of(parts, dtypes, dtype).round(Copying(compressor), compressor, weights)
    with kernels.only("triton"):
        rows = compressor.fused(CPU, dtype, False)
        assert rows is not None
        assert rows.narrow
        worker = Worker.of(parts, dtypes, dtype)
        found = worker.round(rows, compressor, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_a_rounding_that_is_left_out_shows(triton: Any, few: None) -> None:
    """A counter-test of the one above: b without its rounding to bfloat16 has other bits."""
    expected = Worker.of([[60]], [torch.bfloat16], torch.float32)
    with kernels.only("twins"):
        wide = Worker.of([[60]], [torch.float32], torch.float32)
        wide.memories[0].parameter_memory[0].copy_(expected.parameters[0])
        found = wide.round(algorithm.PlainRows(Compression.sign), Compression.sign, [0.7, 0.2])
        right = expected.round(Copying(Compression.sign), Compression.sign, [0.7, 0.2])
    assert not same(found[0], right[0])


# -- the look at numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", test_kernels.DTYPES, ids=str)
def test_one_number_too_many(dtype: torch.dtype) -> None:
    size = 1500 if LONG else 33
    with kernels.only("triton"):
        test_kernels.test_one_number_too_many("triton", dtype, size)
        strided = torch.ones(6, 4, dtype=dtype)[:, ::2]
        assert kernels.all_finite([strided, torch.ones(3, dtype=dtype).mul(2), torch.zeros(0, dtype=dtype)])
        strided[5, 1] = torch.nan
        assert not kernels.all_finite([torch.ones(3, dtype=dtype), strided])


# -- launches ------------------------------------------------------------------------------------------

FREE = {
    "empty",
    "view",
    "slice",
    "as_strided",
    "detach",
    "split",
    "alias",
    "unsqueeze",
    "select",
    "lift_fresh",
}
"""The torch operations that launch nothing on a GPU."""


class Counted(TorchDispatchMode):
    """Counts the torch operations that would launch something on a GPU, or wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


RESNET = [64 * 3 * 49, *(160 * [300]), 1000]
"""As many tensors as ResNet-50 has, most of them small."""


@pytest.mark.parametrize(("compressor", "most"), [(Compression.sign, 8), (TopKCompressor(0.01), 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_launches_do_not_depend_on_the_tensors(
    compressor: Compressor, most: int, dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvd_saef.kernels.on_triton import sign, topk

    launched: list[str] = []

    def launch(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        launched.extend([kernel.__name__] * (programs not in (0, (0, 2), (0, 1))))

    monkeypatch.setattr(sign, "launch", launch)
    monkeypatch.setattr(topk, "launch", launch)
    monkeypatch.setattr(topk, "AT_ONCE", ())  # as on a GPU
    cuts = [[140000, *RESNET[i::parts]] for i in range(parts)]
    memories = []
    for sizes in cuts:
        blocks = Blocks.cut(sizes, None, dtype)
        flats = [torch.zeros(blocks.numel, dtype=dtype) for _ in range(3)]
        y = [torch.zeros(size, dtype=dtype) for size in sizes]
        memories.append(Memory(blocks, flats[0], flats[1], None, y, 1.0, 0.0))
    payloads = [torch.zeros(compressor.payload_bytes(m.blocks), dtype=torch.uint8) for m in memories]
    served = BlockedTensor(torch.zeros_like(memories[0].x), memories[0].blocks)
    with kernels.only("triton"):
        rows = compressor.fused(CPU, dtype, True)
        assert rows is not None

        def step() -> None:
            rows.send(memories, payloads)
            rows.serve([payloads[0], payloads[0]], [0.5, 0.5], served, payloads[0])
            rows.receive(memories, payloads, [[payload] for payload in payloads], [1.0])

        step()  # makes the tables
        launched.clear()
        with Counted() as counted:
            step()
    assert launched
    assert len(launched) + len(counted.names) <= most, (launched, counted.names)
    assert set(counted.names) <= {"zeros", "zero_"}, "something waits, or copies"


class Traffic:
    """Counts the bytes that the interpreter's programs load and store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.loaded, self.stored = 0, 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.loaded += int(mask.data.sum()) * pointers.dtype.element_ty.primitive_bitwidth // 8
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stored += int(mask.data.sum()) * pointers.dtype.element_ty.primitive_bitwidth // 8
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)


def test_points_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters' memory does not move, so a step takes no time for each of them; new memory is seen."""
    from hvd_saef.kernels.on_triton import seen, sign

    looks: list[int] = []
    look = seen.Seen.of

    def noted(tensor: Tensor) -> seen.Seen:
        looks.append(tensor.data_ptr())
        return look(tensor)

    monkeypatch.setattr(seen.Seen, "of", noted)
    launched: list[Any] = []
    monkeypatch.setattr(sign, "launch", lambda kernel, programs, table, *_, **__: launched.append(table))
    worker, other = (Worker.of([20 * [3]], [torch.float32], torch.float32) for _ in range(2))
    size = Compression.sign.payload_bytes(worker.memories[0].blocks)
    with kernels.only("triton"):
        rows = Compression.sign.fused(CPU, torch.float32, True)
        assert rows is not None
        counts = []
        for memories in (worker.memories, worker.memories, other.memories):
            looks.clear()
            rows.send(memories, [torch.zeros(size, dtype=torch.uint8)])
            counts.append(len(looks))
    assert counts[0] == counts[2] == counts[1] + 20
    tables = launched[::2]  # of encode
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(
    ("compressor", "bytes_sent", "bytes_received"),
    [(Compression.sign, 16, 20), (TopKCompressor(1e-3), 36, 12)],
    ids=["sign", "topk"],
)
def test_bytes_of_a_parameter(
    compressor: Compressor, bytes_sent: int, bytes_received: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """36 bytes a float32 parameter for sign, and the bits. Top-K reads Δ five times more.

    And programs of Top-K read its histograms, 1 byte a parameter, which stay in a GPU's cache.
    """
    numel = 1 << 17
    blocks = Blocks.cut([numel], None, torch.float32)
    x, e, y = (normal(numel, torch.float32) for _ in range(3))
    memory = Memory(blocks, x, e, None, [y], 1.0, 0.0)
    payload = torch.zeros(compressor.payload_bytes(blocks), dtype=torch.uint8)
    traffic = Traffic(monkeypatch)
    with kernels.only("triton"):
        rows = compressor.fused(CPU, torch.float32, True)
        assert rows is not None
        rows.send([memory], [payload])
        sent = traffic.loaded + traffic.stored
        rows.receive([memory], [payload], [[payload]], [1.0])
        received = traffic.loaded + traffic.stored - sent
    bits = 1 / 8 if isinstance(compressor, SignCompressor) else 0.0
    assert 0 <= sent / numel - bytes_sent - bits < 0.2 * bytes_sent / 4  # the rest is tables and histograms
    assert 0 <= received / numel - bytes_received - bits < 0.1 * bytes_received / 4


# -- whole steps ---------------------------------------------------------------------------------------

WHOLE: list[tuple[dict[str, Any], str]] = [
    ({"compressor": "sign"}, "sharded"),
    ({"compressor": "sign", "server_step_ahead": 1.0, "step_ahead": 0.5}, "replicated"),
    ({"compressor": "topk", "local_steps": 2}, "sharded"),
    ({"compressor": "topk", "double_compression": False, "feedback": "ef"}, "auto"),
    ({"compressor": "topk", "averaging_period": 2, "warmup_steps": 1}, "replicated"),
]
MORE: list[tuple[dict[str, Any], str]] = [
    ({"compressor": compressor, "optimizer": "adamw", **mode}, server)
    for compressor in ("sign", "topk")
    for mode, server in (
        ({}, "replicated"),
        ({"averaging_period": 2, "local_steps": 2}, "sharded"),
        ({"server_step_ahead": 0.5}, "replicated"),
        ({"double_compression": False, "step_ahead": 0.3}, "auto"),
        ({"feedback": "none"}, "sharded"),
    )
]


def wanted(workers: int, settings: dict[str, Any]) -> Setup:
    """An oracle's setup."""
    every: dict[str, Any] = {"workers": workers, "block_size": 17, "lr": schedule, "optimizer": "sgdm"}
    return Setup(**(every | settings))


def agrees(outcomes: Sequence[Outcome], setup: Setup, steps: int) -> None:
    """All that the oracle has."""
    truth = run(setup, start_point(), curved_valley, steps)
    for k, outcome in enumerate(outcomes):
        assert worst(outcome.x, truth.x) < 1e-10
        assert worst(outcome.errors, truth.errors[k]) < 1e-10
        assert worst(outcome.parameters, truth.parameters[k]) < 1e-10


@pytest.mark.parametrize(("settings", "server"), WHOLE + MORE * LONG)
def test_the_oracle(settings: dict[str, Any], server: str, few: None) -> None:
    """Few steps of two workers, with all that there is."""
    steps, setup = 8 if LONG else 4, wanted(2, settings)
    with kernels.only("triton"):
        outcomes = together(
            2, lambda rank: run_library(setup, rank, start_point(), steps=steps, server=server)
        )
    agrees(outcomes, setup, steps)


class Kind:
    """What a compressor is by the version of the kernels that its worker has."""

    kind = ""
    description = "by any version"

    @property
    def version(self) -> Any:
        """The version of the kernels."""
        return kernels.load(self.kind)


class SignKind(Kind, SignCompressor):
    """Sign."""

    def fused(self, device: torch.device, dtype: torch.dtype, alike: bool) -> Fused | None:
        """See :meth:`Compressor.fused`."""
        return _FusedSign(self, self.version) if self.version.FUSES else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        stretches = [Stretch(delta.flat, self._table(delta.blocks), payload)]
        self.version.sign_encode(stretches)
        self.version.sign_settle(stretches)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        stretch = Stretch(out.flat, self._table(out.blocks), payloads=[payload])
        self.version.sign_decode([stretch], weights=[weight])


class TopKKind(Kind, TopKCompressor):
    """Top-K."""

    def fused(self, device: torch.device, dtype: torch.dtype, alike: bool) -> Fused | None:
        """See :meth:`Compressor.fused`."""
        return _FusedTopK(self, self.version) if self.version.FUSES else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        stretch = Stretch(delta.flat, delta.blocks.table(self.kept), payload)
        self.version.topk_encode([stretch], self._wire(delta.blocks.dtype))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        stretch = Stretch(out.flat, out.blocks.table(self.kept), payloads=[payload])
        self.version.topk_decode([stretch], self._wire(out.blocks.dtype), weights=[weight])


def kinds(compressor: str, names: Sequence[str]) -> list[Compressor]:
    """A compressor for each of the workers; all say that they are the same."""
    base, arguments = (SignKind, ()) if compressor == "sign" else (TopKKind, (0.1,))
    return [type(name, (base,), {"kind": name, "__qualname__": "Kinds"})(*arguments) for name in names]


MIXED = ["compiled", "on_triton", "twins"] if compiled else ["on_triton", "twins", "on_triton"]


@pytest.mark.parametrize(("settings", "server"), WHOLE[:4] + (WHOLE[4:] + MORE) * LONG)
def test_workers_of_mixed_kinds(settings: dict[str, Any], server: str, few: None) -> None:
    """With C++, Triton and the twins in one job: the oracle, and in float32 the bits of one kind alone."""
    steps, setup = 8 if LONG else 2, wanted(len(MIXED), settings)

    def outcomes(names: Sequence[str], server: str, dtype: torch.dtype) -> list[Outcome]:
        compressors = kinds(setup.compressor, names)

        def fn(rank: int) -> Outcome:
            options: dict[str, Any] = {"server": server, "compression": compressors[rank]}
            return run_library(setup, rank, start_point(), steps=steps, dtype=dtype, **options)

        return together(len(names), fn)

    agrees(outcomes(MIXED, server, torch.float64), setup, steps)
    servers = (
        {server} if setup.server_step_ahead or not setup.double_compression else {"sharded", "replicated"}
    )
    alone = outcomes(len(MIXED) * ["twins"], server, torch.float32)
    for one in servers:
        for mine, theirs in zip(outcomes(MIXED, one, torch.float32), alone, strict=True):
            assert same_bits(mine.x, theirs.x)
            assert same_bits(mine.errors, theirs.errors)
            assert same_bits(mine.parameters, theirs.parameters)


def test_a_refused_payload_is_told_to_all(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decoding does not wait for the device, the next agreement tells all workers."""
    from hvd_saef.kernels import on_triton
    from hvd_saef.kernels.on_triton import topk

    monkeypatch.setattr(topk, "AT_ONCE", ())
    encode = topk.topk_encode

    def spoiled(stretches: Sequence[Stretch], *args: Any, **kwargs: Any) -> None:
        encode(stretches, *args, **kwargs)
        for stretch in stretches:
            assert stretch.payload is not None
            stretch.payload[-2:] = 255

    def fn(rank: int) -> None:
        run = Run(rank, compression=Compression.topk(0.5))
        run.step(1)
        monkeypatch.setattr(on_triton, "topk_encode", spoiled)
        run.step(1)

    with kernels.only("triton"):
        raised = caught(2, fn)
    assert all(isinstance(failure, ExchangeError) for failure in raised)
    assert any("offsets are not ascending" in str(failure) for failure in raised)


# -- which version -------------------------------------------------------------------------------------


def test_which_version_is_used(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Triton by default; where it is asked for, on any device, and nothing else in silence."""
    cuda = torch.device("cuda")
    with kernels.only("triton"):
        assert kernels.version_for(CPU, torch.float32) is triton
        with pytest.raises(RuntimeError, match="on cuda"):
            kernels.version_for(cuda, torch.float32)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with kernels.only(""):
        assert kernels.version_for(cuda, torch.float32) is triton
        assert kernels.version_for(CPU, torch.float32) is not triton
        monkeypatch.setitem(kernels._versions, "on_triton", "No module named 'triton'")
        with pytest.warns(RuntimeWarning, match="pip install triton"):
            assert kernels.version_for(cuda, torch.float32) is kernels.load("twins")
    with kernels.only("triton"), pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        kernels.version_for(CPU, torch.float32)
