"""Real models, for real forward and backward passes: ResNet-50, and a GPT of GPT-2 small's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.pieces import Place


class Convolution(nn.Sequential):
    """A convolution without bias, and its norm."""

    def __init__(self, inputs: int, out: int, kernel: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, out, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, which has one where shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.one = Convolution(inputs, width, 1)
        self.two = Convolution(width, width, 3, stride)
        self.three = Convolution(width, 4 * width, 1)
        self.shortcut = Convolution(inputs, 4 * width, 1, stride) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width]."""
        y = functional.relu(self.two(functional.relu(self.one(x))))
        return functional.relu(self.three(y) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50, its parameters in the order of `benchmarks.models.resnet50`."""

    def __init__(self, width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.stem = Convolution(3, width, 7, 2)
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(inputs, width << stage, stride, first=block == 0))
                inputs = 4 * (width << stage)
        self.layers, self.classes = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, height, width] to scores."""
        x = functional.max_pool2d(functional.relu(self.stem(images)), 3, 2, 1)
        scores: Tensor = self.classes(self.layers(x).mean((2, 3)))
        return scores


class Block(nn.Module):
    """Attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_heads, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, words, width] to the same shape."""
        parts = self.to_heads(self.norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        queries, keys, values = parts.unbind(2)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return out


class GPT(nn.Module):
    """GPT-2 small: 124.4 M parameters. The embedding and the last layer share their weight."""

    def __init__(
        self, words: int = 50257, context: int = 1024, width: int = 768, layers: int = 12, heads: int = 12
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, seen: Tensor) -> Tensor:
        """[batch, words] to the scores of each next word."""
        places = torch.arange(seen.shape[1], device=seen.device)
        return functional.linear(self.blocks(self.words(seen) + self.places(places)), self.words.weight)


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on, in bfloat16 by autocast."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[Place, torch.Generator], tuple[Tensor, Tensor]]
    """Inputs and targets on the device."""
    optimizer: Callable[[Any], torch.optim.Optimizer]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            scores = model(inputs)
            return functional.cross_entropy(scores.flatten(0, -2).float(), targets.flatten())


def images(rows: int, side: int, classes: int) -> Any:
    """Random images and classes."""

    def batch(place: Place, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (rows, 3, side, side)
        pictures = torch.randn(shape, generator=generator).to(place.device)
        targets = torch.randint(classes, (rows,), generator=generator).to(place.device)
        return pictures.to(memory_format=torch.channels_last), targets

    return batch


def text(rows: int, words: int, length: int) -> Any:
    """Random words."""

    def batch(place: Place, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(words, (rows, length + 1), generator=generator).to(place.device)
        return drawn[:, :-1], drawn[:, 1:]

    return batch


def momentum(parameters: Any) -> torch.optim.Optimizer:
    """What ResNets are trained with."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """What GPTs are trained with."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def tasks(place: Place) -> list[Task]:
    """What is trained on this device."""
    if place.tiny:
        return [
            Task("resnet50", lambda: ResNet(4, (1, 1), 10), images(2, 16, 10), momentum),
            Task("gpt2", lambda: GPT(32, 8, 16, 1, 2), text(2, 32, 8), adamw),
        ]
    return [
        Task("resnet50", channels_last, images(64, 224, 1000), momentum),
        Task("gpt2", GPT, text(8, 50257, 1024), adamw),
    ]


def channels_last() -> nn.Module:
    """As convolutions in bfloat16 are trained."""
    return ResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
