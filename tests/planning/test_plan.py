"""The model behind `hvd-saef plan`: its bytes are the library's own, and its advice follows its numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import hvd_saef
from benchmarks.scaling import Observation, fit, nonnegative, stops_paying
from hvd_saef.compression import BUILT_IN
from hvd_saef.planning import plan
from hvd_saef.planning.plan import FEATURES, METHODS, UNCOMPRESSED, Constants, Job, Method, predict, recommend

SHAPES = [(40, 30), (30,), (7, 11), (64, 20), (3,)]
SIZES = tuple(math.prod(shape) for shape in SHAPES)
CHOSEN = [method for method in METHODS if not method.dense and method.averaging_period in (None, 16)]
FREE = Constants(dict.fromkeys(FEATURES, 0.0), source="a test")


def changed(constants: Constants, **seconds: float) -> Constants:
    """The constants with some of them replaced."""
    return dataclasses.replace(constants, seconds={**constants.seconds, **seconds})


WIRE_ONLY = changed(FREE, wire=1.0)
# Compression costs the processor more than it saves it, so that there is a bandwidth where it stops paying.
REALISTIC = changed(
    changed(FREE, **{cost: 5e-9 for compressor in BUILT_IN for cost in compressor.costs}),
    wire=1.1,
    byte=1e-11,
    message=5e-5,
    fixed=1e-3,
    float32=1e-9,
    float16=2e-9,
    sign_encode=4e-9,
    sign_decode=1e-9,
)


def sent(method: Method, workers: int, rounds: int) -> float:
    """Bytes a worker and round that stats() counts, the mean over workers."""

    def train(rank: int) -> float:
        generator = torch.Generator().manual_seed(0)  # the global one is shared by the threads
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1),
            compression=method.compressor,
            double_compression=method.double,
            averaging_period=method.averaging_period,
        )
        for _ in range(rounds):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        stats = optimizer.stats()
        return float(stats["payload_bytes_sent"] + stats["averaging_bytes_sent"])

    return sum(hvd_saef.run_workers(workers, train)) / workers / rounds


@pytest.mark.filterwarnings("ignore:the largest block")
@pytest.mark.filterwarnings("ignore:.*evaluat")
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("method", CHOSEN, ids=lambda method: method.name)
def test_bytes_are_those_that_stats_counts(method: Method, workers: int) -> None:
    # A ring's bytes are rounded down to whole ones in each of few buckets: less than one in a thousand.
    expected = sent(method, workers, rounds=16)
    assert method.bytes_sent(SIZES, workers) == pytest.approx(expected, rel=1e-3 / workers)
    other = dataclasses.replace(method, double=not method.double)
    if workers > 2:  # the check can fail: single-way sends more from three workers on
        assert other.bytes_sent(SIZES, workers) != pytest.approx(expected, rel=1e-2)


def test_one_worker_sends_nothing() -> None:
    job = Job(SIZES, 1, 1e9, 0.25)
    for method in METHODS:
        assert predict(method, job, REALISTIC) == 0.25
        assert method.bytes_sent(SIZES, 1) == 0


def test_wire_time_by_hand() -> None:
    job = Job((25_000_000,), 4, 1e9, 0.1)
    # 2·(3/4)·100 MB at 8 bits a byte and 1 Gbit/s; sign is 32 times less, and a scale.
    assert predict(UNCOMPRESSED, job, WIRE_ONLY) == pytest.approx(0.1 + 1.2)
    sign = next(method for method in METHODS if method.name == "sign DC")
    assert predict(sign, job, WIRE_ONLY) == pytest.approx(0.1 + 1.2 / 32, rel=1e-5)
    assert predict(sign, dataclasses.replace(job, bandwidth=math.inf), WIRE_ONLY) == 0.1


def test_a_constant_that_the_package_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a compressor was added that says what its work costs."""
    monkeypatch.setattr(plan, "FEATURES", (*FEATURES, "nine_encode"))
    with pytest.raises(ValueError, match=r"plan\.json: no constants of the model: nine_encode=None"):
        Constants.load()


def test_every_feature_costs() -> None:
    job = Job((1_000_000,), 8, 1e9, 0.1)
    used = {name for method in METHODS for name, number in method.features(job).items() if number}
    assert used == set(FEATURES)
    for name in FEATURES:
        more = changed(REALISTIC, **{name: 2 * REALISTIC.seconds[name]})
        assert any(predict(m, job, more) > predict(m, job, REALISTIC) for m in METHODS)


