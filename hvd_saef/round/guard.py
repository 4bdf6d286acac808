"""Finds, before a step, wrong use of a wrapped optimizer that would silently train wrongly. Local."""

from __future__ import annotations

import os
import threading
import warnings

from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.round.modes import Modes


class Guard:
    """Checks that the right process and thread use one wrapped optimizer, on the parameters it wrapped."""

    def __init__(self, modes: Modes) -> None:
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._thread_name = threading.current_thread().name
        self._modes = modes
        self._warned = False

    def claim(self, layout: Layout) -> None:
        """Makes this optimizer the owner of the parameters: see :meth:`Modes.claim`."""
        self._modes.claim(layout)

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child process, which the other ranks do not know."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from one that had called hvd_saef.DistributedOptimizer: it cannot "
                "exchange anything. Train in the process that called hvd.init() or init_process_group()."
            )

    def check(self, layout: Layout) -> None:
        """Raises RuntimeError if the parameters changed owner or form, or if another thread wrapped them."""
        if self._modes.taken is not None:
            raise RuntimeError(
                f"parameter {self._modes.taken!r} was wrapped again by a later DistributedOptimizer, "
                "so this one cannot be used any more: two would undo each other's steps. Wrap one optimizer "
                "over all parameters, or two over different ones."
            )
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"this optimizer was wrapped in thread {self._thread_name!r} and is used in "
                f"{threading.current_thread().name!r}: all ranks must call collectives in one order. Call "
                "hvd_saef.DistributedOptimizer in the thread that trains."
            )
        for slot in layout.slots:
            if (change := slot.change()) is not None:
                raise RuntimeError(
                    f"parameter {slot.name!r} {change} after hvd_saef.DistributedOptimizer saw it: x and the "
                    "errors would not fit it. Move, convert and resize the model before wrapping, or wrap a "
                    "new optimizer after it."
                )

    def check_gradients(self, gradients: list[Tensor]) -> None:
        """Warns, once, if `gradients` is empty: the step has no gradient at all."""
        if not gradients and not self._warned:
            self._warned = True
            warnings.warn(
                "step() finds no gradient on any parameter, so this worker's update is zero. If that is "
                "not meant: zero_grad() between backward() and step() drops them. Call it before backward().",
                stacklevel=5,
            )
