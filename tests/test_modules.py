"""Modules that need something else than others: embeddings that write in forward, rows without updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hvd_saef
from hvd_saef import Compression
from tests.workers import bits, caught, together, warned

ROWS, WIDTH = 6, 4


class Words(nn.Module):
    """An embedding, and a layer after it that may share its weight."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(ROWS, WIDTH, **options)
        self.out = nn.Linear(WIDTH, ROWS, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if self.words.padding_idx is not None:
                self.words.weight[self.words.padding_idx] = 0
        if tied:
            self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """[n] words to [n, ROWS] numbers."""
        outputs: Tensor = self.out(self.words(words))
        return outputs


def wrap(model: nn.Module, given: bool = True, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return hvd_saef.DistributedOptimizer(
        optimizer, model.named_parameters(), model=model if given else None, **options
    )


def step(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
    """One step, on other words on each rank."""
    optimizer.zero_grad()
    words = torch.tensor([1 + (rank + number) % 2, 3 + rank % 2])
    model(words).square().sum().backward()
    optimizer.step()


# -- embeddings that write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [lambda: nn.Embedding(3, 2, max_norm=1.0), lambda: nn.EmbeddingBag(3, 2, max_norm=1.0)],
    ids=["Embedding", "EmbeddingBag"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_max_norm_is_refused(module: Callable[[], nn.Module], inside: bool) -> None:
    def fn(rank: int) -> None:
        made = module()
        model = nn.Sequential(nn.Sequential(made)) if inside else made
        words = f"model='{'0.0' if inside else type(made).__name__}' is a .* with max_norm=1.0"
        with pytest.raises(ValueError, match=words + ".*Pass max_norm=None"):
            wrap(model)
        made.requires_grad_(False)
        head = nn.Linear(2, 1)
        hvd_saef.DistributedOptimizer(torch.optim.SGD(head.parameters()), model=[model, head])

    together(1, fn)


@pytest.mark.filterwarnings("ignore:parameters are stepped ahead")
def test_the_first_step_says_what_may_have_written() -> None:
    def fn(rank: int) -> None:
        model = Words(max_norm=0.5)
        step(model, wrap(model, given=False), rank, 0)

    for failure in caught(2, fn):
        assert "x differs between workers in 'words.weight'" in str(failure)
        assert "nn.Embedding(max_norm=...) does so in its forward pass" in str(failure)


class MaxNorm(nn.Module):
    """The parametrization in docs/horovod.md."""

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.max_norm = max_norm

    def forward(self, weight: Tensor) -> Tensor:
        """Rows of at most this norm."""
        norms: Tensor = weight.norm(dim=1, keepdim=True)
        return weight * (self.max_norm / norms.clamp(min=self.max_norm))


def test_a_parametrization_does_the_same_without_writing() -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], float]:
        model = Words()
        parametrize.register_parametrization(model.words, "weight", MaxNorm(0.5))
        optimizer = wrap(model, check_consensus_every=1)
        for number in range(4):
            step(model, optimizer, rank, number)
        model.eval()
        with torch.no_grad():
            outputs = model(torch.arange(ROWS))
            return bits(outputs), float(model.words.weight.norm(dim=1).max())

    (one, norm), (other, _) = together(2, fn)
    assert one == other
    assert norm <= 0.5 * (1 + 1e-6)


# -- rows without updates -----------------------------------------------------------------------------

SAID = "has rows that get no update"
CASES: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("padding", {"padding_idx": 0}, {}, True),
    ("sparse", {"sparse": True}, {}, True),
    ("blocks that are not rows", {"padding_idx": 0}, {"block_size": 3}, True),
    ("blocks of two rows", {"padding_idx": 0}, {"block_size": 2 * WIDTH}, True),
    ("no such rows", {}, {}, False),
    ("rows", {"padding_idx": 0}, {"block_size": WIDTH}, False),
    ("half rows", {"padding_idx": 0}, {"block_size": WIDTH // 2}, False),
    ("Top-K", {"padding_idx": 0}, {"compression": Compression.topk(0.1)}, False),
    ("none", {"padding_idx": 0}, {"compression": Compression.none}, False),
    ("dense below", {"padding_idx": 0}, {"dense_below": ROWS * WIDTH + 1}, False),
    ("tied", {"padding_idx": 0, "tied": True}, {}, False),
    (
        "chosen",
        {"padding_idx": 0},
        {"compression": lambda name, _: Compression.none if "words" in name else Compression.sign},
        False,
    ),
]


@pytest.mark.parametrize(
    ("module", "options", "said"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_rows_without_updates(module: dict[str, Any], options: dict[str, Any], said: bool) -> None:
    found = [
        (rank, text)
        for rank, text in warned(2, lambda rank: wrap(Words(**module), **options))
        if SAID in text
    ]
    assert [rank for rank, _ in found] == [0] * said
    for _, text in found:
        assert text.startswith("'words.weight' of Embedding(")
        assert f"block_size={WIDTH}" in text


def test_a_frozen_embedding_is_left_alone() -> None:
    def fn(rank: int) -> None:
        model = Words(padding_idx=0)
        model.words.requires_grad_(False)
        wrap(model)

    assert not [text for _, text in warned(1, fn) if SAID in text]


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, True),
        ({"block_size": WIDTH}, False),
        ({"compression": Compression.topk(0.1)}, False),
        ({"compression": Compression.none}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings(f"ignore:.*{SAID}")
def test_what_the_warning_is_about(options: dict[str, Any], moved: bool) -> None:
    def fn(rank: int) -> bool:
        model = Words(padding_idx=0)
        optimizer = wrap(model, **options)
        for number in range(3):
            step(model, optimizer, rank, number)
        with optimizer.consensus():
            return bool(model.words.weight[0].any())

    assert together(2, fn) == [moved, moved]
