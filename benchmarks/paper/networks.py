"""ResNets as the paper's (He et al. 2016), and a small decoder-only transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is subsampled and padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] → [N, outputs, H/stride, W/stride]."""
        changed = self.second(functional.relu(self.first(images)))
        if self.stride > 1 or self.missing:
            images = images[:, :, :: self.stride, :: self.stride]
            before = self.missing // 2
            images = functional.pad(images, (0, 0, 0, 0, before, self.missing - before))
        return functional.relu(images + changed)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            _convolution(inputs, width, 1),
            nn.ReLU(),
            _convolution(width, width, 3, stride),
            nn.ReLU(),
            _convolution(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] → [N, 4·width, H/stride, W/stride]."""
        changed: Tensor = self.body(images)
        return functional.relu(self.shortcut(images) + changed)


def resnet_cifar(depth: int, classes: int) -> nn.Module:
    """ResNet-`depth` (6n + 2) for 32x32 images, widths 16, 32, 64: [N, 3, 32, 32] → [N, classes]."""
    if depth % 6 != 2:
        raise ValueError(f"depth={depth}: 6n + 2 is allowed (8, 20, 56, ...).")
    parts: list[nn.Module] = [_convolution(3, 16, 3), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for block in range(depth // 6):
            parts.append(BasicBlock(inputs, width, 2 if block == 0 and width > 16 else 1))
            inputs = width
    return _classifier(parts, 64, classes)


def resnet50(classes: int) -> nn.Module:
    """ResNet-50 for images of 224x224: [N, 3, H, W] → [N, classes]."""
    parts: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            parts.append(Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return _classifier(parts, 2048, classes)


def digits_network(classes: int) -> nn.Module:
    """Three 3x3 convolutions for 28x28 grey images: [N, 1, 28, 28] → [N, classes]."""
    parts: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 16), (16, 32)):
        parts += [_convolution(inputs, outputs, 3, 2), nn.ReLU()]
    return _classifier(parts, 32, classes)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def _classifier(parts: list[nn.Module], features: int, classes: int) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


class DecoderLayer(nn.Module):
    """Causal self-attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, width] → [N, T, width]."""
        n, length, width = tokens.shape
        parts = self.query_key_value(self.attention_norm(tokens)).view(n, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.mixed(seen.transpose(1, 2).reshape(n, length, width))
        changed: Tensor = self.mlp(self.mlp_norm(tokens))
        return tokens + changed


class Decoder(nn.Module):
    """A decoder-only language model with learned positions: [N, T] int64 → logits [N, T, words]."""

    def __init__(self, words: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(DecoderLayer(width, heads) for _ in range(layers)))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of each next token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.logits(self.norm(self.layers(self.words(tokens) + self.positions(places))))
        return logits
