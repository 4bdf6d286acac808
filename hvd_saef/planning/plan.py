"""A model of a step's time, by method, from which `hvd-saef plan` answers. Local; it needs no MPI.

The model is linear: a step's time is the time of the compute, plus a term for each feature of the method
(bytes over the bandwidth, messages, encoded parameters, decoded payloads). A term is the feature's number
times a constant of a device and a network (`hvd_saef.planning.constants`). Of that, backward hides a share
with overlap; H local steps share one exchange. `benchmarks/scaling.py` fits the constants on measured steps,
and shows the model's errors on steps that the fit did not use; `hvd-saef calibrate` measures them. For other
machines, networks and numbers of workers the model gives a prediction, not a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from hvd_saef.compression import BUILT_IN, Blocks, Compressor, Considered, DenseCompressor
from hvd_saef.planning.constants import FEATURES, Constants
from hvd_saef.round.team_means import TOGETHER
from hvd_saef.settings import Settings

CLOSE = 1.05
"""Methods within 5 % of the fastest count as equally fast; the least lossy of them is recommended."""
BACKWARD = 2 / 3
"""The share of a step's compute that is backward, behind which an exchange can run."""
TENSOR = 160_000
"""The assumed elements of a tensor, where only the model's sum is known; it is ResNet-50's mean."""
FUSED = 128 << 20
"""The bytes of gradients that Horovod's default averages in one ring."""
Work = dict[str, float]
"""The number of units of each feature."""


