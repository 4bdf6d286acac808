"""Knows which optimizer owns a parameter. Local."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from hvd_saef.memory.layout import Layout

if TYPE_CHECKING:
    from hvd_saef.round.modes import Modes

# By the parameter's id: a Modes keeps its parameters alive, so no other tensor can get the same id.
_of_parameters: weakref.WeakValueDictionary[int, Modes] = weakref.WeakValueDictionary()


def own(modes: Modes, layout: Layout) -> None:
    """Makes the optimizer of `modes` the owner. An earlier owner leaves them at its x and is done."""
    for slot in layout.slots:
        earlier = _of_parameters.get(id(slot.parameter))
        if earlier is not None and earlier is not modes and earlier.taken is None:
            earlier.eval()
            earlier.taken, earlier.state = slot.name, None
    for slot in layout.slots:
        _of_parameters[id(slot.parameter)] = modes


def owners(parameters: Iterable[Tensor]) -> list[Modes]:
    """Returns the Modes of all optimizers that own any of these parameters."""
    found = (_of_parameters.get(id(parameter)) for parameter in parameters)
    return list({id(modes): modes for modes in found if modes is not None}.values())


@contextmanager
def at_consensus(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Keeps at x, inside the context, all parameters of every optimizer that owns any of `parameters`."""
    held = owners(parameters)
    evaluating = [modes.evaluating for modes in held]
    for modes in held:
        modes.eval()
    try:
        yield
    finally:
        for modes, stays in zip(held, evaluating, strict=True):
            if not stays:
                modes.train()
