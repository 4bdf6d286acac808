"""Runs the examples of examples/frameworks in one job, and writes what each came to as JSON.

tests/examples/test_frameworks.py starts it under torchrun, with a folder and the frameworks to run. Each
example runs from the start, and once more from what it saved after its first epoch. Beside it runs the plain
loop, with the same model on the same rows.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.machinery
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

import hvd_saef
from tests.workers import batch, bits, network, together

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "frameworks"
sys.path.insert(0, str(EXAMPLES))
import gpt  # noqa: E402

SAVED = {
    "plain": "epoch-{epoch}",
    "accelerate": "epoch-{epoch}",
    "trainer": "checkpoint-{step}",
    "lightning": "epoch-{last}.ckpt",
    "timm": "epoch-{epoch}",
}
"""What each example saves after an epoch. Lightning counts epochs from 0."""


def shuffled(epoch: int, batch: int, rank: int, ranks: int) -> list[int]:
    """The rows of a rank's batch as Lightning's sampler deals them out, which shuffles in each epoch."""
    sampler: DistributedSampler[Any] = DistributedSampler(gpt.text()[0], ranks, rank)
    sampler.set_epoch(epoch)
    return list(sampler)[batch * gpt.BATCH : (batch + 1) * gpt.BATCH]


def llama() -> nn.Module:
    """The Trainer's model, as that example starts it."""
    torch.manual_seed(0)
    model: nn.Module = importlib.import_module("gpt_trainer").llama()
    return model


def llamas_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The loss that the model computes itself."""
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def plain(name: str) -> gpt.Outcome:
    """The plain loop, with the model and the rows of an example."""
    args = argparse.Namespace(checkpoints=None, resume=None)
    if name == "trainer":
        return gpt.train(args, llama(), llamas_loss)
    torch.manual_seed(0)
    return gpt.train(args, gpt.GPT(), rows_of=shuffled if name == "lightning" else gpt.rows_in_turn)


def loaded(name: str, saved: Path) -> nn.Module:
    """A new model with the parameters that the framework saved for its own use, without hvd_saef."""
    if name == "trainer":
        from transformers import LlamaForCausalLM

        model: nn.Module = LlamaForCausalLM.from_pretrained(saved)
        return model
    model = gpt.GPT()
    if name == "lightning":
        state = torch.load(saved, weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    elif name == "accelerate":
        from accelerate import load_checkpoint_in_model

        load_checkpoint_in_model(model, str(saved))
    return model


class Empty(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Anything(type):
    """The class of classes that have every name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def without_torchvision() -> None:
    """Lets timm be imported where torchvision cannot be: PyPI has none for the CPU build of torch.

    timm needs it for the transforms of images, which no optimizer or schedule of timm's uses.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        parts = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc")
        for name in (f"torchvision{part}" for part in (*parts, ".transforms", ".transforms.functional")):
            module = sys.modules[name] = Empty(name)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            above, _, own = name.rpartition(".")
            if above:
                setattr(sys.modules[above], own, module)


def everyones(outcome: gpt.Outcome) -> list[Any]:
    """The outcomes of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, outcome._asdict())
    return found


def run(name: str, folder: Path) -> dict[str, Any]:
    """What an example came to: from the start, resumed, beside the plain loop, and by what it saved."""
    if name == "timm":
        without_torchvision()
    main: Callable[[list[str]], gpt.Outcome] = importlib.import_module(
        "gpt" if name == "plain" else f"gpt_{name}"
    ).main
    after = [
        str(folder / SAVED[name].format(epoch=epoch, last=epoch - 1, step=8 * epoch)) for epoch in (1, 2)
    ]
    report: dict[str, Any] = {"whole": everyones(main(["--checkpoints", str(folder)]))}
    report["resumed"] = everyones(main(["--resume", after[0]]))
    if name != "plain":
        report["plain"] = everyones(plain(name))
    if name in ("accelerate", "trainer", "lightning"):
        model = loaded(name, Path(after[1]))
        loss = llamas_loss if name == "trainer" else gpt.loss_of
        report["saved"] = [gpt.evaluate(model, loss, gpt.text()[1].rows), gpt.hash_of(model)]
        report["unkept"] = refusal(name, main)
    if name == "timm" and dist.get_rank() == 0:
        report["optimizers"] = timms_optimizers()
    return report


def refusal(name: str, main: Callable[[list[str]], Any]) -> str:
    """What an example says where nothing keeps DistributedDataParallel away from the model."""
    if name == "lightning":
        strategy = importlib.import_module("gpt_lightning").EachRanksOwn
        usual = mock.patch.object(strategy, "configure_ddp", strategy.__mro__[1].configure_ddp)
    else:
        accelerator = importlib.import_module("accelerate").Accelerator
        prepare = accelerator.prepare_model

        def for_training(self: Any, model: nn.Module, *_: Any, **__: Any) -> Any:
            return prepare(self, model)

        usual = mock.patch.object(accelerator, "prepare_model", for_training)
    with usual:
        try:
            main([])
        except TypeError as error:
            return str(error)
    return "nothing"


def timms_optimizers() -> dict[str, list[bool]]:
    """Answers for one optimizer of each class in timm.

    Left out are those of apex and bitsandbytes, which are for GPUs, and Kron, which is as slow as all others.
    """
    factory = importlib.import_module("timm.optim")
    names = factory.list_optimizers(exclude_filters=["bnb*", "fused*", "*kron*"])
    kinds = {factory.get_optimizer_class(name, bind_defaults=False): name for name in names}
    own = [name for kind, name in kinds.items() if kind.__module__.startswith("timm.")]
    return {name: check_optimizer(functools.partial(factory.create_optimizer_v2, opt=name)) for name in own}


def check_optimizer(make: Callable[..., torch.optim.Optimizer]) -> list[bool]:
    """Whether two workers (threads) have the same x, and whether a loaded optimizer goes on to the bit."""

    def start(seed: int) -> tuple[nn.Module, Any]:
        model = network(seed=seed)
        optimizer = make(model, lr=0.01, weight_decay=0.01)
        return model, hvd_saef.DistributedOptimizer(optimizer, model.named_parameters(), model=model)

    def step(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
        optimizer.zero_grad()
        loss = model(batch(rank, number)).square().mean()
        loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
        optimizer.step()

    def fn(rank: int) -> list[dict[str, bytes]]:
        first, second = start(0), start(1)
        for number in range(2):
            step(*first, rank, number)
        second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
        second[1].flush()  # moves the parameters now: some optimizers differentiate gradients in their step
        for one in (first, second):
            step(*one, rank, 2)
        return [bits(dict(model.state_dict())) for model, _ in (first, second)]

    (mine, resumed), theirs = together(2, fn)
    return [theirs == [mine, resumed], resumed == mine]


def work() -> None:
    """Run them, and let rank 0 write."""
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    reports = {}
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reports[name] = run(name, Path(folder, name))
        reports[name]["warnings"] = sorted({str(w.message) for w in caught})
    if dist.get_rank() == 0:
        Path(folder, "reports.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


if __name__ == "__main__":
    work()