def test_advice_follows_the_bandwidth() -> None:
    job = Job(tuple([160_000] * 160), 8, 1e8, 0.1)
    slow = recommend(job, REALISTIC)
    assert not slow.dense
    fast = dataclasses.replace(job, bandwidth=1e13)
    assert recommend(fast, REALISTIC) is UNCOMPRESSED
    # Where the wire is all there is, and it is slow, the smallest payload wins.
    smallest = min(METHODS, key=lambda m: m.bytes_sent(job.sizes, job.workers))
    chosen = recommend(dataclasses.replace(job, compute=0.0), WIRE_ONLY)
    assert predict(chosen, job, WIRE_ONLY) <= plan.CLOSE * predict(smallest, job, WIRE_ONLY)
    # Where nothing costs anything, the least lossy is taken.
    assert recommend(job, FREE) is UNCOMPRESSED


def test_where_compression_stops_paying() -> None:
    job = Job(tuple([160_000] * 160), 8, 1e9, 0.1)
    bandwidth, name = stops_paying(job, REALISTIC)
    method = next(m for m in METHODS if m.name == name)

    def gain(factor: float) -> float:
        there = dataclasses.replace(job, bandwidth=bandwidth * factor)
        return predict(UNCOMPRESSED, there, REALISTIC) / predict(method, there, REALISTIC)

    assert gain(0.99) > plan.CLOSE > gain(1.01)
    assert stops_paying(job, FREE) == (0.0, "-")


def observations(truth: Constants) -> list[Observation]:
    """What would be measured if the model were exact."""
    found = []
    for workers in (2, 4, 8):
        for bandwidth in (1e8, 1e9, 1e10, math.inf):
            job = Job(tuple([160_000] * 160), workers, bandwidth, 0.1)
            for method in METHODS:
                features = method.features(job)
                seconds = predict(method, job, truth)
                found.append(Observation(f"{bandwidth} {workers}", method, job, seconds, features))
    return found


def test_the_fit_finds_the_constants_again() -> None:
    found = fit(observations(REALISTIC), "a test")
    for name in FEATURES:
        assert found.seconds[name] == pytest.approx(REALISTIC.seconds[name], rel=1e-6)
    other = fit(observations(changed(REALISTIC, message=1e-3)), "a test")
    assert other.seconds["message"] == pytest.approx(1e-3)  # the check can fail


def test_no_negative_constants() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]).double().numpy()
    wanted = torch.tensor([3.0, 2.0, 1.0]).double().numpy()
    assert nonnegative(matrix, wanted).tolist() == pytest.approx([2.0, 0.0])
    assert nonnegative(matrix, wanted[::-1].copy()).tolist() == pytest.approx([0.0, 1.0])


def test_constants_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    REALISTIC.save(path)
    assert Constants.load(path) == REALISTIC
    path.write_text(path.read_text().replace('"wire"', '"wires"'))
    with pytest.raises(ValueError, match="wires"):
        Constants.load(path)
    with pytest.raises(ValueError, match="message=-1"):
        changed(REALISTIC, message=-1.0)


def test_those_of_the_package_are_a_fit() -> None:
    assert "cluster.py" in Constants.load().source


@pytest.mark.filterwarnings("ignore:the largest block")
@pytest.mark.filterwarnings("ignore:.*evaluat")
@pytest.mark.parametrize("method", CHOSEN, ids=lambda method: method.name)
def test_a_node_sends_what_one_rank_would(method: Method) -> None:
    alone, shared = Job(SIZES, 3, 1e9, 0.1), Job(SIZES, 24, 1e9, 0.1, ranks=8)
    node = dataclasses.replace(method, node=True)
    assert node.bytes_between_nodes(shared) == method.bytes_between_nodes(alone) > 0
    assert method.bytes_between_nodes(alone) == pytest.approx(method.bytes_sent(SIZES, 3))
    assert method.bytes_between_nodes(shared) > node.bytes_between_nodes(shared)
    assert predict(method, shared, WIRE_ONLY) > predict(node, shared, WIRE_ONLY)
    slow_inside = dataclasses.replace(shared, inside=1e6)
    assert predict(node, slow_inside, WIRE_ONLY) > predict(method, slow_inside, WIRE_ONLY)


def test_ranks_of_a_single_node_send_nothing() -> None:
    job = Job(SIZES, 8, 1e9, 0.1, ranks=8)
    assert all(method.bytes_between_nodes(job) == 0 for method in plan.methods(job))
    with pytest.raises(ValueError, match="ranks=3 on each node"):
        Job(SIZES, 8, 1e9, 0.1, ranks=3)


def test_nodes_are_advised_where_their_links_are_slow() -> None:
    job = Job((25_000_000,), 64, 1e9, 0.1, ranks=8, inside=1e12)
    assert recommend(job, WIRE_ONLY).node
    assert 'worker="node"' in recommend(job, WIRE_ONLY).call
    assert not recommend(dataclasses.replace(job, ranks=1), WIRE_ONLY).node
