"""The constants of the model of a step's time. They belong to a device and a network. Local; no MPI.

Constants come from three places: `plan.json`, fitted by `benchmarks/scaling.py` on steps that were measured
on processors; :func:`of_gpus`, estimated; and files that `hvd-saef calibrate` writes on a user's own ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from hvd_saef.compression import BUILT_IN

GENERAL = ("wire", "byte", "message", "collective", "latency", "mean", "fixed", "land")
"""The features that do not belong to a compressor:

- wire: the seconds that the sent bytes take at the bandwidth; the constant is 1 if the wire is always full;
- byte: the bytes of payloads that a worker sends; the constant is the processor's time for each;
- message: the payloads' messages; those of one collective leave together, so each costs its sending alone;
- collective: the collectives of payloads; the constant is what one costs however little it carries;
- latency: the messages that wait for one another: the steps of a ring, the levels of an agreement's tree;
- mean: the allreduces; the constant is what one costs beside its ring's steps and its bytes;
- fixed: 1 for a step of this library with several workers, for the agreement of all workers in it;
- land: the elements of x, e and the parameters over which a worker passes when the answers arrive.
"""
FEATURES = (*GENERAL, *(cost for compressor in BUILT_IN for cost in compressor.costs))
"""The features of a step's time: the general ones, and the `costs` of each compressor."""
SHARES = "a number from 0 to 1 is allowed: the share of an exchange that runs behind backward"
RATES = "a number above 0, in bits a second, or null is allowed"


def is_number(value: object) -> bool:
    """Returns True for a finite number; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Constants:
    """The seconds that one unit of each feature takes; `wire` is a factor, since its feature is in seconds.

    Raises ValueError if a feature is missing or unknown, or anything has a value that is not allowed.
    """

    seconds: Mapping[str, float]
    """The seconds, by feature."""
    source: str = ""
    """The measurements, in words."""
    hidden: float = 0.0
    """The share of an exchange that runs behind a long backward, where it may: in [0, 1]."""
    device: str = ""
    """What encodes and decodes, in words."""
    network: str = ""
    """What carries the bytes, in words."""
    estimated: Collection[str] = ()
    """The features that were not measured, and "hidden" if that was not."""
    bandwidth: float | None = None
    """The bits a second that a node was seen to send to other nodes, or None."""
    inside: float | None = None
    """The bits a second that a rank was seen to send to the other ranks of its node, or None."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """On what and when they were measured, for people who find the file later."""

    def __post_init__(self) -> None:
        for name in (*self.seconds, *FEATURES):  # an unknown name tells more than a missing one
            value = self.seconds.get(name)
            if name not in FEATURES or not is_number(value) or float(value or 0) < 0:
                raise ValueError(
                    f"{name}={value!r}: a number >= 0 is allowed, for each of {', '.join(FEATURES)}."
                )
        if not is_number(self.hidden) or not 0 <= self.hidden <= 1:
            raise ValueError(f"hidden={self.hidden!r}: {SHARES}.")
        for name in ("bandwidth", "inside"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name}={value!r}: {RATES}.")
        strange = [name for name in self.estimated if name not in (*FEATURES, "hidden")]
        if strange:
            raise ValueError(
                f"estimated={strange!r}: names of {', '.join((*FEATURES, 'hidden'))} are allowed."
            )
        object.__setattr__(self, "estimated", tuple(self.estimated))

    def save(self, path: Path) -> None:
        """Writes the constants to `path` as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        """Returns the constants in the file `path`; without a path, those of processors in the package.

        Raises ValueError if the file does not hold constants, OSError if it cannot be read.
        """
        file = path or resources.files("hvd_saef.planning") / "plan.json"
        try:
            return cls._of(json.loads(file.read_text()))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{file}: no constants of the model: {error}") from None

    @classmethod
    def _of(cls, found: object) -> Constants:
        known = {one.name: one for one in dataclasses.fields(cls)}
        kinds = {
            "seconds": dict,
            "made": dict,
            "estimated": list,
            "source": str,
            "device": str,
            "network": str,
        }
        if not isinstance(found, dict) or "seconds" not in found:
            raise ValueError(
                "'seconds' is missing. `hvd-saef calibrate` and benchmarks/scaling.py write such files"
            )
        for name, value in found.items():
            if name not in known:
                raise ValueError(f"{name}={value!r}: not one of {', '.join(known)}")
            if not isinstance(value, kinds.get(name, object)):
                raise ValueError(f"{name}={value!r}: a JSON {kinds[name].__name__} is allowed")
        return cls(**found)


# -- what was estimated -------------------------------------------------------------------------------

ETHERNET = {"message": 1e-5, "collective": 3e-4, "latency": 3e-5, "mean": 1e-3}
"""Constants that few hosts on one machine do not tell, ESTIMATED for TCP between hosts of one room.

A message costs a system call and its copy, a latency is half of a round trip, a collective wakes sleeping
threads twice, and a mean waits for Horovod's cycle of a millisecond.
"""
MEMORY = 1.5e12
"""The bytes a second that a pass over a GPU's memory reaches, assumed; an A100 has 2e12, an H100 3.3e12."""
BUS = 25e9
"""The bytes a second between the GPU and page-locked host memory, through which payloads travel."""
OPERATIONS = 2e12
"""The bits of payloads that a GPU is assumed to decode in a second, for sign."""
FLOAT = 4
"""The bytes of x, e and parameters, each."""


def of_gpus() -> Constants:
    """Returns constants of jobs with one GPU a rank, ESTIMATED from the bytes that each step must move.

    No GPU has run any of it. A pass is counted in numbers of 4 bytes for each parameter. Sign's encoding
    reads x, e and the parameter, and writes e. Top-K's writes the update and reads it four times more.
    Landing reads x and e and writes both and the parameter; the look at gradients reads them. An allreduce
    reads and writes twice. Payloads cross to host memory and back twice, on the way up and down. A step
    starts kernels and agrees within a millisecond. The network is that of ETHERNET.
    """
    passes = {"sign_encode": 4, "topk_encode": 8, "land": 6, "float32": 4, "float16": 4}
    staged = {"sign_encode": 4 / 8, "topk_encode": 4 * 0.01 * 6}
    seconds = {name: FLOAT * count / MEMORY + staged.get(name, 0.0) / BUS for name, count in passes.items()}
    seconds |= {"sign_decode": 1 / OPERATIONS, "topk_decode": 64 / MEMORY}  # a sector read, one written
    seconds |= {"wire": 1.1, "byte": 0.0, "fixed": 1e-3} | ETHERNET
    return Constants(
        {name: seconds[name] for name in FEATURES if name in seconds},
        source=f"ESTIMATED from {MEMORY / 1e12:g} TB/s of memory and {BUS / 1e9:g} GB/s to the host",
        hidden=0.75,
        device="GPUs, one a rank",
        network="TCP between hosts of one room",
        estimated=(*FEATURES, "hidden"),
    )


OF_DEVICES = {"cpu": Constants.load, "gpu": of_gpus}
"""Where the package's constants of each kind of device come from."""