@dataclass(frozen=True)
class Job:
    """A training job: the model's sizes, the machines and the network."""

    sizes: Sequence[int]
    """The number of elements of each parameter tensor."""
    workers: int
    """The number of ranks that exchange."""
    bandwidth: float
    """The bits a second that a node can send; infinity if only the processors limit the speed."""
    compute: float
    """The seconds of a step without any exchange."""
    ranks: int = 1
    """The number of ranks on each node, which share the node's bandwidth."""
    inside: float = math.inf
    """The bits a second that a rank can send to the other ranks of its node."""

    def __post_init__(self) -> None:
        if self.workers % self.ranks:
            raise ValueError(
                f"ranks={self.ranks} on each node: a divisor of workers={self.workers} is allowed."
            )

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Method:
    """A way to exchange updates: Horovod's ring allreduce, or a method of this library."""

    name: str
    compressor: Compressor
    double: bool = True
    """True for double-way compression with a sharded server, False for single-way compression."""
    averaging_period: int | None = None
    node: bool = False
    """True if each node is one worker: worker="node"."""
    local_steps: int = 1
    """H, the local steps between two exchanges. Horovod's allreduce has 1."""
    overlap: bool = False
    """True if the exchange runs behind backward. Horovod's allreduce always does."""
    bucket_bytes: int = Settings.bucket_bytes
    """The bytes of the parameters that travel together."""

    @property
    def dense(self) -> bool:
        """True if the method is Horovod's own allreduce."""
        return isinstance(self.compressor, DenseCompressor)

    @property
    def call(self) -> str:
        """The call by which a user asks for the method."""
        compression = f"compression={self.compressor.call}"
        if self.dense:  # Horovod's own optimizer, which averages behind backward
            return f"hvd.DistributedOptimizer({compression.replace('hvd_saef.', 'hvd.')})"
        arguments = [compression]
        arguments += [] if self.double else ["double_compression=False"]
        arguments += [f"averaging_period={self.averaging_period}"] if self.averaging_period else []
        arguments += [f"local_steps={self.local_steps}"] if self.local_steps > 1 else []
        arguments += ["overlap=True"] if self.overlap else []
        arguments += ['worker="node"'] if self.node else []
        if self.bucket_bytes != Settings.bucket_bytes:
            arguments.append(f"bucket_bytes={self.bucket_bytes}")
        return f"hvd_saef.DistributedOptimizer({', '.join(arguments)})"

    def payload(self, sizes: Sequence[int]) -> int:
        """Returns the bytes of one worker's payload for tensors of `sizes` elements."""
        return _payload(self.compressor, tuple(sizes))

    def bytes_sent(self, sizes: Sequence[int], workers: int) -> float:
        """Returns the bytes that a worker sends in a step, without protocol overhead.

        They are the mean over workers and steps.
        """
        return (self._sent(sizes, workers) + self._averaged(sizes, workers)) / self.local_steps

    def bytes_between_nodes(self, job: Job) -> float:
        """Returns the bytes that a node sends to others in a step. A ring enters and leaves a node once."""
        return self._between_nodes(job) / self.local_steps

    def features(self, job: Job) -> Work:
        """Returns the number of units of each feature in a step."""
        each_step, each_round = self.parts(job)
        return {name: each_step[name] + each_round[name] / self.local_steps for name in FEATURES}

    def parts(self, job: Job) -> tuple[Work, Work]:
        """Returns the units of each feature in every step, and those that the exchange of a round adds."""
        workers = job.workers // (job.ranks if self.node else 1)
        each_step, each_round = dict.fromkeys(FEATURES, 0.0), dict.fromkeys(FEATURES, 0.0)
        if self.node and job.ranks > 1:  # the node averages gradients before each local step
            _add(each_step, MEAN.work(job.parameters, 0))
            each_step["wire"] = 8 * 2 * (job.ranks - 1) / job.ranks * 4 * job.parameters / job.inside
            each_step["mean"] = math.ceil(4 * job.parameters / TOGETHER)
        if workers == 1:
            return each_step, each_round
        each_round["wire"] = 8 * self._between_nodes(job) / job.bandwidth
        if self.dense:
            rings = math.ceil(self.payload(job.sizes) / FUSED)
            _add(each_round, self.compressor.work(job.parameters, 0))
            _add(each_round, {"mean": rings, "latency": rings * 2 * (workers - 1)})
            return each_step, each_round
        # All workers agree before a local step and after it, each time by a tree.
        _add(each_step, {"fixed": 1, "latency": 2 * math.ceil(math.log2(workers))})
        _add(each_round, self._exchange(job, workers))
        return each_step, each_round

    def _exchange(self, job: Job, workers: int) -> Work:
        """Returns the units of a round's exchange of payloads, but for the wire."""
        size, shares = job.parameters, job.ranks if self.node else 1
        buckets = math.ceil(4 * size / self.bucket_bytes)
        collectives = buckets * (1 + self.double)
        # DC: a server decodes K payloads of 1/K of the model, and each worker all answers.
        # SC: each worker decodes K whole payloads.
        found = self.compressor.work(
            size * (1 + self.double / workers), (2 if self.double else workers) * size
        )
        _add(
            found,
            {
                "byte": self._sent(job.sizes, workers) / shares,
                "message": collectives * (workers - 1),
                "collective": collectives * (2 if shares > 1 else 1),  # the node puts its slices together
                "land": size,
            },
        )
        if self.averaging_period:  # bucket by bucket: Horovod must not fuse errors
            _add(found, MEAN.work(size / self.averaging_period, 0))
            rings = buckets / self.averaging_period
            _add(found, {"mean": rings, "latency": rings * 2 * (workers - 1)})
        return found

    def _sent(self, sizes: Sequence[int], workers: int) -> float:
        if self.dense or self.double:
            return 2 * (workers - 1) / workers * self.payload(sizes)
        return (workers - 1) * self.payload(sizes)

    def _averaged(self, sizes: Sequence[int], workers: int) -> float:
        period = self.averaging_period
        return 2 * (workers - 1) / workers * 4 * sum(sizes) / period if period else 0.0

    def _between_nodes(self, job: Job) -> float:
        nodes = job.workers // job.ranks
        if self.node:
            return self._sent(job.sizes, nodes) + self._averaged(job.sizes, nodes)
        if nodes == 1:
            return 0.0
        averaged = self._averaged(job.sizes, job.workers)
        if self.dense:
            return self._sent(job.sizes, job.workers) + averaged
        outside = job.ranks * (job.workers - job.ranks) / (job.workers - 1)
        return self._sent(job.sizes, job.workers) * outside + averaged


