"""The sign kernels give the bits of plain torch, on every instruction set and any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression import BlockedTensor, Blocks, Compression, Fused, Memory, SignCompressor
from hvd_saef.kernels import twins as twins_version
from hvd_saef.memory import algorithm
from tests.kernels import slow
from tests.kernels.versions import Direct, compiled

pytestmark = pytest.mark.skipif(compiled is None, reason="the kernels are not built")
native: Any = Direct(compiled) if compiled else None

PAGE = 65536
Run = tuple[int, int, bool]  # a block's size, the number of blocks, whether they travel dense


@dataclass(frozen=True)
class Case:
    """Memory of one stretch: what a round's rows read."""

    runs: Sequence[Run]
    dtype: torch.dtype
    seed: int
    pool: Sequence[float] | None = None  # draw all numbers from these
    pieces: int = 2  # of the points
    alpha: float = 1.0
    beta: float = 0.0
    weight: float = 1 / 3

    @property
    def table(self) -> Tensor:
        """The runs as kernels read them."""
        start, rows = 0, []
        for size, count, dense in self.runs:
            rows.append((start, size, count, size if dense else 0))
            start += size * count
        return torch.tensor(rows, dtype=torch.int64).view(-1, 4)

    def numbers(self, which: int) -> Tensor:
        """A flat tensor; another one for each `which`."""
        generator = np.random.default_rng([self.seed, which])
        size = sum(size * count for size, count, _ in self.runs)
        drawn = generator.normal(size=size) if self.pool is None else generator.choice(self.pool, size)
        return torch.from_numpy(drawn).to(self.dtype)

    def points(self, y: Tensor) -> list[Tensor]:
        """Copies of y's memory, cut at ends of runs."""
        ends = np.cumsum([size * count for size, count, _ in self.runs]).tolist()
        cuts = [0, *ends[:-1][: self.pieces - 1], y.numel()]
        return [y[start:stop].clone() for start, stop in itertools.pairwise(cuts)]


# -- the slow way ------------------------------------------------------------------------------------


def rows_of(case: Case, flat: Tensor) -> Iterator[tuple[Tensor, bool]]:
    for start, size, count, kept in case.table.tolist():
        yield flat[start : start + size * count].view(count, size), kept == size


def slow_encode(case: Case, delta: Tensor) -> tuple[bytes, Tensor]:
    """The payload, and C(delta)."""
    head, tail, sent = b"", b"", torch.zeros_like(delta)
    for (rows, dense), (out, _) in zip(rows_of(case, delta), rows_of(case, sent), strict=True):
        if dense:
            head += rows.numpy().tobytes()
            out.copy_(rows)
        else:
            scales = (slow.l1_norms(rows) / rows.shape[1]).to(rows.dtype)
            head += scales.numpy().tobytes()
            tail += slow.pack_signs(rows).numpy().tobytes()
            out.copy_(torch.where(torch.signbit(rows), -scales[:, None], scales[:, None]))
    return head + tail, sent


def left(case: Case, delta: Tensor) -> Tensor:
    """What sign_encode leaves: delta, and 0 in dense blocks."""
    delta = delta.clone()
    for rows, dense in rows_of(case, delta):
        if dense:
            rows.zero_()
    return delta


def settled(case: Case, delta: Tensor) -> Tensor:
    """Delta - C(delta)."""
    residual = delta - slow_encode(case, delta)[1]
    return torch.where(left(case, delta) == delta, residual, torch.zeros_like(delta))


def unaligned(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(b"?" + payload), dtype=torch.uint8)[1:]


def same(one: Tensor, other: Tensor | bytes) -> bool:
    return one.numpy().tobytes() == (other if isinstance(other, bytes) else other.numpy().tobytes())


# -- the checks ----------------------------------------------------------------------------------------


