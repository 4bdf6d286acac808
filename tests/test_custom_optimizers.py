"""Optimizers that users wrote, and those of torch.optim that cannot be wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression
from tests.workers import NO_MODEL, Run, batch, bits, caught, everything, network, saved, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

IDENTITY: dict[str, Any] = {"compression": Compression.none}


class Cooling(torch.optim.Optimizer):
    """Gradient descent that slows down by counting its own steps, and needs to be told how fast."""

    def __init__(self, params: Iterable[Tensor], rate: float, *, cooling: float) -> None:
        super().__init__(params, {"rate": rate})
        self.cooling = cooling
        self.calls = 0
        self.history: list[float] = []
        self.largest = None if cooling > 0 else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Each step by less; attributes are set anew, and changed in place."""
        loss = None if closure is None else closure()
        self.calls += 1
        for group in self.param_groups:
            rate = group["rate"] / (1 + self.cooling * self.calls)
            self.history.append(rate)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
                    self.largest = max(self.largest or 0.0, float(parameter.grad.abs().max()))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and the count."""
        return super().state_dict() | {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        state_dict = dict(state_dict)
        self.calls = state_dict.pop("calls")
        super().load_state_dict(state_dict)


def cooling(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With what its constructor requires."""
    return Cooling(parameters, 0.2, cooling=0.5)


def by_hand(steps: int, factor: float = 0.5) -> list[nn.Parameter]:
    """What Cooling does on one worker, from torch's own SGD with rates that are set."""

    def fn(rank: int) -> list[nn.Parameter]:
        run = Run(rank, sgd_plain, dtype=torch.float64, **IDENTITY)
        for step in range(1, steps + 1):
            run.optimizer.param_groups[0]["lr"] = 0.2 / (1 + factor * step)
            run.step()
        return run.parameters

    return together(1, fn)[0]


