"""The model behind `hvd-saef plan`: its bytes are the library's own, and its advice follows its numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from benchmarks.scaling import Observation, fit, hidden, nonnegative
from benchmarks.timings import Timing
from hvd_saef.compression import BUILT_IN
from hvd_saef.planning import constants, plan
from hvd_saef.planning.constants import FEATURES, Constants, of_gpus
from hvd_saef.planning.plan import METHODS, UNCOMPRESSED, Job, Method, predict, recommend, stops_paying

SHAPES = [(40, 30), (30,), (7, 11), (64, 20), (3,)]
SIZES = tuple(math.prod(shape) for shape in SHAPES)
CHOSEN = [method for method in METHODS if not method.dense and method.averaging_period in (None, 16)]
SIGN = next(method for method in METHODS if method.name == "sign DC")
FREE = Constants(dict.fromkeys(FEATURES, 0.0), source="a test")


ALL: dict[str, Any] = {"seconds": dict.fromkeys(FEATURES, 0.0)}
"""A file that is right."""


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
    collective=1e-4,
    latency=3e-5,
    mean=1e-3,
    fixed=1e-3,
    land=1e-9,
    float32=1e-9,
    float16=2e-9,
    sign_encode=4e-9,
    sign_decode=1e-9,
)


def sent(method: Method, workers: int, rounds: int) -> float:
    """Bytes a worker and step that stats() counts, the mean over workers; as many steps as `rounds`."""

    def train(rank: int) -> float:
        generator = torch.Generator().manual_seed(0)  # the global one is shared by the threads
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1),
            compression=method.compressor,
            double_compression=method.double,
            averaging_period=method.averaging_period,
            local_steps=method.local_steps,
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


@pytest.mark.filterwarnings("ignore:the largest block")
@pytest.mark.filterwarnings("ignore:.*evaluat")
def test_local_steps_share_the_bytes_that_stats_counts() -> None:
    method = dataclasses.replace(SIGN, local_steps=4)
    assert method.bytes_sent(SIZES, 3) == pytest.approx(sent(method, 3, rounds=8), rel=1e-3)
    assert method.bytes_sent(SIZES, 3) == pytest.approx(sent(SIGN, 3, rounds=2) / 4, rel=1e-3)


def test_one_worker_sends_nothing() -> None:
    job = Job(SIZES, 1, 1e9, 0.25)
    for method in METHODS:
        assert predict(method, job, REALISTIC) == 0.25
        assert method.bytes_sent(SIZES, 1) == 0


def test_wire_time_by_hand() -> None:
    job = Job((25_000_000,), 4, 1e9, 0.1)
    # 2·(3/4)·100 MB at 8 bits a byte and 1 Gbit/s; sign is 32 times less, and a scale.
    assert predict(UNCOMPRESSED, job, WIRE_ONLY) == pytest.approx(0.1 + 1.2)
    assert predict(SIGN, job, WIRE_ONLY) == pytest.approx(0.1 + 1.2 / 32, rel=1e-5)
    assert predict(SIGN, dataclasses.replace(job, bandwidth=math.inf), WIRE_ONLY) == 0.1


def test_a_constant_that_the_package_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a compressor was added that says what its work costs."""
    monkeypatch.setattr(constants, "FEATURES", (*FEATURES, "nine_encode"))
    with pytest.raises(ValueError, match=r"plan\.json: no constants of the model: nine_encode=None"):
        Constants.load()
    with pytest.raises(ValueError, match="nine_encode=None"):
        of_gpus()


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
    bandwidth, name = stops_paying(job, REALISTIC, METHODS)
    method = next(m for m in METHODS if m.name == name)

    def gain(factor: float) -> float:
        there = dataclasses.replace(job, bandwidth=bandwidth * factor)
        return predict(UNCOMPRESSED, there, REALISTIC) / predict(method, there, REALISTIC)

    assert gain(0.99) > plan.CLOSE > gain(1.01)
    assert stops_paying(job, FREE, METHODS) == (0.0, "-")


