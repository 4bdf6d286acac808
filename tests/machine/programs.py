"""Programs that hypothesis draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.machine.actions import (
    Action,
    Backward,
    Clamp,
    Forward,
    Freeze,
    Hook,
    Look,
    Mode,
    Rate,
    Spoil,
    Step,
    Zero,
)
from tests.machine.loading import Load, LoadModel, Rewrap, Save
from tests.machine.net import LAYERS
from tests.machine.options import Options
from tests.machine.running import Program
from tests.machine.storing import Collective, Grow, LoadCheckpoint, SaveCheckpoint
from tests.machine.worker import LOOKS

MOST = 6
"""Steps of a program, at most."""
CLOSURES = ("plain", "raises", "in eval mode", "evaluates after", "ends in eval")
"""The kinds of closures."""
OVERLAPS = [(False,), (False,), (True,), (False, False), (True, True), (True, False), (False, True)]
"""Which optimizers overlap, of one or two."""


@st.composite
def options(draw: Any, /, **fixed: Any) -> Options:
    """Any that go together, but for what is fixed."""
    feedback = draw(st.sampled_from(["saef", "saef", "ef", "none"]))
    double = draw(st.booleans())
    compressor = draw(st.sampled_from(["sign", "sign", "topk", "none", "fp16"]))
    alpha = draw(st.sampled_from([1.0, 1.0, 0.5])) if feedback == "saef" else 1.0
    beta = draw(st.sampled_from([0.0, 0.0, 1.0])) if feedback == "saef" and double else 0.0
    # Adam's updates are of few sizes: their sums are ties of float16, decided by a float64's last bit.
    optimizers = ["sgd", "sgdm", *(["adamw"] if compressor != "fp16" else [])]
    servers = ["auto", "replicated", *(["sharded"] if double and not beta else [])]
    chosen: dict[str, Any] = {
        "workers": draw(st.sampled_from([2, 2, 3])),
        "ranks": draw(st.sampled_from([1, 1, 1, 2])),
        "compressor": compressor,
        "feedback": feedback,
        "alpha": alpha,
        "beta": beta,
        "double": double,
        "period": None if feedback == "none" else draw(st.sampled_from([None, 2, 3])),
        "local_steps": draw(st.integers(1, 3)),
        "warmup": draw(st.sampled_from([0, 0, 1])),
        "block_size": draw(st.sampled_from([None, None, 2])),
        "server": draw(st.sampled_from(servers)),
        "small_buckets": draw(st.booleans()),
        "optimizer": draw(st.sampled_from(optimizers)),
        "overlap": draw(st.sampled_from(OVERLAPS)),
        "hooked": draw(st.sampled_from([True, True, False])),
        "on_nonfinite": draw(st.sampled_from(["raise", "skip"])),
        "extra": draw(st.sampled_from(["there", "there", "frozen", "later"])),
        "seed": draw(st.integers(0, 3)),
    }
    made = Options(**{**chosen, **fixed})
    if not any(made.overlap):
        return made
    if made.averages_gradients:
        return dataclasses.replace(made, overlap=tuple(False for _ in made.overlap))
    return dataclasses.replace(made, on_nonfinite="raise")


def _subsets(size: int) -> Any:
    some = st.sets(st.integers(0, size - 1), min_size=1, max_size=size).map(lambda s: tuple(sorted(s)))
    return st.none() | some


def rarely_some(size: int) -> Any:
    """Who does what all ranks must do: mostly all, as the next step is an error otherwise."""
    return st.integers(0, 4).flatmap(lambda number: _subsets(size) if number == 0 else st.none())


def loads(chosen: Options) -> Any:
    """An optimizer's state."""
    whose = st.sampled_from(["own", "own", "own", "next", "first", "plain"])
    ranks = st.none() | st.none() | _subsets(chosen.size)
    return st.builds(Load, ranks, st.booleans() if chosen.hooked else st.just(False), whose)


@st.composite
def resumes(draw: Any, /, chosen: Options) -> tuple[Options, list[Action]]:
    """A new job that goes on from the last one's state, with other options or the same."""
    fixed = ("workers", "ranks", "optimizer", "overlap", "hooked", "on_nonfinite", "extra", "seed")
    made = chosen
    if draw(st.integers(0, 3)) > 0:
        made = draw(options(**{name: getattr(chosen, name) for name in fixed}))
        if made.compressor == "fp16" and made.optimizer == "adamw":
            made = dataclasses.replace(made, compressor="sign")
        if made.averages_gradients and any(chosen.overlap):
            made = dataclasses.replace(made, local_steps=2)
        made = dataclasses.replace(made, overlap=chosen.overlap, on_nonfinite=chosen.on_nonfinite)
    first: list[Action] = [Collective(what="consolidate")] if draw(st.integers(0, 3)) == 0 else []
    if len(chosen.overlap) == 1 and draw(st.booleans()):
        return made, [*first, SaveCheckpoint(), Rewrap(options=made), LoadCheckpoint()]
    return made, [*first, Save(), Rewrap(options=made), draw(loads(made))]