def sgd_plain(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Without momentum."""
    return torch.optim.SGD(parameters, lr=0.2)


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_users_optimizer_steps_as_it_does(workers: int) -> None:
    """With worker 0's gradients on all, so that the mean of the updates is the one worker's."""

    def fn(rank: int) -> tuple[list[nn.Parameter], dict[str, bytes]]:
        run = Run(0, cooling, dtype=torch.float64, **IDENTITY).step(6)
        assert isinstance(run.optimizer, Cooling)
        return run.parameters, bits(run.x())

    results = together(workers, fn)
    assert_close(results[0][0], by_hand(6))
    assert all(x == results[0][1] for _, x in results)


@pytest.mark.parametrize("workers", [1, 2])
def test_attributes_that_step_changes_are_seen(workers: int) -> None:
    """The wrapped optimizer is the given one: what its step() leaves in attributes is there to read."""

    def fn(rank: int) -> None:
        run = Run(rank, cooling, **IDENTITY).step(3)
        assert len(run.optimizer.history) == 3
        assert run.optimizer.calls == 3
        assert run.optimizer.largest is not None

    together(workers, fn)


def test_attributes_that_are_set_have_effect() -> None:
    def fn(rank: int) -> list[nn.Parameter]:
        run = Run(rank, cooling, dtype=torch.float64, **IDENTITY)
        run.optimizer.cooling = 2.0
        return run.step(4).parameters

    assert_close(together(1, fn)[0], by_hand(4, factor=2.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_state_dict_of_ones_own(workers: int) -> None:
    """Saved through the wrapped optimizer and loaded into another one, training goes on as if not."""

    def fn(rank: int) -> None:
        run = Run(rank, cooling, dtype=torch.float64).step(3)
        state = saved(run.optimizer.state_dict())
        assert state["calls"] == 3
        other = Run(rank, cooling, dtype=torch.float64)
        other.taken = run.taken
        other.optimizer.load_state_dict(state)
        assert other.optimizer.calls == 3
        assert everything(other.step(3)) == everything(run.step(3))

    together(workers, fn)


class Averaging(torch.optim.SGD):
    """An optimizer that has modes of its own, as schedule-free ones do."""

    def train(self) -> None:
        """Somewhere."""

    def eval(self) -> None:
        """Elsewhere."""


class ScheduleFree(torch.optim.Optimizer):
    """As schedule-free ones do it: gradients at y, evaluation at their mean, which z leads."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self._training, self._steps = True, 0

    def _go(self, training: bool) -> None:
        if training is not self._training:
            for group in self.param_groups:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
            self._training = training

    def train(self) -> None:
        """To y."""
        self._go(True)

    def eval(self) -> None:
        """To the mean."""
        self._go(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of z, and of the mean after it."""
        if not self._training:
            raise RuntimeError("not in train mode")
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                mean = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(mean.lerp_(z, 1 / self._steps).lerp_(z, 1 - group["beta"]))
        return None


@pytest.mark.parametrize("make", [lambda p: Averaging(p, lr=0.1), lambda p: ScheduleFree(p, lr=0.1)])
@pytest.mark.parametrize("workers", [1, 2])
def test_modes_of_ones_own_are_refused(make: Callable[[list[nn.Parameter]], Any], workers: int) -> None:
    """What such an optimizer computes from state of each worker's own would be no x, in silence."""
    for error in caught(workers, lambda rank: Run(rank, make)):
        assert isinstance(error, TypeError)
        assert "it has train() and eval() of its own" in str(error)
        assert "a schedule of its rate" in str(error)


class SecondOrder(torch.optim.SGD):
    """Differentiates the gradients in its step, as AdaHessian does: no parameter may move before that."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step along the sum of the gradient and of the Hessian's product with ones."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        ones = [torch.ones_like(p) for p in parameters]
        for p, product in zip(parameters, torch.autograd.grad(gradients, parameters, ones), strict=True):
            p.grad = p.grad.detach() + product
        return super().step(closure)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_may_differentiate_gradients(workers: int, evaluates: bool) -> None:
    """In the first step and after an evaluation, too: x is where the parameters are, so none is written."""

    def fn(rank: int) -> dict[str, bytes]:
        model = network(torch.float64)
        optimizer = SecondOrder(model.parameters(), lr=0.01)
        wrapped = hvd_saef.DistributedOptimizer(optimizer, model.named_parameters(), model=model)
        for step in range(3):
            if evaluates:
                model.eval()(batch(rank, step, torch.float64))
                model.train()
            if step == 2:
                wrapped.reanchor()
            wrapped.zero_grad()
            model(batch(rank, step, torch.float64)).square().mean().backward(create_graph=True)
            wrapped.step()
        return bits(dict(model.state_dict()))

    assert len({tuple(x.values()) for x in together(workers, fn)}) == 1


def test_accelerates_optimizer_is_refused() -> None:
    """It has a train() and an eval() too, but passes calls on: the remedy is another order."""
    passes_on = type("AcceleratedOptimizer", (Averaging,), {"__module__": "accelerate.optimizer"})

    for error in caught(2, lambda rank: Run(rank, lambda parameters: passes_on(parameters, lr=0.1))):
        assert isinstance(error, TypeError)
        assert "what that returns to accelerator.prepare()" in str(error)


class Counting(torch.optim.SGD):
    """Has a method that is called as one of ours is."""

    def flush(self) -> None:
        """Something else."""


def test_names_of_ours_are_refused() -> None:
    """Both of a class's methods and of what an instance has."""

    def noting(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        vars(optimizer)["stats"] = {}
        return optimizer

    makes = {"flush": lambda p: Counting(p, lr=0.1), "stats": noting}
    for name, make in makes.items():
        (error,) = caught(1, lambda rank, make=make: Run(rank, make))  # type: ignore[misc]
        assert isinstance(error, TypeError)
        assert f"it has {name!r}, which is a method of" in str(error)


@pytest.mark.parametrize("workers", [1, 2])
def test_methods_of_ones_own_do_not_hide_ours(workers: int) -> None:
    """Either such an optimizer is refused, or eval() still is x: never silently something else."""

    def fn(rank: int) -> None:
        try:
            run = Run(rank, lambda p: Averaging(p, lr=0.1))
        except (TypeError, ValueError) as refusal:
            if "train" in str(refusal) or "eval" in str(refusal):
                return
            raise
        run.step(3)
        with run.optimizer.consensus():
            assert bits(run.parameters) == bits(run.x())
        run.optimizer.eval()
        assert bits(run.parameters) == bits(run.x())

    together(workers, fn)


# -- of torch.optim -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_lbfgs_is_refused(workers: int) -> None:
    for error in caught(workers, lambda rank: Run(rank, lambda p: torch.optim.LBFGS(p))):
        assert isinstance(error, TypeError)
        assert "LBFGS" in str(error)
        assert "closure" in str(error)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_sparse_adam_refuses_dense_gradients_as_ever(workers: int) -> None:
    """In its own words, on all workers, and nothing has changed."""

    def fn(rank: int) -> None:
        run = Run(rank, lambda p: torch.optim.SparseAdam(p))
        before = bits(run.parameters)
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            run.step()
        assert bits(run.parameters) == before
        assert run.optimizer.stats()["rounds"] == 0

    together(workers, fn)


class Stumbling(torch.optim.SGD):
    """An optimizer whose step can fail, as one that runs out of memory."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, or none."""
        if self.param_groups[0].get("fails"):
            raise MemoryError("no memory for momentum")
        return super().step(closure)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_local_step_that_fails_on_one_worker_ends_all(workers: int, steps: int) -> None:
    """Nobody waits for ever."""

    def fn(rank: int) -> None:
        run = Run(rank, lambda p: Stumbling(p, lr=0.1)).step(steps)
        run.optimizer.param_groups[0]["fails"] = rank == workers - 1
        run.step()

    with pytest.raises(MemoryError, match="no memory for momentum"):
        together(workers, fn)