def observations(truth: Constants) -> list[Observation]:
    """What would be measured if the model were exact."""
    found = []
    for workers, bandwidth, tensors in itertools.product((2, 4, 8), (1e8, 1e9, math.inf), (10, 40)):
        job = Job((640_000,) * tensors, workers, bandwidth, 0.1)
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
    known = {"message": REALISTIC.seconds["message"], "mean": REALISTIC.seconds["mean"]}
    assert fit(observations(REALISTIC), "a test", known).seconds == pytest.approx(found.seconds, rel=1e-6)
    wrong = fit(observations(REALISTIC), "a test", {"message": 1e-3})
    assert wrong.seconds["message"] == 1e-3  # what is known is not fitted


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


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no constants of the model: Expecting value"),
        ("\x00\udcff", "no constants of the model"),
        ("[1]", "'seconds' is missing"),
        ('{"wire": 1.0}', "'seconds' is missing. `hvd-saef calibrate`"),
        ('{"seconds": [1]}', "seconds=\\[1\\]: a JSON dict is allowed"),
        ('{"seconds": {"wire": 1}}', "byte=None: a number >= 0"),
        ('{"seconds": {"wire": 1}, "colour": 3}', "colour=3: not one of seconds, source"),
        (ALL | {"hidden": 2}, "hidden=2: a number from 0 to 1"),
        (ALL | {"bandwidth": "10Gbit"}, "bandwidth='10Gbit': a number above 0, in bits a second"),
        (ALL | {"inside": 0}, "inside=0"),
        (ALL | {"estimated": ["weather"]}, "estimated=\\['weather'\\]"),
        (ALL | {"made": "today"}, "made='today': a JSON dict"),
        (ALL | {"seconds": ALL["seconds"] | {"message": True}}, "message=True"),
        (ALL | {"seconds": ALL["seconds"] | {"land": math.nan}}, "land=nan"),
    ],
)
def test_wrong_files_are_refused_by_name(text: str | dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    words = text if isinstance(text, str) else json.dumps(text)
    path.write_bytes(words.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=named) as refused:
        Constants.load(path)
    assert str(path) in str(refused.value)


def test_those_of_the_package_are_a_fit() -> None:
    own = Constants.load()
    assert "cluster.py" in own.source
    assert own.device
    assert own.network
    assert set(own.estimated) == set(constants.ETHERNET)


def test_those_of_gpus_are_estimated_and_say_so() -> None:
    gpus = of_gpus()
    assert {*FEATURES, "hidden"} == set(gpus.estimated)
    assert "ESTIMATED" in gpus.source
    # 36 bytes a parameter over the memory, as the passes read and write; and what crosses to the host.
    per = {name: seconds * 1.5e12 for name, seconds in gpus.seconds.items()}
    assert per["land"] - 4 == pytest.approx(20)  # without the look at gradients
    assert gpus.seconds["sign_encode"] == pytest.approx(16 / 1.5e12 + 0.5 / 25e9)


@pytest.mark.parametrize(
    ("parameters", "bandwidth", "compute"), [(25_600_000, 1e10, 0.12), (7_000_000_000, 1e11, 1.0)]
)
def test_gpus_are_told_to_compress(parameters: int, bandwidth: float, compute: float) -> None:
    """Not on a wire that is faster than the GPU's memory; and processors are told the same at 10 Gbit/s."""
    job = Job((160_000,) * (parameters // 160_000), 64, bandwidth, compute)
    for known in (of_gpus(), Constants.load()):
        best = recommend(job, known)
        assert not best.dense
        fp16 = next(method for method in METHODS if method.name == "Horovod fp16")
        assert predict(best, job, known) < predict(fp16, job, known)
    assert recommend(dataclasses.replace(job, bandwidth=1e14), of_gpus()).dense


CASES = [
    Job((2_560_000,) * 10, workers, 1e9, compute, ranks, inside)
    for workers, ranks, inside in ((2, 1, math.inf), (16, 8, 1e11), (64, 8, 1e10), (512, 1, math.inf))
    for compute in (0.0, 0.1)
]


@pytest.mark.parametrize("known", [of_gpus(), REALISTIC, WIRE_ONLY], ids=["gpus", "realistic", "wire"])
@pytest.mark.parametrize("job", CASES, ids=lambda job: f"{job.workers}-{job.ranks}-{job.compute}")
def test_a_faster_wire_never_makes_compression_gain_more(job: Job, known: Constants) -> None:
    known = dataclasses.replace(known, hidden=0.0)  # what Horovod hides may be more than others send
    faster = [dataclasses.replace(job, bandwidth=rate) for rate in (1e8, 1e9, 1e10, 1e11, 1e14)]
    for method in plan.methods(job):
        if method.dense or not method.double:  # SC may send more than float32
            continue
        gains = [predict(UNCOMPRESSED, there, known) / predict(method, there, known) for there in faster]
        assert all(slow >= fast * (1 - 1e-12) for slow, fast in itertools.pairwise(gains)), method.name
        times = [predict(method, there, known) for there in faster]
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("job", CASES, ids=lambda job: f"{job.workers}-{job.ranks}-{job.compute}")
def test_local_steps_divide_the_exchange(job: Job) -> None:
    for method in plan.methods(job):
        if method.dense:
            assert method.local_steps == 1
            continue
        each_step = plan.seconds(method.parts(job)[0], REALISTIC)
        once = predict(method, job, REALISTIC) - job.compute - each_step
        for steps in (2, 8, 100):
            longer = dataclasses.replace(method, local_steps=steps)
            assert predict(longer, job, REALISTIC) - job.compute - each_step == pytest.approx(once / steps)
            assert longer.bytes_between_nodes(job) == pytest.approx(method.bytes_between_nodes(job) / steps)
            assert f"local_steps={steps}" in longer.call
        if method.node and job.ranks > 1:  # gradients are averaged inside the node before every local step
            assert each_step > plan.seconds(dataclasses.replace(method, node=False).parts(job)[0], REALISTIC)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("job", CASES, ids=lambda job: f"{job.workers}-{job.ranks}-{job.compute}")
def test_overlap_hides_no_more_than_backward_takes(job: Job, steps: int) -> None:
    for share in (0.0, 0.5, 1.0):
        known = dataclasses.replace(REALISTIC, hidden=share)
        for method in plan.methods(job, steps):
            without = dataclasses.replace(method, overlap=False)
            behind = dataclasses.replace(method, overlap=True)
            gained = predict(without, job, known) - predict(behind, job, known)
            exchange = predict(without, job, known) - job.compute
            assert 0 <= gained <= min(share * exchange, plan.BACKWARD * job.compute) + 1e-12
            if steps == 1:
                assert gained == pytest.approx(min(share * exchange, plan.BACKWARD * job.compute))
    assert "overlap=True" in dataclasses.replace(SIGN, overlap=True).call
    assert UNCOMPRESSED.overlap  # Horovod's allreduce always runs behind backward
    assert UNCOMPRESSED.call == "hvd.DistributedOptimizer(compression=hvd.Compression.none)"


def test_what_overlap_hid_is_told_from_its_rounds() -> None:
    def turn(method: str, number: int, seconds: float) -> Timing:
        return Timing("tiny", "1gbit", 2, method, number, 3, seconds, 0, 0, 0, 0)

    timings = [
        turn(method, number, seconds)
        for number, behind in enumerate((0.175, 0.15, 0.1))
        for method, seconds in (("no exchange", 0.1), ("sign DC", 0.2), ("sign DC, overlap", behind))
    ]
    assert hidden(timings) == pytest.approx(0.5)


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