def peeks(size: int) -> Any:
    """What changes nothing."""
    ranks = _subsets(size)
    looks = st.builds(Look, ranks, st.sampled_from(sorted(LOOKS)))
    evaluates = st.builds(Forward, ranks, st.integers(0, 3), st.just(False), st.just(False))
    consensus = st.builds(Mode, ranks, st.sampled_from([None, 0, 1]), st.just("consensus"))
    return looks | evaluates | consensus


def collectives(chosen: Options) -> Any:
    """What all ranks call."""
    kinds = st.sampled_from(["flush", "consolidate", "reanchor"])
    return st.builds(Collective, st.none(), kinds, st.sampled_from([0, 0, 1]))


def between(size: int, chosen: Options) -> Any:
    """What is called between two steps."""
    ranks = _subsets(size)
    actions = [
        peeks(size),
        st.builds(Mode, ranks, st.sampled_from([None, 0, 1]), st.sampled_from(["train", "eval"])),
        st.builds(Rate, ranks, st.sampled_from([0.02, 0.2])),
        collectives(chosen),
        st.builds(Freeze, rarely_some(size), st.sampled_from(LAYERS), st.booleans()),
        st.builds(Forward, ranks, st.integers(0, 3), st.just(False)),
        st.builds(Save),
        loads(chosen),
        st.builds(Clamp, ranks),
    ]
    if len(chosen.overlap) == 1:
        actions += [st.builds(SaveCheckpoint), st.builds(LoadCheckpoint)]
    if chosen.hooked:
        kinds = st.sampled_from(["saved", "x", "other"])
        layers = st.sampled_from([(), (), ("second",), ("first", "extra"), ("second", "extra")])
        actions.append(st.builds(LoadModel, st.none() | ranks, kinds, layers, st.booleans()))
    when = st.sampled_from(["pre", "post"])
    actions.append(st.builds(Hook, ranks, when, st.sampled_from(["", *sorted(LOOKS)])))
    if chosen.extra == "later":
        actions.append(st.builds(Grow, rarely_some(size)))
    return st.one_of(actions)


def midway(size: int, chosen: Options) -> Any:
    """What is called between backward and step()."""
    if not any(chosen.overlap):
        return peeks(size) | between(size, chosen)
    rate = st.builds(Rate, _subsets(size), st.sampled_from([0.02, 0.2]))
    return peeks(size) | rate | collectives(chosen)


@st.composite
def iterations(draw: Any, /, chosen: Options) -> list[Action]:
    """One step of training, as written in loops, and what users put into it."""
    size, parts = chosen.size, range(len(chosen.overlap))
    number, overlaps = draw(st.integers(0, 9)), any(chosen.overlap)
    if draw(st.integers(0, 3)) == 0 and not overlaps:
        kind = draw(st.sampled_from(CLOSURES))
        closure = {"closure": kind, "number": number, "ranks": draw(_subsets(size))}
        return [Step(part=part, **closure) for part in parts]
    used = draw(st.sampled_from([LAYERS, LAYERS, ("first", "second"), ("extra",), ("second", "extra")]))
    odd = draw(_subsets(size)) if used != LAYERS else None
    actions: list[Action] = [Zero(to_none=draw(st.integers(0, 4)) > 0)]
    if odd is None:
        actions.append(Forward(number=number, used=used, training=draw(st.integers(0, 9)) > 0))
    else:  # the others go through all layers
        rest = tuple(rank for rank in range(size) if rank not in odd)
        actions += [Forward(rest, number), Forward(odd, number, used=used)]
    actions.append(Backward())
    if draw(st.integers(0, 3)) == 0:
        actions.append(draw(midway(size, chosen)))
    if draw(st.integers(0, 9)) == 0 and not overlaps:
        actions.append(Spoil(draw(_subsets(size)), draw(st.sampled_from(["first.weight", "extra.bias"]))))
    clips = draw(st.integers(0, 5)) == 0 and not overlaps
    return [*actions, *(Step(part=part, clips=clips) for part in parts)]


@st.composite
def programs(draw: Any, /, **fixed: Any) -> Program:
    """Options, and steps with anything between them."""
    chosen = now = draw(options(**fixed))
    actions: list[Action] = []
    for _ in range(draw(st.integers(1, MOST))):
        actions += draw(st.lists(between(now.size, now), max_size=2))
        if draw(st.integers(0, 4)) == 0:
            now, again = draw(resumes(now))
            actions += [*again, *draw(st.lists(between(now.size, now), max_size=1))]
        actions += draw(iterations(now))
    return Program(chosen, tuple(actions))
