"""What users do in a training loop: on a rank in the library (`do`), and what should come of it (`say`)."""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from tests.machine.closures import CLOSURES
from tests.machine.model import Reference, move
from tests.machine.net import LAYERS, of_layers
from tests.machine.options import Options, plain_repr
from tests.machine.worker import Worker

Ranks = tuple[int, ...] | None
"""Who does something; None is everyone."""
CLIP = 0.1


@dataclass(frozen=True, repr=False)
class Action:
    """One of them."""

    ranks: Ranks = None

    def __repr__(self) -> str:
        return plain_repr(self)

    @abstractmethod
    def do(self, worker: Worker) -> None:
        """Do it on one rank."""

    @abstractmethod
    def say(self, reference: Reference) -> None:
        """Do it in the model, for all ranks. Raises Refused for what should be refused."""

    def shows(self, number: int, parts: int) -> bool:
        """Whether to look at x, e and s of optimizer `number` afterwards."""
        return False


def whole_workers(options: Options, ranks: Ranks) -> Ranks:
    """For what all ranks of a node do alike; or all ranks, where gradients are averaged."""
    if ranks is None or options.averages_gradients:
        return None
    workers = {rank // options.ranks for rank in ranks}
    return tuple(rank for rank in range(options.size) if rank // options.ranks in workers)


@dataclass(frozen=True, repr=False)
class Forward(Action):
    """A forward pass in one of the model's modes."""

    number: int = 0
    training: bool = True
    grad: bool = True
    used: tuple[str, ...] = LAYERS

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            worker.forward(self.training, self.number, self.used, self.grad)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            reference.forward(rank, self.training, self.number, self.used, self.grad)


@dataclass(frozen=True, repr=False)
class Backward(Action):
    """The backward pass of what waits for one."""

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            worker.backward()

    def say(self, reference: Reference) -> None:
        refused = [rank for rank in reference.of(self.ranks) if reference.backward(rank)]
        if refused:
            reference.refuse(dict.fromkeys(refused, ("RuntimeError",)))


@dataclass(frozen=True, repr=False)
class Zero(Action):
    """zero_grad, of the model; and what waits for a backward pass is dropped."""

    to_none: bool = True

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            worker.losses = []
            worker.net.zero_grad(set_to_none=self.to_none)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            reference.losses[rank] = []
            reference.zero(rank, self.to_none)


@dataclass(frozen=True, repr=False)
class Step(Action):
    """step(), on all ranks. `closure` is what those of `ranks` pass, or "" for none; others a plain one."""

    part: int = 0
    closure: str = ""
    number: int = 0
    clips: bool = False
    """Whether by Horovod's recipe: synchronize(), clip, and step() without another synchronization."""

    def shows(self, number: int, parts: int) -> bool:
        return number == self._part(parts)

    def do(self, worker: Worker) -> None:
        optimizer = worker.optimizers[self._part(len(worker.optimizers))]
        try:
            if self.closure:
                kind = self.closure if worker.among(self.ranks) else "plain"
                optimizer.step(lambda: CLOSURES[kind][0](worker, optimizer, self.number))
            elif self.clips:
                optimizer.synchronize()
                for p in worker.net.parameters():
                    if p.grad is not None:
                        p.grad.clamp_(-CLIP, CLIP)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
        finally:
            if self.closure == "ends in eval":
                optimizer.train()

    def say(self, reference: Reference) -> None:
        number = self._part(len(reference.parts))
        part = reference.parts[number]
        reference.may_end(number)
        failed = {}
        if self.clips and not self.closure:
            self._clip(reference, number)
        for rank, seat in enumerate(part.seats):
            if seat.mode == "eval":
                failed[rank] = "RuntimeError"
                continue
            if seat.mode != "train":
                move(seat, "leave")
                reference.stale(rank)
            if self.closure:
                kind = self.closure if rank in reference.of(self.ranks) else "plain"
                raised = CLOSURES[kind][1](reference, rank, self.number)
                if raised:
                    failed[rank] = raised
                move(seat, "leave")
        try:
            reference.step(number, failed, synchronized=self.clips and not self.closure)
        finally:
            if self.closure == "ends in eval":
                for seat in part.seats:
                    move(seat, "train")

    def _part(self, parts: int) -> int:
        return self.part % parts

    def _clip(self, reference: Reference, number: int) -> None:
        if reference.options.averages_gradients or reference.options.ranks > 1:
            reference.agree(number, {})
            reference.average_gradients(reference.parts[number].seats[0].names)
        for gradients in reference.gradients:
            for name, gradient in gradients.items():
                gradients[name] = None if gradient is None else np.clip(gradient, -CLIP, CLIP)


@dataclass(frozen=True, repr=False)
class Look(Action):
    """At the model, which shows x."""

    how: str = "state"

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            worker.look(self.how)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            reference.look(rank)


@dataclass(frozen=True, repr=False)
class Mode(Action):
    """optimizer.train(), optimizer.eval(), or `with optimizer.consensus():` and a look within."""

    part: int | None = None
    to: str = "eval"

    def do(self, worker: Worker) -> None:
        if not worker.among(self.ranks):
            return
        chosen = [o for i, o in enumerate(worker.optimizers) if self._is_for(i, len(worker.optimizers))]
        if self.to != "consensus":
            for optimizer in chosen:
                getattr(optimizer, self.to)()
            return
        with contextlib.ExitStack() as stack:
            for optimizer in chosen:
                stack.enter_context(optimizer.consensus())
            worker.seen.append(worker.values())

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            seats = [s for i, s in enumerate(reference.seats(rank)) if self._is_for(i, len(reference.parts))]
            before = [seat.mode for seat in seats]
            for seat in seats:
                move(seat, "eval" if self.to == "consensus" else self.to)
            reference.stale(rank)
            if self.to == "consensus":
                # Others' parameters may be stepped in the background, or have been left at x by a hook.
                unknown = reference.moving(rank) | reference.open(rank)
                unknown -= {name for seat in seats for name in seat.names}
                shown = reference.shown(rank)
                reference.seen[rank].append({name: shown[name] for name in shown if name not in unknown})
                for seat, mode in zip(seats, before, strict=True):
                    move(seat, "eval" if mode == "eval" else "train")

    def _is_for(self, number: int, parts: int) -> bool:
        return self.part is None or number == self.part % parts


@dataclass(frozen=True, repr=False)
class Rate(Action):
    """Another learning rate in all groups."""

    lr: float = 0.1

    def do(self, worker: Worker) -> None:
        if worker.among(whole_workers(worker.options, self.ranks)):
            for optimizer in worker.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr

    def say(self, reference: Reference) -> None:
        for rank in reference.of(whole_workers(reference.options, self.ranks)):
            reference.changed[rank] |= reference.under_way[rank]
            for seat in reference.seats(rank):
                seat.lr = self.lr


@dataclass(frozen=True, repr=False)
class Spoil(Action):
    """A NaN in a gradient, if there is one."""

    name: str = "first.weight"

    def do(self, worker: Worker) -> None:
        gradient = worker.named[self.name].grad
        if worker.among(self.ranks) and gradient is not None:
            gradient.view(-1)[0] = torch.nan

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            gradient = reference.gradients[rank][self.name]
            if gradient is not None:
                gradient = gradient.copy()
                gradient.reshape(-1)[0] = np.nan
                reference.gradients[rank][self.name] = gradient


@dataclass(frozen=True, repr=False)
class Hook(Action):
    """A step hook of torch's that looks at the model; or, with how="", none any more."""

    when: str = "pre"
    how: str = "state"

    def do(self, worker: Worker) -> None:
        if not worker.among(self.ranks):
            return
        if not self.how:
            for handle in worker.hooks:
                handle.remove()
            worker.hooks = []
            return
        for optimizer in worker.optimizers:
            register = getattr(optimizer, f"register_step_{self.when}_hook")
            worker.hooks.append(register(lambda *_: worker.look(self.how)))

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            reference.hooks[rank] = [*reference.hooks[rank], self.when] if self.how else []


@dataclass(frozen=True, repr=False)
class Clamp(Action):
    """Weights are clipped by hand where training is, as some losses want it."""

    most: float = 0.5

    def do(self, worker: Worker) -> None:
        if worker.among(whole_workers(worker.options, self.ranks)):
            for optimizer in worker.optimizers:
                optimizer.train()
            with torch.no_grad():
                for name in of_layers(("first", "second")):
                    worker.named[name].clamp_(-self.most, self.most)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(whole_workers(reference.options, self.ranks)):
            reference.move(rank, "train")
            for seat in reference.seats(rank):
                there = [name for name in of_layers(("first", "second")) if name in seat.names]
                seat.moved_by_hand({n: np.clip(seat.point[n], -self.most, self.most) for n in there})
                if reference.options.averages_gradients:
                    seat.x = copy.deepcopy(seat.point)


@dataclass(frozen=True, repr=False)
class Freeze(Action):
    """requires_grad of a layer."""

    layer: str = "second"
    requires: bool = False

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            worker.named[f"{self.layer}.weight"].requires_grad_(self.requires)
            worker.named[f"{self.layer}.bias"].requires_grad_(self.requires)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            reference.requires[rank] |= dict.fromkeys(of_layers([self.layer]), self.requires)
