"""Looking at x in the middle of a step: the update arrives whoever looks, with what, on whichever ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hvd_saef
from hvd_saef import WorkerError
from tests.workers import NO_MODEL, batch, bits, caught, network, sgd, together, warned

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the model was in eval mode"),
    pytest.mark.filterwarnings("ignore:.*step hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

STEPS = 6


class Case:
    """One rank's model and optimizer, and a way to take a step while somebody looks."""

    def __init__(self, rank: int, model_given: bool = True, **options: Any) -> None:
        self.rank, self.model = rank, network(torch.float64)
        given: dict[str, Any] = {"model": self.model} if model_given else {}
        self.inner = sgd(list(self.model.parameters()))
        named = self.model.named_parameters()
        self.optimizer: Any = hvd_saef.DistributedOptimizer(self.inner, named, **given, **options)
        self.given = model_given
        self.at = 0

    def look(self) -> None:
        """As an evaluation does, which goes on training afterwards."""
        if self.given:
            with torch.no_grad():
                self.model.eval()(batch(9, 9, torch.float64))
            self.model.state_dict()
            self.model.train()
        else:
            with self.optimizer.consensus():
                self.model(batch(9, 9, torch.float64))

    def backward(self) -> Tensor:
        """Gradients of this rank's next batch."""
        self.optimizer.zero_grad()
        inputs = batch(self.rank, self.at, torch.float64)
        loss: Tensor = ((self.model(inputs) - inputs[:, :2].cos()) ** 2).mean()
        loss.backward()
        return loss


def plainly(case: Case, look: bool) -> None:
    case.backward()
    if look:
        case.look()
    case.optimizer.step()


def in_a_closure(case: Case, look: bool) -> None:
    def closure() -> Tensor:
        loss = case.backward()
        if look:
            case.look()
        return loss

    case.optimizer.step(closure)


def before_backward_in_a_closure(case: Case, look: bool) -> None:
    def closure() -> Tensor:
        if look:
            case.look()
        if not case.given:
            case.optimizer.train()
        return case.backward()

    case.optimizer.step(closure)


def by_hooks(case: Case, look: bool) -> None:
    """Of this optimizer's steps, of all optimizers', before and after."""

    def see(optimizer: object, args: object, kwargs: object) -> None:
        if look and isinstance(optimizer, type(case.inner)) and owner(optimizer) is case.model[0].weight:
            case.look()

    def owner(optimizer: Any) -> Any:
        return optimizer.param_groups[0]["params"][0]

    handles = [
        register_optimizer_step_pre_hook(see),
        register_optimizer_step_post_hook(see),
        case.optimizer.register_step_pre_hook(see),
        case.optimizer.register_step_post_hook(see),
    ]
    case.backward()
    case.optimizer.step()
    for handle in handles:
        handle.remove()


def by_a_hook_that_stays(case: Case, look: bool) -> None:
    """A moving average of the weights, say, with every step."""

    def see(optimizer: object, args: object, kwargs: object) -> None:
        if case.given:
            case.model.state_dict()
        else:
            case.look()

    if look and case.at == 0:
        case.optimizer.register_step_pre_hook(see)
        case.inner.register_step_post_hook(see)
    case.backward()
    case.optimizer.step()


HOWS: list[Callable[[Case, bool], None]] = [
    plainly,
    in_a_closure,
    before_backward_in_a_closure,
    by_hooks,
    by_a_hook_that_stays,
]


def run(how: Callable[[Case, bool], None], rank: int, look: bool, **options: Any) -> dict[str, bytes]:
    case = Case(rank, **options)
    for case.at in range(STEPS):
        how(case, look)
    case.optimizer.train()
    return bits([case.optimizer.state_dict(), list(case.model.parameters())])


