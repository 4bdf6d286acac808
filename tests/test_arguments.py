"""Every argument of DistributedOptimizer: what is refused, in which words, and what is accepted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from hvd_saef import Compression, run_workers
from tests.workers import NO_MODEL, Run, bits, caught, everything, network, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL, "ignore:.*Horovod's own.*:UserWarning")

Make = Callable[[nn.Module], dict[str, Any]]


def wrap(module: nn.Module, /, optimizer: Any = None, **options: Any) -> Any:
    return hvd_saef.DistributedOptimizer(optimizer or torch.optim.SGD(module.parameters(), lr=0.1), **options)


FRACTION = "a number from 0 to 1"
WHOLE = {least: f"a whole number >= {least}" for least in (0, 1, 2)}
COMPRESSOR = "hvd_saef.Compressor"
BETA = "server_step_ahead=0.5"

Refusal = type[Exception] | tuple[type[Exception], ...]
EITHER = (TypeError, ValueError)

# (arguments, exception, words of the message: the argument's name, its value, what is allowed)
REFUSED: list[tuple[dict[str, Any], Refusal, tuple[str, ...]]] = [
    ({"feedback": "x"}, ValueError, ("feedback='x'", "'saef', 'ef', 'none'")),
    ({"feedback": None}, ValueError, ("feedback=None", "'saef', 'ef', 'none'")),
    ({"feedback": ["ef"]}, ValueError, ("feedback=['ef']", "'saef', 'ef', 'none'")),
    ({"server": "x"}, ValueError, ("server='x'", "'auto', 'replicated', 'sharded'")),
    ({"server": 0}, ValueError, ("server=0", "'auto', 'replicated', 'sharded'")),
    ({"on_nonfinite": "x"}, ValueError, ("on_nonfinite='x'", "'raise', 'skip'")),
    ({"step_ahead": -0.1}, ValueError, ("step_ahead=-0.1", FRACTION)),
    ({"step_ahead": 1.01}, ValueError, ("step_ahead=1.01", FRACTION)),
    ({"step_ahead": float("nan")}, ValueError, ("step_ahead=nan", FRACTION)),
    ({"step_ahead": "1"}, TypeError, ("step_ahead='1'", FRACTION)),
    ({"step_ahead": None}, TypeError, ("step_ahead=None", FRACTION)),
    ({"step_ahead": True}, TypeError, ("step_ahead=True", FRACTION)),
    ({"server_step_ahead": -1}, ValueError, ("server_step_ahead=-1", FRACTION)),
    ({"server_step_ahead": 2.0}, ValueError, ("server_step_ahead=2.0", FRACTION)),
    ({"server_step_ahead": True}, TypeError, ("server_step_ahead=True", FRACTION)),
    ({"server_step_ahead": None}, TypeError, ("server_step_ahead=None", FRACTION)),
    ({"double_compression": 1}, TypeError, ("double_compression=1", "True and False")),
    ({"double_compression": None}, TypeError, ("double_compression=None", "True and False")),
    ({"sparse_as_dense": 0}, TypeError, ("sparse_as_dense=0", "True and False")),
    ({"averaging_period": 1}, ValueError, ("averaging_period=1", WHOLE[2], "None")),
    ({"averaging_period": 0}, ValueError, ("averaging_period=0", WHOLE[2], "None")),
    ({"averaging_period": -1}, ValueError, ("averaging_period=-1", WHOLE[2], "None")),
    ({"averaging_period": True}, TypeError, ("averaging_period=True", WHOLE[2], "None")),
    ({"averaging_period": 2.5}, TypeError, ("averaging_period=2.5", WHOLE[2], "None")),
    ({"local_steps": 0}, ValueError, ("local_steps=0", WHOLE[1])),
    ({"local_steps": 2.0}, TypeError, ("local_steps=2.0", WHOLE[1])),
    ({"local_steps": None}, TypeError, ("local_steps=None", WHOLE[1])),
    ({"warmup_steps": -1}, ValueError, ("warmup_steps=-1", WHOLE[0])),
    ({"warmup_steps": "5"}, TypeError, ("warmup_steps='5'", WHOLE[0])),
    ({"block_size": 0}, ValueError, ("block_size=0", WHOLE[1], "None")),
    ({"block_size": 1.5}, TypeError, ("block_size=1.5", WHOLE[1], "None")),
    ({"dense_below": -1}, ValueError, ("dense_below=-1", WHOLE[0])),
    ({"dense_below": 1.5}, TypeError, ("dense_below=1.5", WHOLE[0])),
    ({"dense_below": None}, TypeError, ("dense_below=None", WHOLE[0])),
    ({"bucket_bytes": 0}, ValueError, ("bucket_bytes=0", WHOLE[1])),
    ({"bucket_bytes": None}, TypeError, ("bucket_bytes=None", WHOLE[1])),
    ({"backward_passes_per_step": 0}, ValueError, ("backward_passes_per_step=0", WHOLE[1])),
    ({"backward_passes_per_step": 1.0}, TypeError, ("backward_passes_per_step=1.0", WHOLE[1])),
    ({"check_consensus_every": -1}, ValueError, ("check_consensus_every=-1", WHOLE[0])),
    ({"check_consensus_every": 0.5}, TypeError, ("check_consensus_every=0.5", WHOLE[0])),
    ({"check_consensus_every": True}, TypeError, ("check_consensus_every=True", WHOLE[0])),
    ({"averaging_spread": 1, "averaging_period": 2}, TypeError, ("averaging_spread=1", "True and False")),
    ({"averaging_fp16": None, "averaging_period": 2}, TypeError, ("averaging_fp16=None", "True and False")),
    ({"averaging_spread": True}, ValueError, ("averaging_spread=True", "averaging_period=None")),
    ({"averaging_fp16": True}, ValueError, ("averaging_fp16=True", "averaging_period=None")),
    ({"overlap": 1}, TypeError, ("overlap=1", "True and False")),
    ({"overlap": None}, TypeError, ("overlap=None", "True and False")),
    ({"overlap": True, "on_nonfinite": "skip"}, ValueError, ("overlap=True", "on_nonfinite='raise'")),
    ({"op": "sum"}, ValueError, ("op='sum'", "only hvd.Average is allowed")),
    ({"gradient_predivide_factor": 2.0}, ValueError, ("gradient_predivide_factor=2.0", "only 1.0")),
    # combinations
    ({"feedback": "ef", "step_ahead": 0.5}, ValueError, ("step_ahead=0.5", "feedback='ef'", '"saef"')),
    ({"feedback": "ef", "step_ahead": 0.0}, ValueError, ("step_ahead=0.0", "feedback='ef'", '"saef"')),
    ({"feedback": "none", "step_ahead": 0.5}, ValueError, ("step_ahead=0.5", "feedback='none'", '"saef"')),
    ({"server_step_ahead": 0.5, "double_compression": False}, ValueError, (BETA, "double_compression=True")),
    ({"server_step_ahead": 0.5, "feedback": "ef"}, ValueError, (BETA, "'ef'", "feedback='saef'")),
    ({"server_step_ahead": 0.5, "feedback": "none"}, ValueError, (BETA, "'none'", "feedback='saef'")),
    ({"server_step_ahead": 0.5, "server": "sharded"}, ValueError, (BETA, "'sharded'", "'replicated'")),
    (
        {"server": "sharded", "double_compression": False},
        ValueError,
        ("server='sharded'", "double_compression=True", "'replicated'"),
    ),
    ({"feedback": "none", "averaging_period": 2}, ValueError, ("averaging_period=2", "'none'", "None")),
    # objects
    ({"compression": "sign"}, TypeError, ("compression='sign'", COMPRESSOR)),
    ({"compression": None}, TypeError, ("compression=None", COMPRESSOR)),
    ({"compression": type(Compression.sign)}, TypeError, ("compression=<class", "Sign", COMPRESSOR)),
    ({"compression": Compression}, TypeError, ("compression=<class", "Compression'", COMPRESSOR)),
    ({"compression": lambda *_: 0}, TypeError, ("compression=", "gave 0", "'0.weight'", COMPRESSOR)),
    (
        {"compression": lambda name, _: Compression.sign if name == "0.weight" else type(Compression.sign)},
        TypeError,
        ("compression=", "SignCompressor", "'0.bias'", COMPRESSOR),
    ),
    ({"model": 3}, TypeError, ("model=3", "torch.nn.Module", "None")),
    ({"model": nn.Linear}, TypeError, ("model=<class", "torch.nn.Module", "None")),
    ({"optimizer": 3}, TypeError, ("optimizer=3", "torch.optim.Optimizer")),
    ({"optimizer": torch.optim.SGD}, TypeError, ("optimizer=<class", "torch.optim.Optimizer")),
    ({"named_parameters": ["0.weight"]}, ValueError, ("named_parameters", "'0.weight'", "(name, parameter)")),
    ({"named_parameters": [("w",)]}, ValueError, ("named_parameters", "('w',)", "(name, parameter)")),
    ({"named_parameters": [("w", [1.0])]}, EITHER, ("named_parameters", "(name, parameter)")),
    ({"named_parameters": 5}, EITHER, ("named_parameters", "5", "(name, parameter)")),
]

# The same, where the arguments are made of the model.
REFUSED_WITH_MODEL: list[tuple[Make, Refusal, tuple[str, ...]]] = [
    (
        lambda m: {"named_parameters": [(p, n) for n, p in m.named_parameters()]},
        ValueError,
        ("named_parameters", "(name, parameter)"),
    ),
    (
        lambda m: {"named_parameters": [("twin", p) for p in m.parameters()]},
        ValueError,
        ("named_parameters", "'twin'", "twice", "unique"),
    ),
    (
        lambda m: {"named_parameters": list(m.named_parameters())[1:]},
        ValueError,
        ("named_parameters", "(3, 4)", "model.named_parameters()"),
    ),
    (
        lambda m: {"optimizer": torch.optim.LBFGS(m.parameters()), "named_parameters": None},
        TypeError,
        ("optimizer=LBFGS", "closure", "Every other optimizer of torch.optim is allowed"),
    ),
    (
        lambda m: {"optimizer": wrap(m), "named_parameters": None},
        TypeError,
        ("optimizer=SGD", "DistributedOptimizer already", "wrap it once"),
    ),
    (
        lambda _: {
            "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
            "named_parameters": None,
        },
        TypeError,
        ("'noname.0.0'", "complex64", "float32"),
    ),
]


def refuse(make: Make, error: Refusal, words: tuple[str, ...]) -> None:
    def fn(_: int) -> None:
        model = network()
        wrap(model, **({"named_parameters": model.named_parameters()} | make(model)))

    for failure in caught(2, fn):
        assert isinstance(failure, error)
        missing = [word for word in words if word not in str(failure)]
        assert not missing, f"{missing} not in: {failure}"


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[str(row[2][:2]) for row in REFUSED])
def test_refused(arguments: dict[str, Any], error: Refusal, words: tuple[str, ...]) -> None:
    refuse(lambda _: arguments, error, words)


@pytest.mark.parametrize(("make", "error", "words"), REFUSED_WITH_MODEL)
def test_refused_with_model(make: Make, error: Refusal, words: tuple[str, ...]) -> None:
    refuse(make, error, words)


@pytest.mark.parametrize(
    "arguments",
    [
        {"step_ahead": 0},
        {"step_ahead": 1},
        {"step_ahead": 0.5},
        {"feedback": "ef", "step_ahead": 1.0},
        {"feedback": "ef", "server_step_ahead": 0.0},
        {"server_step_ahead": 1, "server": "replicated"},
        {"server_step_ahead": 0.5, "server": "auto"},
        {"server": "sharded", "server_step_ahead": 0.0},
        {"server": "replicated", "double_compression": False},
        {"averaging_period": 2},
        {"local_steps": 1, "warmup_steps": 0, "block_size": 1, "bucket_bytes": 1},
        {"feedback": "none", "averaging_period": None},
        {"backward_passes_per_step": 3, "check_consensus_every": 1, "on_nonfinite": "skip"},
        {"compression": lambda name, _: Compression.none if "bias" in name else Compression.topk(1)},
        {"named_parameters": None, "model": None},
        {"gradient_predivide_factor": 1, "sparse_as_dense": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_accepted_at_the_edges(arguments: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank, **arguments).step(3)
        return bits(run.x())

    first, *others = together(3, fn)
    assert all(other == first for other in others)
    assert first != together(1, lambda rank: bits(Run(rank).parameters))[0]


def test_signature_is_horovods_then_keyword_only() -> None:
    hvd = pytest.importorskip("horovod.torch")
    theirs = list(inspect.signature(hvd.DistributedOptimizer).parameters.values())
    ours = list(inspect.signature(hvd_saef.DistributedOptimizer).parameters.values())
    same, more = ours[: len(theirs)], ours[len(theirs) :]
    assert [p.name for p in same] == [p.name for p in theirs]
    assert {p.kind for p in same} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    # None stands for what Horovod has: `import hvd_saef` does not import it.
    assert [p.name for p in same if p.default is None] == [
        "named_parameters",
        "op",
        "groups",
        "process_set",
    ]
    stand_for = {"op": hvd.Average, "process_set": hvd.global_process_set}
    defaults = {p.name: p.default for p in same} | {"compression": hvd.Compression.none} | stand_for
    assert defaults == {p.name: p.default for p in theirs}
    assert next(p.default for p in same if p.name == "compression") is Compression.sign
    assert {p.kind for p in more} == {inspect.Parameter.KEYWORD_ONLY}
    named = {p.name: p.default for p in more if p.name != "bucket_bytes"}
    assert named == {
        "model": None,
        "feedback": "saef",
        "step_ahead": 1.0,
        "server_step_ahead": 0.0,
        "double_compression": True,
        "averaging_period": None,
        "averaging_spread": False,
        "averaging_fp16": False,
        "local_steps": 1,
        "warmup_steps": 0,
        "block_size": None,
        "dense_below": 0,
        "server": "auto",
        "overlap": False,
        "on_nonfinite": "raise",
        "check_consensus_every": 0,
        "worker": "rank",
        "weights": "equal",
        "process_group": None,
    }


@pytest.mark.parametrize("kind", ["none", "fp16"])
def test_horovods_compression_maps_to_ours_with_one_warning(kind: str) -> None:
    hvd = pytest.importorskip("horovod.torch")

    def fn(given: Any) -> Callable[[int], dict[str, bytes]]:
        return lambda rank: everything(Run(rank, compression=given).step(3))

    theirs = fn(getattr(hvd.Compression, kind))
    assert together(2, theirs) == together(2, fn(getattr(Compression, kind)))
    about = [(rank, text) for rank, text in warned(3, theirs) if "compress" in text]
    assert len(about) == 1
    assert about[0][0] == 0
    assert "nothing is compressed" in about[0][1]
    assert not [text for _, text in warned(3, fn(getattr(Compression, kind))) if "compress" in text]


@pytest.mark.parametrize("arguments", [{"num_groups": 2}, {"groups": [[]]}, {"groups": 3}], ids=str)
def test_groups_have_no_effect(arguments: dict[str, Any]) -> None:
    plain = together(2, lambda rank: everything(Run(rank).step(3)))
    assert together(2, lambda rank: everything(Run(rank, **arguments).step(3))) == plain


def test_other_ops_of_horovod_are_refused() -> None:
    hvd = pytest.importorskip("horovod.torch")
    for name in ("Sum", "Adasum", "Min", "Max", "Product"):
        op = getattr(hvd, name)  # an int
        refuse(lambda _, op=op: {"op": op}, ValueError, (f"op=hvd.{name}:", "only hvd.Average is allowed"))  # type: ignore[misc]
    refuse(lambda _: {"op": "mean"}, ValueError, ("op='mean':", "only hvd.Average is allowed"))
    together(2, lambda rank: Run(rank, op=hvd.Average))


def test_process_set_is_refused_in_a_simulation() -> None:
    hvd = pytest.importorskip("horovod.torch")
    refuse(lambda _: {"process_set": hvd.ProcessSet([0])}, ValueError, ("process_set", "ranks=[0]", "global"))
    together(2, lambda rank: Run(rank, process_set=hvd.global_process_set))


def test_elastic_horovod_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    refuse(lambda _: {}, RuntimeError, ("HOROVOD_ELASTIC", "elastic Horovod is not supported"))


def test_without_horovod_initialized() -> None:
    with pytest.raises(RuntimeError, match=r"call hvd\.init\(\)"):
        wrap(network())
    together(1, lambda _: wrap(network()))
    with pytest.raises(RuntimeError, match=r"call hvd\.init\(\)"):  # a simulation leaves nothing behind
        wrap(network())


@pytest.mark.parametrize(
    ("workers", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ("2", TypeError),
        (True, TypeError),
        (1.0, TypeError),
        (None, TypeError),
    ],
)
def test_number_of_workers(workers: Any, error: type[Exception]) -> None:
    ranks: list[int] = []
    with pytest.raises(error, match=re.escape(f"workers={workers!r}: a whole number >= 1")):
        run_workers(workers, ranks.append)
    assert not ranks
