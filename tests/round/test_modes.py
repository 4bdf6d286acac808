"""train(), eval() and consensus(), and the hooks of model=: who sees b, who sees x, and that it is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from hvd_saef import WorkerError
from tests.workers import NO_MODEL, Run, batch, bits, everything, network, together, train, warned

pytestmark = [pytest.mark.both_arithmetics, pytest.mark.filterwarnings(NO_MODEL)]

SETTINGS: dict[str, dict[str, Any]] = {
    "saef": {},
    "half": {"step_ahead": 0.5, "compression": hvd_saef.Compression.topk(0.2)},
    "server": {"server_step_ahead": 0.5},
    "single-way": {"double_compression": False},
    "ef": {"feedback": "ef"},
    "three local steps": {"local_steps": 3},
}


def with_model(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Sequential, Any]:
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    named = model.named_parameters()
    return model, hvd_saef.DistributedOptimizer(optimizer, named, model=model, **options)


def x_of(optimizer: Any, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """The bits of x as parameters of `dtype` hold them."""
    return bits({name: x.to(dtype) for name, x in optimizer.state_dict()["hvd_saef"]["x"].items()})


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("steps", [3, 4])
def test_eval_is_x_and_train_is_the_training_point(options: dict[str, Any], steps: int) -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        run = Run(rank, **options).step(steps)
        training = bits(run.parameters)
        run.optimizer.train()
        assert bits(run.parameters) == training
        for _ in range(2):
            run.optimizer.eval()
            assert bits(run.parameters) == bits(run.x())
        for _ in range(2):
            run.optimizer.train()
            assert bits(run.parameters) == training
        return bits(run.x()), training

    xs, points = zip(*together(3, fn), strict=True)
    assert xs[0] == xs[1] == xs[2]
    between = options.get("local_steps") == 3 and steps == 4
    apart = options.get("feedback") != "ef" or between
    assert (len({tuple(point.values()) for point in points}) == 3) is apart
    assert (points[0] != xs[0]) is apart


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.5), (0.5, 1.0)])
def test_the_training_point_is_x_stepped_ahead(alpha: float, beta: float) -> None:
    def fn(rank: int) -> None:
        run = Run(rank, dtype=torch.float64, step_ahead=alpha, server_step_ahead=beta, server="replicated")
        run.step(4)
        ours = run.optimizer.state_dict()["hvd_saef"]
        for name, parameter in zip(ours["x"], run.parameters, strict=True):
            s = ours["server_errors"][name]["values"].as_strided(parameter.shape, parameter.stride())
            b = ours["x"][name] - alpha * ours["errors"][name] - beta * s
            torch.testing.assert_close(parameter.detach(), b, rtol=0, atol=1e-12)

    together(3, fn)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_consensus_is_x_for_a_block(options: dict[str, Any]) -> None:
    def fn(rank: int) -> None:
        run = Run(rank, **options).step(4)
        training, x = bits(run.parameters), bits(run.x())
        with run.optimizer.consensus():
            assert bits(run.parameters) == x
            with run.optimizer.consensus():
                assert bits(run.parameters) == x
            assert bits(run.parameters) == x
        assert bits(run.parameters) == training
        with pytest.raises(KeyError), run.optimizer.consensus():
            raise KeyError
        assert bits(run.parameters) == training
        run.optimizer.eval()
        with run.optimizer.consensus():
            pass
        assert bits(run.parameters) == x
        run.optimizer.train()
        assert bits(run.parameters) == training

    together(3, fn)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_evaluation_and_saving_leave_no_trace(options: dict[str, Any]) -> None:
    def fn(rank: int, look: bool) -> dict[str, bytes]:
        run = Run(rank, **options)
        for _ in range(8):
            if look:
                run.optimizer.eval()
                evaluating = bits(run.optimizer.state_dict())
                run.optimizer.train()
                assert bits(run.optimizer.state_dict()) == evaluating
                with run.optimizer.consensus():
                    pass
            run.step()
        return everything(run)

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


@pytest.mark.parametrize("who", [{1}, {0, 2}, {0, 1, 2}])
@pytest.mark.parametrize("steps", [0, 2, 3])
def test_step_in_eval_mode_raises_on_all(who: set[int], steps: int) -> None:
    def fn(rank: int, stumble: bool) -> dict[str, bytes]:
        run = Run(rank, local_steps=2).step(steps)
        if stumble:
            before = everything(run)
            if rank in who:
                run.optimizer.eval()
            error = RuntimeError if rank in who else WorkerError
            words = (
                r"eval\(\).*train\(\)" if rank in who else ".*".join(f"rank {k} raised" for k in sorted(who))
            )
            with pytest.raises(error, match=words) as caught_here:
                run.step()
            assert isinstance(caught_here.value, WorkerError) is (rank not in who)
            run.optimizer.train()
            assert everything(run) == before
        return everything(run.step(3))

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


def test_before_the_first_step_modes_are_harmless() -> None:
    def fn(rank: int, look: bool) -> dict[str, bytes]:
        run = Run(rank)
        if look:
            start = bits(run.parameters)
            for move in (run.optimizer.eval, run.optimizer.train, run.optimizer.flush):
                move()
                assert bits(run.parameters) == start
            with run.optimizer.consensus():
                assert bits(run.parameters) == start
        return everything(run.step(3))

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def test_moving_between_forward_and_backward_is_noticed() -> None:
    """Parameters are not written through .data: autograd's version counters tell."""

    def fn(rank: int) -> None:
        model, optimizer = with_model()
        train(model, optimizer, rank, 0)
        loss = model(batch(rank, 1)).square().mean()
        optimizer.eval()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    together(2, fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("local_steps", [1, 3])
def test_forward_in_eval_mode_and_state_dict_see_x(dtype: torch.dtype, local_steps: int) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        model, optimizer = with_model(dtype, local_steps=local_steps)
        for step in range(4):
            train(model, optimizer, rank, step)
        training, x = bits(dict(model.named_parameters())), x_of(optimizer, dtype)
        assert training != x
        bare = network(dtype)
        with torch.no_grad():
            for ours, theirs in zip(
                bare.parameters(), optimizer.state_dict()["hvd_saef"]["x"].values(), strict=True
            ):
                ours.copy_(theirs)
            expected = bits(bare(batch(9, 9, dtype)))
            model.eval()
            assert bits(model(batch(9, 9, dtype))) == expected
            assert bits(dict(model.named_parameters())) == x
            model.train()
            assert bits(model(batch(9, 9, dtype))) != expected
            assert bits(dict(model.named_parameters())) == training
        assert bits(dict(model.state_dict())) == x
        model(batch(9, 9, dtype))
        assert bits(dict(model.named_parameters())) == training
        assert optimizer.state_dict()["hvd_saef"]["x"]["0.weight"].dtype == torch.float32
        return x

    first, *others = together(3, fn)
    assert all(other == first for other in others)


def test_after_eval_of_the_optimizer_a_forward_pass_moves_nothing() -> None:
    def fn(rank: int) -> None:
        model, optimizer = with_model()
        train(model, optimizer, rank, 0)
        optimizer.eval()
        model.train()
        model(batch(rank, 1))
        assert bits(dict(model.named_parameters())) == x_of(optimizer)

    together(2, fn)


def test_state_dict_is_live_before_the_first_step() -> None:
    def fn(rank: int, write: bool) -> dict[str, bytes]:
        model, optimizer = with_model()
        if write:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.add_(1.0)
        train(model, optimizer, rank, 0)
        return x_of(optimizer)

    def shifted(rank: int) -> dict[str, bytes]:
        model, optimizer = with_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        train(model, optimizer, rank, 0)
        return x_of(optimizer)

    written = together(2, lambda rank: fn(rank, True))
    assert written == together(2, shifted)
    assert written != together(2, lambda rank: fn(rank, False))


def look_nowhere(_: nn.Module, __: Any) -> None: ...


def look_with_the_model(model: nn.Module, _: Any) -> None:
    with torch.no_grad():
        model.eval()(batch(9, 9, next(model.parameters()).dtype))
    model.state_dict()
    model.train()


def look_with_the_optimizer(model: nn.Module, optimizer: Any) -> None:
    with optimizer.consensus():
        model(batch(9, 9, next(model.parameters()).dtype))
    optimizer.eval()
    look_with_the_model(model, optimizer)
    optimizer.train()


@pytest.mark.parametrize("look", [look_with_the_model, look_with_the_optimizer])
@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trajectories_with_and_without_looks_are_equal(
    look: Callable[[nn.Module, Any], None], local_steps: int, dtype: torch.dtype
) -> None:
    def fn(rank: int, look: Callable[[nn.Module, Any], None]) -> dict[str, bytes]:
        model, optimizer = with_model(dtype, local_steps=local_steps)
        for step in range(8):
            look(model, optimizer)
            train(model, optimizer, rank, step)
        return bits([optimizer.state_dict(), dict(model.named_parameters())])

    assert together(2, lambda rank: fn(rank, look)) == together(2, lambda rank: fn(rank, look_nowhere))


def test_training_in_eval_mode_of_the_model_warns() -> None:
    def fn(rank: int, training: bool) -> None:
        model, optimizer = with_model()
        train(model, optimizer, rank, 0)
        model.train(training)
        train(model, optimizer, rank, 1)

    texts = warned(2, lambda rank: fn(rank, False))
    assert {rank for rank, text in texts if "the model was in eval mode" in text} == {0, 1}
    assert not warned(2, lambda rank: fn(rank, True))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"step_ahead": 0.0, "server_step_ahead": 0.5}, 1),
        ({"step_ahead": 0.0}, 0),
        ({"feedback": "ef"}, 0),
        ({"feedback": "none"}, 0),
    ],
)
def test_one_warning_to_pass_model(options: dict[str, Any], count: int) -> None:
    texts = warned(2, lambda rank: Run(rank, **options).step(3))
    assert [rank for rank, text in texts if "model=model" in text and "consensus()" in text] == [0] * count
    assert not warned(2, lambda _: with_model(server="replicated", **options))
