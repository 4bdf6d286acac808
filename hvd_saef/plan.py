"""A model of a step's time, by method: what `hvd-saef plan` answers from. No workers, no MPI.

The model is linear: a step's time is the compute, plus for each feature of a method (bytes over the
bandwidth, messages, parameters that are encoded, payloads that are decoded) its number times a constant.
The constants are fitted on measured steps by `benchmarks/scaling.py`, which also shows how far off the
model is on those it was not fitted on. Of other machines, networks and numbers of workers it gives a
prediction, not a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from hvd_saef.compression import Blocks, Compression, Compressor
from hvd_saef.settings import Settings

CLOSE = 1.05
"""A method within 5 % of the fastest is as good as it, and the least lossy of those is recommended."""


@dataclass(frozen=True)
class Constants:
    """Seconds that each unit of a feature takes; `wire` is a factor, since its feature is in seconds."""

    wire: float
    """Of the bytes a worker sends over the bandwidth: 1 where the wire is full all the time."""
    byte: float
    """For each byte sent, whatever the bandwidth: what the network costs the processor."""
    message: float
    """For each message that a worker sends one after the other."""
    fixed: float
    """For each step with an exchange, however little it sends."""
    float32: float
    """For each parameter in Horovod's float32 ring allreduce."""
    float16: float
    """For each parameter in its fp16 one."""
    sign_encode: float
    """For each parameter encoded as a sign, by a worker or a server."""
    sign_decode: float
    """For each parameter of each sign payload decoded."""
    topk_encode: float
    """For each parameter that Top-K chooses from, by a worker or a server."""
    topk_decode: float
    """For each entry of each Top-K payload decoded."""
    source: str = ""
    """What they were fitted on."""

    def __post_init__(self) -> None:
        for name in FEATURES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: a number >= 0 is allowed.")

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        """Those of the file, or those that come with the package.

        Raises ValueError for a file that does not hold them, OSError for one that cannot be read.
        """
        text = (path or resources.files("hvd_saef") / "plan.json").read_text()
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: no constants of the model: {error}") from None


FEATURES = tuple(field.name for field in dataclasses.fields(Constants) if field.name != "source")


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    sizes: Sequence[int]
    """Elements of each parameter tensor."""
    workers: int
    bandwidth: float
    """Bits a second that a worker can send; infinity where only processors limit."""
    compute: float
    """Seconds of a step without any exchange."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Method:
    """A way to exchange: Horovod's ring allreduce, or one of this library's."""

    name: str
    wire: Literal["float32", "fp16", "sign", "topk"]
    ratio: float = 1.0
    """Of Top-K."""
    double: bool = True
    """Double-way compression with a sharded server; False is single-way."""
    averaging_period: int | None = None

    @property
    def dense(self) -> bool:
        """Whether it is Horovod's own."""
        return self.wire in ("float32", "fp16")

    @property
    def compressor(self) -> Compressor:
        """What it compresses with."""
        dense = {"float32": Compression.none, "fp16": Compression.fp16, "sign": Compression.sign}
        return dense.get(self.wire) or Compression.topk(self.ratio)

    @property
    def call(self) -> str:
        """How a user asks for it."""
        if self.dense:
            return "hvd.DistributedOptimizer" + ("(compression=hvd.Compression.fp16)" * (self.wire == "fp16"))
        arguments = [f"compression=hvd_saef.Compression.{self.wire}"]
        arguments[0] += f"({self.ratio:g})" if self.wire == "topk" else ""
        arguments += [] if self.double else ["double_compression=False"]
        arguments += [f"averaging_period={self.averaging_period}"] if self.averaging_period else []
        return f"hvd_saef.DistributedOptimizer({', '.join(arguments)})"

    def payload(self, sizes: Sequence[int]) -> int:
        """Bytes of one worker's update."""
        if self.wire == "sign":
            return sum(-(-size // 8) + 4 for size in sizes)
        if self.dense:
            return sum(sizes) * (4 if self.wire == "float32" else 2)
        return self.compressor.payload_bytes(Blocks.cut(list(sizes), None, torch.float32))

    def bytes_sent(self, sizes: Sequence[int], workers: int) -> float:
        """Bytes that a worker sends a step, the mean over workers and steps, without protocol overhead."""
        ring = 2 * (workers - 1) / workers
        if self.dense or self.double:
            sent = ring * self.payload(sizes)
        else:
            sent = (workers - 1) * self.payload(sizes)
        averaging = ring * 4 * sum(sizes) / self.averaging_period if self.averaging_period else 0.0
        return sent + averaging

    def features(self, job: Job) -> dict[str, float]:
        """How much of what each constant stands for is in a step."""
        workers, size = job.workers, job.parameters
        found = dict.fromkeys(FEATURES, 0.0)
        if workers == 1:
            return found
        found["byte"] = self.bytes_sent(job.sizes, workers)
        found["wire"] = 8 * found["byte"] / job.bandwidth
        found["fixed"] = 1.0
        if self.dense:
            found[self.wire.replace("fp", "float")] = size
            found["message"] = 2 * (workers - 1)
            return found
        decoded = (2 if self.double else workers) * size  # the server's K payloads of 1/K, and the answers
        found[f"{self.wire}_encode"] = size * (1 + self.double / workers)
        found[f"{self.wire}_decode"] = decoded * (self.ratio if self.wire == "topk" else 1)
        buckets = math.ceil(4 * size / Settings.bucket_bytes)
        found["message"] = buckets * (workers - 1) * (1 + self.double) + 2 * math.ceil(math.log2(workers))
        if self.averaging_period:
            found["float32"] = size / self.averaging_period
            found["message"] += 2 * (workers - 1) / self.averaging_period
        return found


def seconds(features: Mapping[str, float], constants: Constants) -> float:
    """What the features take by the model."""
    return float(sum(number * getattr(constants, name) for name, number in features.items()))


def predict(method: Method, job: Job, constants: Constants) -> float:
    """Seconds of a step, by the model."""
    return job.compute + seconds(method.features(job), constants)


def _with_averaging(method: Method, period: int = 16) -> Method:
    return dataclasses.replace(method, name=f"{method.name}, p = {period}", averaging_period=period)


UNCOMPRESSED = Method("Horovod float32", "float32")
_SIGN, _SINGLE = Method("sign DC", "sign"), Method("sign SC", "sign", double=False)
_TOPK, _TOPK_SMALL = Method("Top-K 1 %", "topk", 0.01), Method("Top-K 0.1 %", "topk", 0.001)
METHODS = (
    UNCOMPRESSED,
    Method("Horovod fp16", "fp16"),
    *(_with_averaging(_SINGLE), _SINGLE, _with_averaging(_SIGN), _with_averaging(_SIGN, 64), _SIGN),
    *(_with_averaging(_TOPK), _with_averaging(_TOPK, 64), _TOPK),
    *(_with_averaging(_TOPK_SMALL), _with_averaging(_TOPK_SMALL, 64), _TOPK_SMALL),
)
"""From the least lossy to the most."""


def recommend(job: Job, constants: Constants) -> Method:
    """The least lossy method whose predicted step is within 5 % of the fastest."""
    times = {method: predict(method, job, constants) for method in METHODS}
    return next(method for method in METHODS if times[method] <= CLOSE * min(times.values()))
