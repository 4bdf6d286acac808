"""Steps that bypass the wrapped step(): Horovod's first one is undone, those of others are refused. Local."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_saef.round.session import Session


def undo_horovods_initial_step(wrapped: Any) -> None:
    """Registers step hooks that put back parameters which Horovod's initial step moves.

    On ranks without state, hvd.broadcast_optimizer_state takes a step of the wrapped optimizer with zero
    gradients, without the library's step(), and weight decay moves the parameters there.
    """
    before: list[tuple[Tensor, Tensor]] = []
    session: Session = wrapped._saef

    def remember(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not getattr(optimizer, "_in_step", True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before[:] = [(p, p.detach().clone()) for p in parameters if p.grad is not None]

    def put_back(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        if before:
            session.modes.note()
        before.clear()

    wrapped.register_step_pre_hook(remember)
    wrapped.register_step_post_hook(put_back)


def refuse_steps_past_ours(wrapped: Any) -> None:
    """Makes a step of an optimizer that the wrapped one holds raise RuntimeError outside the wrapped step().

    For example SAM's second_step() calls step() of SAM's base optimizer, and nothing would be exchanged.
    """
    ours = {p for group in wrapped.param_groups for p in group["params"]}
    name, within = type(wrapped).__name__, [False]

    def begin(*_: object) -> None:
        within[0] = True

    def end(*_: object) -> None:
        within[0] = False

    def refuse(held: torch.optim.Optimizer, *_: object) -> None:
        if not within[0]:
            raise RuntimeError(
                f"a step of the {type(held).__name__} that {name} holds, past {name}.step(): it would train "
                f"this rank alone. {wrap_the_held(held, name)}"
            )

    held = [value for value in vars(wrapped).values() if isinstance(value, torch.optim.Optimizer)]
    sharing = [one for one in held if any(p in ours for group in one.param_groups for p in group["params"])]
    if sharing:
        wrapped._held = sharing[0]
        wrapped.register_step_pre_hook(begin)
        wrapped.register_step_post_hook(end)
    for one in sharing:
        one.register_step_pre_hook(refuse)


def wrap_the_held(held: torch.optim.Optimizer, name: str) -> str:
    """Returns what to do about a `held` optimizer that the wrapped one, of class `name`, steps by itself."""
    return (
        f"Give the {type(held).__name__} that {name} holds to hvd_saef.DistributedOptimizer, and what that "
        f"returns to {name} (docs/horovod.md, SAM)."
    )