def check_send(case: Case, version: Any = native) -> None:
    """Row 4: Δ and its payload."""
    x, e, s, y = map(case.numbers, range(4))
    delta = e.clone()
    algorithm.add_update(delta, algorithm.step_ahead(x, e, s, case.alpha, case.beta), y)
    payload, _ = slow_encode(case, delta)
    written = unaligned(b"\xaa" * len(payload))
    points = case.points(y)
    version.sign_encode(e, case.table, written, x, s, case.alpha, case.beta, points)
    assert same(written, payload)
    assert same(e, left(case, delta))
    assert all(same(a, b) for a, b in zip(points, case.points(y), strict=True))
    version.sign_settle(e, case.table, written)
    assert same(e, settled(case, delta))


def check_serve(case: Case, version: Any = native) -> None:
    """Row 5': the server's D and its payload."""
    s, payloads = case.numbers(2), []
    delta = s.clone()
    for worker in range(3):
        payload, sent = slow_encode(case, case.numbers(10 + worker))
        payloads.append(unaligned(payload))
        delta += sent * case.weight
    written = unaligned(slow_encode(case, delta)[0][::-1])
    version.sign_encode(s, case.table, written, payloads=payloads, weight=case.weight)
    assert same(written, slow_encode(case, delta)[0])
    assert same(s, left(case, delta))


def check_receive(case: Case, version: Any = native) -> None:
    """Rows 6 and 2: x, e and the start points."""
    x, delta, s, y = map(case.numbers, range(4))
    payloads, expected = [], x.clone()
    for worker in range(4):
        payload, sent = slow_encode(case, case.numbers(10 + worker))
        payloads.append(unaligned(payload))
        expected += sent * -case.weight
    e, points = left(case, delta), case.points(y)
    own = unaligned(slow_encode(case, delta)[0])
    version.sign_decode(x, case.table, payloads, -case.weight, e, own, s, case.alpha, case.beta, points)
    assert same(x, expected)
    assert same(e, settled(case, delta))
    b = algorithm.step_ahead(x, e, s, case.alpha, case.beta)
    assert all(same(a, c) for a, c in zip(points, case.points(b), strict=True))
    before = e.clone()
    version.sign_decode(x, case.table, payloads[:1], case.weight)  # neither e nor points
    assert same(x, expected + slow_encode(case, case.numbers(10))[1] * case.weight)
    assert same(e, before)


def check_alone(case: Case, version: Any = native) -> None:
    """C without any rows around it."""
    delta, out = case.numbers(1), case.numbers(0)
    payload, sent = slow_encode(case, delta)
    written, expected = unaligned(b"\xaa" * len(payload)), out + sent * case.weight
    residual = settled(case, delta)
    version.sign_encode(delta, case.table, written)
    version.sign_settle(delta, case.table, written)
    assert same(written, payload)
    assert same(delta, residual)
    version.sign_decode(out, case.table, [written], case.weight)
    assert same(out, expected)


CHECKS = [check_send, check_serve, check_receive]


@contextmanager
def everywhere(*numbers: int) -> Iterator[Iterator[None]]:
    """Every instruction set of this CPU with such numbers of threads; then as it was before."""
    threads, chosen = torch.get_num_threads(), compiled.instruction_sets()[-1]

    def settings() -> Iterator[None]:
        for name, number in itertools.product(compiled.instruction_sets(), numbers):
            compiled.set_instruction_set(name)
            torch.set_num_threads(number)
            yield

    try:
        yield settings()
    finally:
        torch.set_num_threads(threads)
        compiled.set_instruction_set(chosen)


def cases() -> st.SearchStrategy[Case]:
    """Zeros of both signs, ties, denormals, huge numbers; any small runs."""
    sizes = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 1023, 1024, 1025, 2049])
    coefficients = st.sampled_from([0.0, 1.0, 0.3, 1 / 3])

    def case(dtype: torch.dtype) -> st.SearchStrategy[Case]:
        info = torch.finfo(dtype)
        huge = torch.tensor(1e37 if dtype == torch.float32 else 1e300, dtype=dtype).item()
        special = [0.0, 1.0, 1 / 3, info.tiny, info.smallest_normal / 8, huge]
        number = st.floats(-huge, huge, width=32 if dtype == torch.float32 else 64) | st.sampled_from(
            [sign * v for v in special for sign in (1, -1)]
        )
        return st.builds(
            Case,
            st.lists(st.tuples(sizes, st.integers(1, 4), st.booleans()), max_size=4),
            st.just(dtype),
            st.integers(0, 2**32),
            st.none() | st.lists(number, min_size=1, max_size=30),
            st.integers(1, 4),
            coefficients,
            coefficients,
            st.sampled_from([1.0, 1 / 3, 0.25, -0.7]),
        )

    return st.sampled_from([torch.float32, torch.float64]).flatmap(case)


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_small(check: Callable[[Case], None], case: Case) -> None:
    with everywhere(1) as each:  # which is one task for any number
        for _ in each:
            check(case)


