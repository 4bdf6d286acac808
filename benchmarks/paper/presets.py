"""What is trained, as named frozen objects: the paper's experiments (Section 5) and small ones like them.

Where the paper does not say: weight decay is 5e-4 on CIFAR and 1e-4 on ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi
from pathlib import Path

from torch import nn

from benchmarks.paper import data
from benchmarks.paper.methods import Method, parse
from benchmarks.paper.networks import Decoder, digits_network, resnet50, resnet_cifar


@dataclass(frozen=True)
class Task:
    """A model, its data and its schedule: all but the method."""

    name: str
    load: Callable[[Path | None], data.Data]
    """From the folder or file that the user names, if it needs one."""
    network: Callable[[int], nn.Module]
    """From the number of classes."""
    epochs: int
    workers: int = 4
    batch: int = 128
    """Over all workers."""
    rate: float = 0.1
    cuts: tuple[int, ...] = ()
    """Epochs after which the rate is cut to a tenth."""
    warmup: int = 0
    """First steps, in which the rate rises."""
    cosine: bool = False
    """After the warm-up the rate falls along a cosine to zero at the end."""
    weight_decay: float = 5e-4
    evaluated: int | None = None
    """The training loss is that of so many first training examples; None: of all."""
    diagnose_every: int = 13
    """Rounds between two measurements of the gradient mismatch."""

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in step `step` of an epoch's `steps`, from the first on."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.cosine:
            after = max(0, step - self.warmup) / max(1, self.epochs * steps - self.warmup)
            return rise * (1 + cos(pi * after)) / 2
        return float(rise * 0.1 ** sum(step >= cut * steps for cut in self.cuts))


@dataclass(frozen=True)
class Piece:
    """One run: what can be resumed, and skipped when it is finished."""

    task: Task
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task.name}, {self.method.name}, seed {self.seed}"

    def file(self, folder: Path) -> Path:
        """Where its CSV is."""
        method = self.method.name.replace(" ", "-").replace("=", "").replace("%", "")
        return folder / self.task.name / f"{method}-seed{self.seed}.csv"


@dataclass(frozen=True)
class Group:
    """Methods that are compared on one task."""

    task: Task
    methods: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Preset:
    """A named set of runs."""

    name: str
    about: str
    groups: tuple[Group, ...]

    def pieces(self) -> Iterator[Piece]:
        """All runs: the first seed of every group, then the second, and so on."""
        for seed in range(max(group.seeds for group in self.groups)):
            for group in self.groups:
                if seed < group.seeds:
                    for method in group.methods:
                        yield Piece(group.task, parse(method), seed)


def folder_of(path: Path | None, what: str) -> Path:
    """The path that the user named, or an error that says what it should be."""
    if path is None:
        raise ValueError(f"name the data with --data: {what}.")
    return path


def _cifar(classes: int, path: Path | None) -> data.Data:
    return data.cifar(folder_of(path, f"the folder with CIFAR-{classes}'s binary files"), classes)


def _imagenet(path: Path | None) -> data.Data:
    return data.image_folder(folder_of(path, "the folder with train/<class>/ and val/<class>/"))


def _cifar_jpegs(path: Path | None) -> data.Data:
    return data.jpegs(folder_of(path, "an .npz with a subset of CIFAR-10 as JPEGs"))


def _mnist(path: Path | None) -> data.Data:
    return data.mnist()


def _source(path: Path | None) -> data.Data:
    return data.library_source(context=128, windows=3200)


def _decoder(width: int, classes: int) -> nn.Module:
    return Decoder(classes, context=128, width=width, layers=4, heads=width // 32)


SIGN_MOMENTUM = ("SGDM", "EF-SignSGDM-DC", "SAEF-SignSGDM-DC")
SINGLE_WAY = ("EF-SignSGDM-SC", "SAEF-SignSGDM-SC")
PLAIN = ("SGD", "EF-SignSGD-DC", "SAEF-SignSGD-DC", "EF-SignSGD-SC", "SAEF-SignSGD-SC")
BETA = ("SAEF-SignSGDM-DC beta=1", "SAEF-SignSGDM-DC p=16 beta=1")
EF_PERIODS = tuple(f"EF-SignSGDM-DC p={p}" for p in (4, 16, 64))
SAEF_PERIODS = tuple(f"SAEF-SignSGDM-DC p={p}" for p in (4, 16, 64))
SPARSE = ("SGDM", "EF-SGDM-DC-TopK1%", "SAEF-SGDM-DC-TopK1%")
SPARSE_AVERAGED = "SAEF-SGDM-DC-TopK1% p=16"
SAME_BUDGET = "SAEF-SGDM-DC-TopK0.5% p=128"
"""With 8 workers: averaging every 128 rounds sends what Top-K 0.5 % saves against 1 %, within 3 %."""

CIFAR100 = Task("resnet56", partial(_cifar, 100), partial(resnet_cifar, 56), epochs=200, cuts=(100, 150))
CIFAR100_PLAIN = replace(CIFAR100, name="resnet56-plain", epochs=150, cuts=(100,))
CIFAR100_EIGHT = replace(CIFAR100, name="resnet56-8", workers=8)
IMAGENET = Task(
    "resnet50", _imagenet, resnet50, epochs=90, batch=256, cuts=(30, 60), weight_decay=1e-4, evaluated=50_000
)
IMAGENET = replace(IMAGENET, diagnose_every=100)
IMAGENET_EIGHT = replace(IMAGENET, name="resnet50-8", workers=8)

RESNET8 = Task("resnet8", _cifar_jpegs, partial(resnet_cifar, 8), epochs=12, cuts=(6, 9), evaluated=2000)
RESNET8_PLAIN = replace(RESNET8, name="resnet8-plain", cuts=(8,))
RESNET8_EIGHT = replace(RESNET8, name="resnet8-8", workers=8)
DECODER = Task(
    "decoder",
    _source,
    partial(_decoder, 128),
    epochs=4,
    batch=32,
    rate=8e-3,
    warmup=50,
    cosine=True,
    weight_decay=0.1,
    evaluated=128,
)
LARGER_DECODER = replace(DECODER, name="decoder-3M", network=partial(_decoder, 256), epochs=12)
DIGITS = Task("digits", _mnist, digits_network, epochs=3, rate=0.05, cuts=(2,), evaluated=1000)

ADAM = (
    "AdamW",
    "SAEF-SignAdamW-DC beta=1",
    "Local-AdamW",
    "EF-SignAdamW-DC",
    "SAEF-SignAdamW-DC",
    "SAEF-SignAdamW-DC beta=1 rate=2",
    "AdamW rate=0.5",
    "Local-AdamW rate=2",
    "SAEF-AdamW-DC-TopK1%",
    "EF-AdamW-DC-TopK1%",
    "SAEF-SignAdamW-DC beta=1 H=4",
    "SAEF-SignAdamW-DC beta=1 H=16",
    "Local-AdamW H=4",
    "Local-AdamW H=16",
    "AdamW rate=2",
    "SAEF-SignAdamW-DC beta=1 rate=4",
    "SAEF-SignAdamW-DC beta=1 rate=0.5",
    "GradientEF-SignAdamW-SC",
    "GradientEF-SignAdamW-SC rate=0.25",
)
"""With rates around the task's: what suits full precision need not suit the others."""

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cifar100",
            "Figures 1 and 3: ResNet-56 on CIFAR-100, 4 and 8 workers, 5 runs of each method",
            (
                Group(CIFAR100, (*SIGN_MOMENTUM, *SINGLE_WAY, *EF_PERIODS, *SAEF_PERIODS, *BETA), 5),
                Group(CIFAR100_PLAIN, PLAIN, 5),
                Group(CIFAR100_EIGHT, SPARSE, 5),
            ),
        ),
        Preset(
            "imagenet",
            "Figure 2: ResNet-50 on ImageNet, 4 and 8 workers, error averaging at the same budget",
            (
                Group(IMAGENET, (*SIGN_MOMENTUM, SAEF_PERIODS[1], *SPARSE[1:], SAME_BUDGET), 1),
                Group(IMAGENET_EIGHT, (*SPARSE, SAME_BUDGET), 1),
            ),
        ),
        Preset(
            "small",
            "all of it with ResNet-8 on a subset of CIFAR-10, and a decoder with AdamW; 3 seeds",
            (
                Group(RESNET8, (*SIGN_MOMENTUM, *SINGLE_WAY, *EF_PERIODS, *SAEF_PERIODS, *BETA), 3),
                Group(RESNET8_EIGHT, (*SPARSE, SPARSE_AVERAGED, SAME_BUDGET), 3),
                Group(RESNET8_PLAIN, PLAIN, 3),
                Group(DECODER, ADAM, 3),
            ),
        ),
        Preset("transformer", "a decoder of 3.3 M parameters, AdamW", (Group(LARGER_DECODER, ADAM, 3),)),
        Preset(
            "digits",
            "a minute, to see whether everything runs: MNIST",
            (Group(DIGITS, (*SIGN_MOMENTUM, BETA[0]), 2),),
        ),
    )
}