@lru_cache
def _payload(compressor: Compressor, sizes: tuple[int, ...]) -> int:
    return compressor.payload_bytes(Blocks.cut(list(sizes), None, torch.float32))


def _add(found: Work, more: Mapping[str, float]) -> None:
    for name, units in more.items():
        found[name] = found.get(name, 0.0) + units


def seconds(features: Mapping[str, float], constants: Constants) -> float:
    """Returns the seconds that the features take, by the model, if nothing runs behind backward."""
    return float(sum(number * constants.seconds[name] for name, number in features.items()))


def predict(method: Method, job: Job, constants: Constants) -> float:
    """Returns the seconds of a step, by the model. With local steps it is the mean over a round."""
    each_step, each_round = (seconds(part, constants) for part in method.parts(job))
    share = constants.hidden if method.overlap else 0.0

    def seen(exchange: float) -> float:
        return exchange - min(share * exchange, BACKWARD * job.compute)

    others = (method.local_steps - 1) * seen(each_step)
    return job.compute + (others + seen(each_step + each_round)) / method.local_steps


def _methods(considered: Considered) -> list[Method]:
    """Returns the methods of one setting: with each of its averaging periods, and without averaging."""
    plain = Method(considered.title, considered.compressor, considered.double_compression)
    if plain.dense:
        return [dataclasses.replace(plain, overlap=True)]
    return [
        *(
            dataclasses.replace(plain, name=f"{plain.name}, p = {period}", averaging_period=period)
            for period in considered.averaging_periods
        ),
        plain,
    ]


METHODS = tuple(
    method
    for compressor in BUILT_IN
    for considered in compressor.considered()
    for method in _methods(considered)
)
"""All methods, from the least lossy to the most."""
UNCOMPRESSED = METHODS[0]
MEAN = UNCOMPRESSED.compressor
"""The compressor of the allreduces that average the gradients on a node, and the errors."""


def methods(job: Job, local_steps: int = 1, overlap: bool = False) -> list[Method]:
    """Returns the methods for `job`, from the least lossy to the most.

    This library's have `local_steps` and `overlap`. With several ranks on a node, each of them comes first
    with nodes as workers, then with ranks as workers.
    """
    found = []
    for method in METHODS:
        if method.dense:
            found.append(method)
            continue
        asked = dataclasses.replace(method, local_steps=local_steps, overlap=overlap)
        if job.ranks > 1:
            found.append(dataclasses.replace(asked, name=f"{method.name}, node", node=True))
        found.append(asked)
    return found


def recommend(job: Job, constants: Constants, local_steps: int = 1, overlap: bool = False) -> Method:
    """Returns the least lossy method whose predicted step is within 5 % of the fastest."""
    times = {method: predict(method, job, constants) for method in methods(job, local_steps, overlap)}
    return next(method for method in times if times[method] <= CLOSE * min(times.values()))


SLOWEST, FASTEST = 6.0, 12.0
"""The powers of ten of the bits a second between which :func:`stops_paying` looks."""


def stops_paying(job: Job, constants: Constants, choice: Sequence[Method]) -> tuple[float, str]:
    """Returns the bandwidth from which no compressed method gains 5 % on float32, and the last that did.

    The bandwidth is in bits a second: 0 if none gains at 1 Mbit/s, infinity if one still does at 1 Tbit/s.
    """
    compressed = [method for method in choice if not method.dense]

    def best(power: float) -> tuple[float, str]:
        there = dataclasses.replace(job, bandwidth=10**power)
        time, name = min((predict(method, there, constants), method.name) for method in compressed)
        return predict(UNCOMPRESSED, there, constants) / time, name

    low, high = SLOWEST, FASTEST
    if best(low)[0] < CLOSE:
        return 0.0, "-"
    if best(high)[0] >= CLOSE:
        return math.inf, best(high)[1]
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle)[0] >= CLOSE else (low, middle)
    return 10**low, best(low)[1]