LARGE: dict[str, list[Run]] = {
    "a page less one": [(PAGE - 1, 1, False)],
    "a page": [(PAGE, 1, False)],
    "a page and one": [(PAGE + 1, 1, False)],
    "pages": [(3 * PAGE + 1025, 1, False), (5, 1, False), (2 * PAGE, 2, False)],
    "an odd number of lines": [(2 * PAGE + 16 * 3, 1, False)],
    "dense and not": [(PAGE + 9, 1, True), (PAGE + 9, 2, False), (1000, 3, True), (1, 1, False)],
    "small blocks": [(1, 70001, False), (3, 5, False), (17, 9001, False), (64, 1, False), (2, 1, True)],
    "small runs": [(size, 1, size % 7 == 0) for size in range(1, 150)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_the_twins(name: str, dtype: torch.dtype) -> None:
    check_alone(Case(LARGE[name], dtype, 0), Direct(twins_version))
    check_alone(Case(LARGE[name], dtype, 1, pool=[0.0, -0.0, 1e-40, -3e38, 1.0]), Direct(twins_version))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, dtype: torch.dtype) -> None:
    coefficients = itertools.cycle([(1.0, 0.0), (0.3, 1.0), (0.0, 0.7), (1.0, 0.0), (1.0, 0.0)])
    with everywhere(1, 2, 3) as each:
        for _, (alpha, beta) in zip(each, coefficients, strict=False):
            for check in CHECKS:
                check(Case(LARGE[name], dtype, 0, alpha=alpha, beta=beta))


@pytest.mark.parametrize("pieces", [1, 2], ids=["anywhere", "aligned"])
def test_points_written_past_the_caches(pieces: int) -> None:
    with everywhere(2) as each:
        for _ in each:
            check_receive(Case([(3, 1, False), (2_200_003, 1, False)], torch.float32, 0, pieces=pieces))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("sizes", [[40, 7, 1000], [70000, 0, 1]])
def test_fused_rows_are_the_plain_rows(sizes: list[int], double: bool) -> None:
    """SignCompressor.fused against PlainRows on the twins, three rounds of two workers."""
    blocks = Blocks.cut(sizes, 900, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def run(rows: Fused) -> list[Tensor]:
        generator.manual_seed(0)
        workers, size = 2, Compression.sign.payload_bytes(blocks)
        x = torch.zeros(workers, blocks.numel)
        e, y, s = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(blocks.numel)
        payloads, answer = torch.empty(workers, size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        for _ in range(3):
            y += torch.randn(y.shape, generator=generator)
            memories = [Memory(blocks, x[k], e[k], s, [y[k]], 1.0, 0.3) for k in range(workers)]
            for k, memory in enumerate(memories):
                rows.send([memory], [payloads[k]])
            arrived, weights = list(payloads), workers * [1 / workers]
            if double:
                rows.serve(arrived, weights, BlockedTensor(s, blocks), answer)
                arrived, weights = [answer], [1.0]
            for k, memory in enumerate(memories):
                rows.receive([memory], [payloads[k]], [arrived], weights)
        return [x, e, s, y, payloads]

    fused = Compression.sign.fused(torch.device("cpu"), torch.float32, True)
    assert fused is not None
    fast = run(fused)
    assert same(fast[0][0], fast[0][1])
    with kernels.only("twins"):
        assert SignCompressor().fused(torch.device("cpu"), torch.float32, True) is None
        slow = run(algorithm.PlainRows(Compression.sign))
    assert all(same(a, b) for a, b in zip(fast, slow, strict=True))


def test_a_subclass_has_no_fused_rows() -> None:
    class Louder(SignCompressor):
        def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
            super().encode(delta, payload)

    here = torch.device("cpu"), torch.float32, True
    assert SignCompressor().fused(*here) is not None
    assert Louder().fused(*here) is None
    assert SignCompressor().fused(torch.device("cpu"), torch.float32, False) is None  # unequal weights


def test_the_order_of_additions_and_roundings_shows() -> None:
    """Counter-checks: sums in another order, or products rounded together with sums, have other bits."""
    case = Case([(4096, 20, False)], torch.float64, 0)
    e, payload = case.numbers(1), torch.empty(20 * (8 + 512), dtype=torch.uint8)
    in_order = np.cumsum(e.abs().view(20, 4096).numpy(), axis=1)[:, -1] / 4096
    native.sign_encode(e, case.table, payload)
    scales = payload[: 20 * 8].view(torch.float64).numpy()
    assert (scales != in_order).any()
    np.testing.assert_allclose(scales, in_order)
    single = Case([(1000, 1, False)], torch.float32, 0, alpha=1 / 3)
    x, e, _, y = map(single.numbers, range(4))
    once = e + ((x.double() - e.double() * float(np.float32(1 / 3))).float() - y)  # one rounding of the two
    native.sign_encode(e, single.table, torch.empty(129, dtype=torch.uint8), x, None, 1 / 3, 0.0, [y])
    assert not same(e, once)
    torch.testing.assert_close(e, once)


def test_malformed_arguments_are_refused() -> None:
    refuses_malformed_arguments(native)


def refuses_malformed_arguments(version: Any) -> None:
    case = Case([(100, 2, False), (8, 1, True)], torch.float32, 0)
    x, e, _, y = map(case.numbers, range(4))
    table, size = case.table, 2 * 4 + 8 * 4 + 2 * 13
    payload = torch.zeros(size, dtype=torch.uint8)

    def refused(says: str, function: Callable[..., None], *args: object, **kwargs: object) -> None:
        with pytest.raises(ValueError, match=says):
            function(*args, **kwargs)

    encode, decode, settle = version.sign_encode, version.sign_decode, version.sign_settle
    for wrong in (payload[1:], torch.zeros(size + 1, dtype=torch.uint8)):
        refused(f"payload has {wrong.numel()} elements; {size} are needed", encode, e, table, wrong)
        refused("payloads has", encode, e, table, payload, payloads=[payload, wrong], weight=1.0)
        refused("payloads has", decode, x, table, [wrong], 1.0)
        refused("sent has", decode, x, table, [payload], 1.0, e, wrong)
        refused("payload has", settle, e, table, wrong)
    refused("payload is Int", encode, e, table, payload[:-2].view(torch.int32))
    refused("delta has 207 elements; 208 are needed", encode, e[1:], table, payload)
    refused("contiguous", encode, torch.zeros(416)[::2], table, payload)
    refused("float32 or float64", encode, e.half(), table, payload)
    refused("x is Double", encode, e, table, payload, x.double(), points=[y])
    refused("points have 207 elements", encode, e, table, payload, x, points=[y[1:]])
    refused("does not lie within one piece", encode, e, table, payload, x, points=[y[:150], y[150:]])
    refused("both are needed", encode, e, table, payload, x)
    refused("both are needed", encode, e, table, payload, points=[y])
    refused("sent: it settles e", decode, x, table, [], 1.0, None, payload)
    refused("alpha=1: e is needed", decode, x, table, [], 1.0, alpha=1.0, points=[y])
    refused("weight=nan", decode, x, table, [payload], torch.nan)
    refused("CPU", encode, torch.zeros(208, device="meta"), table, payload)
    for row, column, value in [(0, 0, 1), (1, 0, 199), (0, 1, 0), (0, 2, -1), (1, 3, 9), (1, 3, -1)]:
        broken = table.clone()
        broken[row, column] = value
        refused("runs: row", encode, e, broken, payload)
    refused("runs: a contiguous int64", encode, e, table.int(), payload)
    assert not payload.any()
    assert same(e, case.numbers(1))
    encode(e[:0], table[:0], payload[:0])  # nothing is something too
