"""Adam's second moments from the mean gradient, once in a while, and kept between: the same on all workers.

A worker's own gradient has K times the noise of the workers' mean. Where noise dominates, its second
moments are K times those of the mean, and the mean of the workers' updates is √K times smaller than
Adam's on the mean gradient. Here they are the mean gradient's: every p rounds (and in each of the first p)
v takes in g², g the mean gradient, and is kept in between, as in 0/1 Adam (Lu et al. 2022), but under any
compressor and feedback. With p = 1 and no compression it is Adam on the mean gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.communicator import Communicator
from hvd_saef.layout import Layout
from hvd_saef.statistics import Statistics, ring_bytes

MOMENT = "exp_avg_sq"
ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)  # AdamW is an Adam


def has_second_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is an Adam of torch's, or one that has shown the same state."""
    like_adam = any(MOMENT in state for state in optimizer.state.values())
    return isinstance(optimizer, ADAMS) or (
        like_adam and all("betas" in group for group in optimizer.param_groups)
    )


class SecondMoments:
    """The second moments of one optimizer: its local steps go between `before` and `after`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        period: int,
        communicator: Communicator,
        statistics: Statistics,
    ) -> None:
        self._optimizer, self._period = optimizer, period
        self._communicator, self._statistics = communicator, statistics
        self._kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def before(self, layout: Layout, rounds: int, local_steps_done: int, local_steps: int) -> None:
        """Have the coming local step divide by the right v. Collective."""
        due = local_steps_done == 0 and (rounds < self._period or rounds % self._period == 0)
        # v has taken in as much of its past as the count of steps, which undoes its bias, says.
        elapsed = local_steps * (1 if rounds <= self._period else self._period) if rounds else 1
        means = self._mean_gradients(layout) if due else {}
        betas = {p: group["betas"][1] for group in self._optimizer.param_groups for p in group["params"]}
        for slot in layout.slots:
            parameter, beta = slot.parameter, betas[slot.parameter]
            v = self._optimizer.state.get(parameter, {}).get(MOMENT)
            if due:
                v = torch.zeros_like(parameter) if v is None else v
                v = beta**elapsed * v + (1 - beta**elapsed) * means[parameter].square()
            if v is not None:
                self._kept[parameter] = v.clone()
                self._prepare(parameter, v, beta)

    def _prepare(self, parameter: Tensor, v: Tensor, beta: float) -> None:
        """Leave in the state what the step's β₂·v + (1-β₂)·g² will make v of.

        Or, where that is more, (1-β₂)·g²/K: what is rare, and was not there when v last took in a
        gradient, must not be divided by nothing.
        """
        state = self._optimizer.state.get(parameter, {})
        if MOMENT in state and parameter.grad is not None:
            own = (1 - beta) * parameter.grad.to_dense().square()
            wanted = torch.maximum(v, own / self._communicator.workers)
            state[MOMENT].copy_((wanted - own) / beta)

    @torch.no_grad()
    def after(self) -> None:
        """Forget what the local step made of v. Local."""
        for parameter, v in self._kept.items():
            if MOMENT in self._optimizer.state.get(parameter, {}):
                self._optimizer.state[parameter][MOMENT].copy_(v)
        self._kept.clear()

    def _mean_gradients(self, layout: Layout) -> dict[Tensor, Tensor]:
        means: dict[Tensor, Tensor] = {}
        for bucket in layout.buckets:
            if not bucket.numel:
                continue
            flat = bucket.new_flat()
            for slot in bucket.slots:
                if slot.parameter.grad is not None:
                    slot.view(flat).copy_(slot.parameter.grad.to_dense())
            with self._statistics.phase("averaging"):
                self._communicator.allreduce_mean(flat, f"second_moments.{bucket.index}")
            self._statistics.averaging_bytes_sent += ring_bytes(self._communicator.workers, flat.nbytes)
            if self._communicator.workers > 1:
                passed_on = self._communicator.passed_on([flat.numel()]) * flat.itemsize
                self._statistics.node_bytes_sent += passed_on
            means |= {slot.parameter: slot.view(flat) for slot in bucket.slots}
        return means
