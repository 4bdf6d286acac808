"""Parameters that move with their gradients though step() is never called: seen before x is taken. Local."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.round.partial_steps import remove_hooks


class Unstepped:
    """Watches the parameters of one optimizer from wrapping until x is taken.

    Whoever moves a parameter after a backward pass takes a step. Before one, a state is loaded or weights
    are drawn, which is fine.
    """

    def __init__(self, layout: Layout) -> None:
        self._slots = layout.slots
        self._versions: dict[Tensor, int] = {}
        """By parameter its version when it got its last gradient."""
        self._handles: list[Any] = []
        weakref.finalize(self, remove_hooks, self._handles)
        self.start()

    def start(self) -> None:
        """Watch the gradients from now on."""
        self.stop()
        myself = weakref.ref(self)

        def note(parameter: Tensor) -> None:
            watch = myself()
            if watch is not None:
                watch._versions[parameter] = parameter._version

        for slot in self._slots:
            if slot.parameter.requires_grad:
                attach: Any = slot.parameter.register_post_accumulate_grad_hook
                self._handles.append(attach(note))

    def stop(self) -> None:
        """X was taken: from here on a comparison with b tells."""
        remove_hooks(self._handles)
        self._handles.clear()
        self._versions.clear()

    def forget(self) -> None:
        """Whatever moved the parameters so far was no step."""
        self._versions.clear()

    def moved(self) -> str | None:
        """The name of the first parameter that moved since its gradient."""
        moved = (
            s.name for s in self._slots if self._versions.get(s.parameter, torch.inf) < s.parameter._version
        )
        return next(moved, None)
