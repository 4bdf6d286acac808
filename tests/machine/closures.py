"""What closures do in the library; and in the model, which gives the name of what they should raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.machine.model import Reference
from tests.machine.net import LAYERS
from tests.machine.worker import Oops, Worker


def _trains(worker: Worker, training: bool, number: int) -> torch.Tensor:
    worker.net.zero_grad()
    worker.losses = []
    worker.forward(training, number)
    losses = [loss.detach() for loss in worker.losses]  # none where all layers are frozen
    worker.backward()
    return losses[-1] if losses else torch.zeros(())


def _plain(worker: Worker, optimizer: Any, number: int) -> torch.Tensor:
    return _trains(worker, True, number)


def _in_eval_mode(worker: Worker, optimizer: Any, number: int) -> torch.Tensor:
    return _trains(worker, False, number)


def _evaluates_after(worker: Worker, optimizer: Any, number: int) -> torch.Tensor:
    loss = _trains(worker, True, number)
    worker.forward(False, number, grad=False)
    return loss


def _ends_in_eval(worker: Worker, optimizer: Any, number: int) -> torch.Tensor:
    loss = _trains(worker, True, number)
    optimizer.eval()
    return loss


def _raises(worker: Worker, optimizer: Any, number: int) -> torch.Tensor:
    _trains(worker, True, number)
    raise Oops("as asked")


def _trained(reference: Reference, rank: int, training: bool, number: int) -> None:
    reference.zero(rank)
    reference.losses[rank] = []
    reference.forward(rank, training, number, LAYERS, True)
    reference.backward(rank)


def _say_plain(reference: Reference, rank: int, number: int) -> str:
    _trained(reference, rank, True, number)
    return ""


def _say_in_eval_mode(reference: Reference, rank: int, number: int) -> str:
    _trained(reference, rank, False, number)
    return ""


def _say_evaluates_after(reference: Reference, rank: int, number: int) -> str:
    _trained(reference, rank, True, number)
    reference.forward(rank, False, number, LAYERS, False)
    return ""


def _say_ends_in_eval(reference: Reference, rank: int, number: int) -> str:
    _trained(reference, rank, True, number)
    return "RuntimeError"


def _say_raises(reference: Reference, rank: int, number: int) -> str:
    _trained(reference, rank, True, number)
    return "Oops"


CLOSURES: dict[str, tuple[Callable[[Worker, Any, int], Any], Callable[[Reference, int, int], str]]] = {
    "plain": (_plain, _say_plain),
    "in eval mode": (_in_eval_mode, _say_in_eval_mode),
    "evaluates after": (_evaluates_after, _say_evaluates_after),
    "ends in eval": (_ends_in_eval, _say_ends_in_eval),
    "raises": (_raises, _say_raises),
}
"""By kind, both."""