def same(
    how: Callable[[Case, bool], None], who: set[int], workers: int = 2, ranks: int = 1, **options: Any
) -> None:
    """Those in `who` look, or nobody: all the same."""
    looked = together(workers, lambda rank: run(how, rank, rank in who, **options), ranks)
    assert looked == together(workers, lambda rank: run(how, rank, False, **options), ranks)
    assert looked[0]["/0/hvd_saef/rounds"] == str(STEPS // options.get("local_steps", 1)).encode()


@pytest.mark.parametrize("who", [{0, 1}, {1}])
@pytest.mark.parametrize("local_steps", [1, 2, 3])
@pytest.mark.parametrize("model_given", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_the_update_arrives(
    how: Callable[[Case, bool], None], model_given: bool, local_steps: int, who: set[int]
) -> None:
    same(how, who, local_steps=local_steps, model_given=model_given)


@pytest.mark.parametrize("options", [{"feedback": "ef"}, {"feedback": "none"}, {"step_ahead": 0.5}], ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_with_other_feedback(how: Callable[[Case, bool], None], options: dict[str, Any]) -> None:
    same(how, {1}, **options)


@pytest.mark.parametrize("local_steps", [1, 2])
@pytest.mark.parametrize("how", [how for how in HOWS if "closure" not in how.__name__])
def test_with_overlap(how: Callable[[Case, bool], None], local_steps: int) -> None:
    same(how, {1}, local_steps=local_steps, overlap=True, bucket_bytes=64)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("how", [plainly, by_hooks])
def test_with_nodes(how: Callable[[Case, bool], None], overlap: bool) -> None:
    same(how, {1, 2}, ranks=2, worker="node", overlap=overlap)


def trained_in_eval_mode(case: Case, look: bool) -> None:
    """As BatchNorm with fixed statistics is fine-tuned."""
    case.model.eval()
    in_a_closure(case, False)


@pytest.mark.parametrize("who", [{0, 1}, {1}])
@pytest.mark.parametrize("local_steps", [1, 2, 3])
def test_a_closure_in_eval_mode_trains(local_steps: int, who: set[int]) -> None:
    """With gradients at x, held against plain local SGD: nothing is compressed, so that x is b."""
    options: dict[str, Any] = {"compression": hvd_saef.Compression.none, "local_steps": local_steps}

    def fn(rank: int) -> list[Tensor]:
        case = Case(rank, **options)
        for case.at in range(STEPS):
            (trained_in_eval_mode if rank in who and local_steps == 1 else in_a_closure)(case, False)
        return list(case.optimizer.state_dict()["hvd_saef"]["x"].values())

    models = [network(torch.float64) for _ in range(2)]
    inners = [sgd(list(model.parameters())) for model in models]
    for step in range(STEPS):
        for rank, (model, inner) in enumerate(zip(models, inners, strict=True)):
            inner.zero_grad()
            inputs = batch(rank, step, torch.float64)
            ((model(inputs) - inputs[:, :2].cos()) ** 2).mean().backward()
            inner.step()
        if (step + 1) % local_steps == 0:
            with torch.no_grad():
                for pair in zip(*(model.parameters() for model in models), strict=True):
                    mean = (pair[0] + pair[1]) / 2
                    for parameter in pair:
                        parameter.copy_(mean)
    for mine, plain in zip(together(2, fn)[1], models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, plain.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("who", [{0, 1}, {1}])
@pytest.mark.parametrize("local_steps", [1, 2, 3])
def test_compressed_training_in_eval_mode_moves_x(local_steps: int, who: set[int]) -> None:
    """And towards smaller losses."""

    def fn(rank: int) -> list[float]:
        case = Case(rank, local_steps=local_steps)
        losses = []
        for _ in range(30):
            (trained_in_eval_mode if rank in who else in_a_closure)(case, False)
            with case.optimizer.consensus(), torch.no_grad():
                inputs = torch.cat([batch(k, 0, torch.float64) for k in range(2)])
                losses.append(float(((case.model(inputs) - inputs[:, :2].cos()) ** 2).mean()))
        return losses

    for losses in together(2, fn):
        assert min(losses) < losses[0] / 2


def test_gradients_at_x_in_a_closure_are_said_once_they_are() -> None:
    """Not for an evaluation with gradient mode on, which a closure has."""

    def fn(rank: int, how: Callable[[Case, bool], None]) -> None:
        case = Case(rank)
        for case.at in range(2):
            how(case, True)

    def evaluates(case: Case, look: bool) -> None:
        def closure() -> Tensor:
            loss = case.backward()
            case.model.eval()(batch(9, 9, torch.float64))
            case.model.train()
            return loss

        case.optimizer.step(closure)

    assert any("in eval mode" in text for _, text in warned(2, lambda rank: fn(rank, trained_in_eval_mode)))
    assert not any("in eval mode" in text for _, text in warned(2, lambda rank: fn(rank, evaluates)))


# -- what ends at x ---------------------------------------------------------------------------------------


def closure_that_stays(case: Case) -> None:
    def closure() -> Tensor:
        loss = case.backward()
        case.optimizer.eval()
        return loss

    case.optimizer.step(closure)


def pre_hook_that_stays(case: Case) -> None:
    case.optimizer.register_step_pre_hook(lambda *_: case.optimizer.eval())
    case.backward()
    case.optimizer.step()


def post_hook_that_stays(case: Case) -> None:
    case.inner.register_step_post_hook(lambda *_: case.optimizer.eval())
    case.backward()
    case.optimizer.step()


@pytest.mark.parametrize("who", [{0, 1}, {1}])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("how", [closure_that_stays, pre_hook_that_stays, post_hook_that_stays])
def test_who_ends_a_closure_or_hook_with_eval_is_told(
    how: Callable[[Case], None], first: int, who: set[int]
) -> None:
    def fn(rank: int) -> None:
        case = Case(rank)
        for case.at in range(first):
            plainly(case, False)
        (how if rank in who else lambda case: plainly(case, False))(case)

    for rank, error in enumerate(caught(2, fn)):
        assert isinstance(error, RuntimeError)
        assert isinstance(error, WorkerError) is (rank not in who)
        assert "that ended with optimizer.eval()" in str(error)
        assert "optimizer.train()" in str(error)


class Evaluating(torch.optim.SGD):
    """An optimizer whose own step looks at the model before it moves it."""

    look: Callable[[], Any]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Look, then step."""
        self.look()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad)


def test_a_step_that_moves_parameters_at_x_is_told() -> None:
    def fn(rank: int) -> None:
        model = network()
        inner = Evaluating(model.parameters(), lr=0.1)
        inner.look = model.state_dict
        optimizer = hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model)
        for step in range(3):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()

    for error in caught(2, fn):
        assert "in the optimizer's step" in str(error)
        assert "at the consensus point x" in str(error)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_what_is_loaded_as_it_is_loses_no_local_step(local_steps: int) -> None:
    """A state dict that goes out and comes in again, between local steps too."""

    def fn(rank: int, load: bool) -> dict[str, bytes]:
        case = Case(rank, local_steps=local_steps)
        for case.at in range(STEPS - 1):
            plainly(case, False)
            if load:
                case.model.load_state_dict({k: v.clone() for k, v in case.model.state_dict().items()})
                case.model.train()
        case.optimizer.train()
        return bits([case.optimizer.state_dict(), list(case.model.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def test_gradients_at_x_through_parts_are_said() -> None:
    """After a state_dict() the parameters are at x, and calls of parts do not bring them back."""

    def fn(rank: int, train: bool) -> None:
        case = Case(rank)
        for case.at in range(2):
            case.model.state_dict()
            if train:
                case.optimizer.train()
            case.model[2](case.model[1](case.model[0](batch(rank, 0, torch.float64)))).mean().backward()
            case.model.state_dict()
            case.optimizer.step()

    assert any("only parts of it were called" in text for _, text in warned(2, lambda rank: fn(rank, False)))
    assert not any("only parts" in text for _, text in warned(2, lambda rank: fn(rank, True)))


class Fixed(nn.Module):
    """A part in eval mode within a model that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Both."""
        out: Tensor = self.second(torch.tanh(self.first(inputs)))
        return out


def test_parts_in_eval_mode_move_nothing() -> None:
    def fn(rank: int, fixed: bool) -> dict[str, bytes]:
        model = Fixed()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.3)
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), model=model
        )
        model.first.train(not fixed)
        for step in range(4):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
        return bits(optimizer.state_dict()["hvd_saef"])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
