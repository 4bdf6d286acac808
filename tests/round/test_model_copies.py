"""A copy of a model with hooks, or its pickle, takes them along without effect."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import hvd_saef
from tests.workers import batch, bits, network, through_torch_save, together, train


def through_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_of_the_model_is_inert(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    def fn(rank: int) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd_saef.DistributedOptimizer(optimizer, model.named_parameters(), model=model)
        train(model, optimizer, rank, 0)
        training = bits(dict(model.named_parameters()))
        twin = duplicate(model)
        held = bits(dict(twin.named_parameters()))
        assert held == bits(optimizer.state_dict()["hvd_saef"]["x"])
        model.train()(batch(rank, 1))
        for mode in (False, True):
            twin.train(mode)
            with torch.no_grad():
                twin(batch(rank, 1))
            assert bits(dict(twin.state_dict())) == held
            assert bits(dict(model.named_parameters())) == training
        for model_or_twin in (model, twin):
            model_or_twin.eval()(batch(rank, 1))
        assert bits(dict(model.named_parameters())) != training
        assert bits(dict(twin.named_parameters())) == held
        train(model.train(), optimizer, rank, 1)
        assert bits(dict(model.named_parameters())) != training

    together(2, fn)


def test_the_model_shows_x_after_the_optimizer_is_gone() -> None:
    """As when a function trains a model and returns it: garbage collection does not decide what is seen."""

    def fn(rank: int) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd_saef.DistributedOptimizer(optimizer, model.named_parameters(), model=model)
        train(model, optimizer, rank, 0)
        x = bits(optimizer.state_dict()["hvd_saef"]["x"])
        assert x != bits(dict(model.named_parameters()))
        del optimizer
        gc.collect()
        model.eval()(batch(rank, 1))
        assert bits(dict(model.named_parameters())) == x
        assert bits(dict(model.state_dict())) == x

    together(1, fn)  # one: gc.collect() in a second thread at the same time would do nothing
