"""Workers as threads for tests of what users hold: small runs, what each worker raised or warned of."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

import hvd_saef
from hvd_saef import run_workers
from tests import without
from tests.problems import curved_valley, start_point

T = TypeVar("T")
DEADLINE = without.LIMIT
NO_MODEL = "ignore:parameters are stepped ahead:UserWarning"
"""The advice to pass model=, for `pytest.mark.filterwarnings`."""


def together(workers: int, fn: Callable[[int], T], ranks: int = 1) -> list[T]:
    """`run_workers`, but workers that hang fail the test instead of hanging it."""
    results: list[list[T]] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(run_workers(workers, fn, ranks=ranks))
        except BaseException as failure:
            failures.append(failure)

    caller = threading.Thread(target=call, daemon=True)  # the workers that it starts are daemons as well
    caller.start()
    caller.join(without.patience(DEADLINE))
    assert not caller.is_alive(), "the workers hang"
    if failures:
        raise failures[0]
    return results[0]


def caught(workers: int, fn: Callable[[int], Any], ranks: int = 1) -> list[Exception]:
    """What each worker raised, in rank order; all must raise."""

    def attempt(rank: int) -> Exception | None:
        try:
            fn(rank)
        except Exception as failure:
            return failure
        return None

    raised = together(workers, attempt, ranks)
    failures = [failure for failure in raised if failure is not None]
    assert len(failures) == len(raised), f"some workers raised nothing: {raised}"
    return failures


def warned(workers: int, fn: Callable[[int], Any], ranks: int = 1) -> list[tuple[int, str]]:
    """(rank, message) of every warning that the ranks of the workers gave."""
    whose: dict[int, int] = {}
    seen: list[tuple[int, str]] = []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        seen.append((whose[threading.get_ident()], str(message)))

    def work(rank: int) -> None:
        whose[threading.get_ident()] = rank
        fn(rank)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        together(workers, work, ranks)
    return seen


class Run:
    """One worker's parameters and wrapped optimizer, and steps on tests.problems' curved valley."""

    def __init__(
        self,
        rank: int,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.rank, self.taken = rank, 0
        self.parameters = [nn.Parameter(torch.tensor(a, dtype=dtype)) for a in start_point(seed)]
        self.inner = (make or sgd)(self.parameters)
        self.optimizer = hvd_saef.DistributedOptimizer(self.inner, **options)

    def set_gradients(self) -> None:
        """Give the parameters their gradients of the coming step, where the parameters are."""
        at = [p.detach().double().numpy().copy() for p in self.parameters]
        for p, slope in zip(self.parameters, curved_valley(self.rank, self.taken, at), strict=True):
            p.grad = None if slope is None else torch.tensor(slope, dtype=p.dtype)

    def step(self, times: int = 1) -> Self:
        """Some steps."""
        for _ in range(times):
            self.set_gradients()
            self.optimizer.step()
            self.taken += 1
        return self

    def ours(self, key: str) -> Any:
        """What the state dict holds under "hvd_saef" and `key`."""
        return self.optimizer.state_dict()["hvd_saef"][key]

    def x(self) -> list[Tensor]:
        """The consensus point, a tensor a parameter."""
        return list(self.ours("x").values())


class Job:
    """One worker's model of three inputs, its wrapped optimizer, and steps on data of its own."""

    def __init__(
        self,
        rank: int,
        model: nn.Module,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.rank, self.taken, self.model = rank, 0, model
        draw(model, seed)
        self.inner = (make or adamw)(list(model.parameters()))
        self.optimizer: Any = hvd_saef.DistributedOptimizer(
            self.inner, model.named_parameters(), model=model, **options
        )

    def step(self, times: int = 1) -> Self:
        """Some steps."""
        self.model.train()
        for _ in range(times):
            generator = torch.Generator().manual_seed(100 * self.taken + self.rank)
            self.model.zero_grad()
            self.model(torch.randn(6, 3, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.taken += 1
        return self

    def seen(self) -> dict[str, bytes]:
        """The bits of the model's state dict, which is x."""
        return bits(dict(self.model.state_dict()))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, lr=0.02)


def bits(value: Any, at: str = "") -> dict[str, bytes]:
    """Every leaf of nested dicts, lists and tensors by its path: equal only if equal to the bit."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()  # one number is, whatever its stride
        raw = held.as_strided((held.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
        return {at: f"{value.dtype} {tuple(value.shape)} ".encode() + raw}
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(key), item) for key, item in enumerate(value)]
    else:
        return {at: repr(value).encode()}
    return {path: leaf for key, item in items for path, leaf in bits(item, f"{at}/{key}").items()}


def everything(run: Run) -> dict[str, bytes]:
    """The bits of a run's parameters and state dict."""
    return bits({"parameters": run.parameters, "state": run.optimizer.state_dict()})


def saved(state: Any) -> Any:
    """Through a file that may hold nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small model, the same for equal seeds."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    draw(model, seed)
    return model


def draw(model: nn.Module, seed: int) -> None:
    """The same parameters for equal seeds, whatever other threads draw."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One worker's inputs for `network`."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 4, generator=generator).to(dtype)


def train(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    """One step on a batch, forward and backward as users write them."""
    inputs = batch(rank, step, next(model.parameters()).dtype)
    optimizer.zero_grad()
    ((model(inputs) - inputs[:, :2].cos()) ** 2).mean().backward()
    optimizer.step()


def through_torch_save(model: nn.Module) -> nn.Module:
    """A model as a file would have it."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded
