"""Data of the paper's experiments: original formats, the errors that say what is missing, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import data


def write_cifar100(folder: Path, train: int = 256, test: int = 40) -> None:
    """Random images in the original binary format: coarse label, fine label, 3072 pixels."""
    generator = np.random.default_rng(0)
    for name, count in (("train.bin", train), ("test.bin", test)):
        records = generator.integers(0, 256, (count, 3074), np.uint8)
        records[:, 0] %= 20
        records[:, 1] %= 100
        (folder / name).write_bytes(records.tobytes())


def test_cifar_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Get https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar"):
        data.cifar(tmp_path, 100)
    write_cifar100(tmp_path)
    sets = data.cifar(tmp_path, 100)
    content = np.fromfile(tmp_path / "test.bin", np.uint8).reshape(-1, 3074)
    images, labels = sets.test.batch([3, 5], None)
    assert labels.tolist() == content[[3, 5], 1].tolist()  # the fine one
    assert isinstance(sets.test, data.Images)
    pixels = (images * sets.test.deviation + sets.test.mean) * 255
    expected = torch.tensor(content[[3, 5], 2:].reshape(2, 3, 32, 32), dtype=torch.float32)
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)
    whole, _ = sets.train.batch(range(256), None)
    assert whole.mean((0, 2, 3)).abs().max() < 1e-5
    assert (whole.std((0, 2, 3)) - 1).abs().max() < 1e-5
    (tmp_path / "test.bin").write_bytes(b"x" * 3000)
    with pytest.raises(ValueError, match=r"test.bin has 3000 bytes"):
        data.cifar(tmp_path, 100)


def test_cifar10_labels(tmp_path: Path) -> None:
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (tmp_path / name).write_bytes(bytes([7, *([1] * 3072)]))
    sets = data.cifar(tmp_path, 10)
    assert len(sets.train) == 5
    assert sets.train.batch([4], None)[1].tolist() == [7]


def test_augmentation() -> None:
    """Every image is a crop of itself padded, mirrored or not; the same again for the same seed and epoch."""
    images = torch.randint(1, 256, (6, 3, 32, 32), dtype=torch.uint8)
    split = data.Images(images, torch.arange(6), 6, torch.zeros(3), torch.full((3,), 1 / 255))
    split.augment(0, 3)
    drawn, labels = split.draw([1, 4, 1, 2])
    assert labels.tolist() == [1, 4, 1, 2]
    for image, number in zip(drawn, labels, strict=True):
        padded = torch.nn.functional.pad(images[number].float(), [4] * 4)
        crops = [
            padded[:, y : y + 32, x : x + 32].flip(turned)
            for y in range(9)
            for x in range(9)
            for turned in ((), (2,))
        ]
        assert any(torch.allclose(image, crop) for crop in crops)
    assert torch.equal(split.draw([1, 4, 1, 2])[0], drawn)
    split.augment(0, 4)
    assert not torch.equal(split.draw([1, 4, 1, 2])[0], drawn)


def test_source_text() -> None:
    sets = data.library_source(context=16, windows=50)
    inputs, targets = sets.train.batch([0, 49], torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert b"import" in bytes(sets.train.bytes.numpy())  # type: ignore[attr-defined]
