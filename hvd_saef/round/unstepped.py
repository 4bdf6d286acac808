"""Watches for gradients, and for parameters that move outside of step(); has the messages about moves.

Local.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout, Slot
from hvd_saef.memory.state import State
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.partial_steps import remove_hooks

NO_STEP = (
    "parameter {name!r} moved after it got its gradient, but step() of what hvd_saef.DistributedOptimizer "
    "returned was not called: nothing was exchanged, and every rank trains alone. Call its step(). Where "
    "methods of your optimizer's own take the step (SAM's, say), wrap the optimizer that they call: "
    "docs/horovod.md. If weights were only loaded or drawn anew, all is well."
)
MOVED = (
    "parameter {name!r} was changed outside of step() since the round began. The change is kept, and enters "
    "the next update like a part of a local step, so that x follows it only roughly. Other weights to "
    "evaluate (a moving average, say) belong into `with optimizer.consensus():`."
)
MOVED_AT_X = (
    "parameters were changed while they were at the consensus point x, where an evaluation, a state_dict() "
    "or optimizer.eval() had brought them. The change is dropped, since training goes on from where it was. "
    "Call optimizer.train() before it; or, if it is to be the new x, optimizer.reanchor() after it, on all "
    "ranks."
)


class GradientWatch:
    """Calls a method with every parameter that gets a gradient, without keeping the method's object alive."""

    def __init__(self, slots: Sequence[Slot], method: Callable[[Tensor], None]) -> None:
        self._slots = slots
        self._method = weakref.WeakMethod(method)
        self._handles: list[Any] = []
        weakref.finalize(self, remove_hooks, self._handles)

    def start(self) -> None:
        """Starts watching, or starts anew."""
        self.stop()
        reference = self._method

        def hook(parameter: Tensor) -> None:
            method = reference()
            if method is not None:
                method(parameter)

        for slot in self._slots:
            if slot.parameter.requires_grad:
                attach: Any = slot.parameter.register_post_accumulate_grad_hook
                self._handles.append(attach(hook))

    def stop(self) -> None:
        """Stops watching."""
        remove_hooks(self._handles)
        self._handles.clear()


class Unstepped:
    """Finds steps that bypass the wrapper, from wrapping until x is taken.

    Code that moves a parameter after a backward pass takes a step. A move before any backward pass is
    allowed: a state is loaded, or weights are drawn.
    """

    def __init__(self, layout: Layout) -> None:
        self._slots = layout.slots
        self._versions: dict[Tensor, int] = {}
        """For each parameter, its version counter when it got its last gradient."""
        self._watch = GradientWatch(self._slots, self._note)
        self.start()

    def _note(self, parameter: Tensor) -> None:
        self._versions[parameter] = parameter._version

    def start(self) -> None:
        """Starts watching, or starts anew."""
        self._watch.start()

    def stop(self) -> None:
        """Stops watching, since x was taken: from now on a comparison with b finds moves."""
        self._watch.stop()
        self.forget()

    def forget(self) -> None:
        """Forgets the gradients so far: moves of the parameters until now were allowed."""
        self._versions.clear()

    def moved(self) -> str | None:
        """Returns the name of the first parameter that moved since it got its gradient, or None."""
        for slot in self._slots:
            if self._versions.get(slot.parameter, torch.inf) < slot.parameter._version:
                return slot.name
        return None


class EarlySteps:
    """Checks that parameters which take their local step during backward are not moved by other code."""

    def __init__(self) -> None:
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        """For each parameter its address, its version, and the number of journeys (to x or back) by then.

        A journey moves the parameters, too, and is allowed.
        """

    def leave(self, parameters: Iterable[Tensor], journeys: int) -> None:
        """Notes where these parameters are before they take their local step, in any thread."""
        self._places |= {p: (p.data_ptr(), p._version, journeys) for p in parameters}

    @contextmanager
    def step(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """The context of the early local step. Raises RuntimeError if other code has moved a parameter."""
        _stayed({p: self._places[p] for p in parameters}, self._places[parameters[0]][2])
        try:
            yield
        finally:
            for p in parameters:
                memory, _, journeys = self._places[p]
                self._places[p] = memory, p._version, journeys

    def forget(self) -> None:
        """Forgets all parameters, since the step is over."""
        self._places = {}

    def check(self, journeys: int) -> None:
        """Raises RuntimeError if other code moved a parameter since its early step; forgets all of them."""
        places, self._places = self._places, {}
        _stayed(places, journeys)


def _stayed(places: Mapping[Tensor, tuple[int, int, int]], journeys: int) -> None:
    for parameter, (memory, version, then) in places.items():
        if parameter.data_ptr() != memory or (journeys == then and parameter._version != version):
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} was changed between backward and step() "
                "(by a clamp, or by SAM, say), but overlap=True had sent its update already: pass "
                "overlap=False."
            )


def elsewhere(exchange: Exchange, state: State) -> Iterator[Slot]:
    """Yields the slots of the parameters that are not at b."""
    for one in state.buckets:
        b = exchange.start_point(one)
        for slot in one.bucket.slots:
            if not torch.equal(slot.view(b).to(slot.parameter.dtype), slot.parameter):
                yield slot
