"""One rank of a program in the library, and what is seen of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.machine.net import LAYERS, NAMES, Net, Vec, start_values
from tests.machine.options import Options, make_optimizers


class Oops(Exception):  # noqa: N818
    """What a user's closure raises."""


@dataclass
class Record:
    """What was seen on one rank after one action."""

    raised: str = ""
    """The name of the exception's class."""
    message: str = ""
    values: Vec = field(default_factory=dict)
    """The parameters, wherever they are."""
    seen: list[Vec] = field(default_factory=list)
    """What the rank's looks saw, in the action."""
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What optimizers' state dicts hold of ours, where the action is to show that."""
    served: Any = None
    """By optimizer, the stretch of each parameter's s in its state dict, where the action saved them."""


class Board:
    """What all ranks have saved, for all to load."""

    def __init__(self, size: int) -> None:
        self.saves: list[list[dict[str, Any]]] = [[] for _ in range(size)]
        self.all_saved = threading.Barrier(size)


class Worker:
    """One rank's network and optimizers, and what its actions keep."""

    def __init__(self, options: Options, rank: int, folder: Path, board: Board) -> None:
        self.rank, self.folder, self.board = rank, folder, board
        self.seen: list[Vec] = []
        self.served: Any = None
        self.wrap(options)

    def wrap(self, options: Options) -> None:
        """A new network and new optimizers. Collective."""
        self.options = options
        self.net = Net(start_values(options.seed))
        self.optimizers = make_optimizers(options, self.net)
        self.named = dict(self.net.named_parameters())
        self.losses: list[Tensor] = []
        self.hooks: list[Any] = []

    def among(self, ranks: Collection[int] | None) -> bool:
        """Whether an action is for this rank."""
        return ranks is None or self.rank in ranks

    def values(self) -> Vec:
        """Copies of the parameters as they are."""
        return {name: self.named[name].detach().numpy().copy() for name in NAMES}

    def forward(self, training: bool, number: int, used: Collection[str] = LAYERS, grad: bool = True) -> None:
        """A forward pass; an evaluation sees the parameters."""
        self.net.train(training)
        with torch.set_grad_enabled(grad):
            loss = self.net.loss(self.rank, number, used)
        if not training:
            self.seen.append(self.values())
        if loss.requires_grad:
            self.losses.append(loss)

    def backward(self) -> None:
        """The backward passes of what waits."""
        losses, self.losses = self.losses, []
        try:
            for loss in losses:
                loss.backward()
        except RuntimeError:
            self.net.zero_grad()
            raise

    def look(self, how: str) -> None:
        """At the parameters at x."""
        LOOKS[how](self)
        if how != "copy":
            self.seen.append(self.values())

    def saved(self, rank: int | None = None) -> dict[str, Any]:
        """What a rank, or this one, has saved the last time that all did so."""
        mine = self.board.saves[self.rank]
        return self.board.saves[self.rank if rank is None else rank][len(mine) - 1] if mine else {}

    def pieces(self, number: int) -> dict[str, tuple[int, int]]:
        """The stretch of each parameter's s that an optimizer's state dict holds."""
        pieces = self.state(number).get("server_errors") or {}
        return {name: (p["start"], p["start"] + p["values"].numel()) for name, p in pieces.items()}

    def state(self, number: int) -> dict[str, Any]:
        """What the optimizer's state dict holds of ours, under the network's names."""
        optimizer = self.optimizers[number]
        ours: dict[str, Any] = copy.deepcopy(optimizer.state_dict()["hvd_saef"])
        for key in ("x", "errors", "server_errors", "reached"):
            if ours.get(key) is not None:
                ours[key] = {self.known_as(number, name): value for name, value in ours[key].items()}
        return ours

    def known_as(self, number: int, name: str) -> str:
        """The network's name for a parameter."""
        if not name.startswith("noname."):
            return name
        group, place = map(int, name.split(".")[1:])
        parameter = self.optimizers[number].param_groups[group]["params"][place]
        return next(name for name, other in self.named.items() if other is parameter)


def _evaluates(worker: Worker) -> None:
    training = worker.net.training
    worker.net.eval()
    with torch.no_grad():
        worker.net(torch.zeros(1, 2, dtype=torch.float64), LAYERS)
    worker.net.train(training)


def _copies(worker: Worker) -> None:
    other = copy.deepcopy(worker.net)
    worker.seen.append({name: p.detach().numpy().copy() for name, p in other.named_parameters()})


LOOKS: dict[str, Callable[[Worker], Any]] = {
    "state": lambda worker: worker.net.state_dict(),
    "layer": lambda worker: worker.net.second.state_dict(),
    "evaluate": _evaluates,
    "copy": _copies,
}
"""Ways in which a model's hooks bring the parameters to x."""
