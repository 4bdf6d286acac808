"""Makes the class of the optimizer that users get: a subclass of the wrapped optimizer's own class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, SupportsIndex

import torch

from hvd_saef.checkpoints.loadable import python_numbers
from hvd_saef.other_steps import wrap_the_held
from hvd_saef.round.session import Session
from hvd_saef.transport.libraries import loaded_horovod


class SaefMethods:
    """The methods that the returned optimizer has in addition to those of the wrapped optimizer."""

    _saef: Session

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an optimizer that hvd_saef.DistributedOptimizer returned can be neither copied nor pickled: it "
            "belongs to its model's parameters and talks to the other workers. Save optimizer.state_dict(), "
            "or call hvd_saef.save_checkpoint, and load that into another one. To copy the torch optimizer "
            "alone, copy the one that was wrapped."
        )

    def synchronize(self) -> None:
        """Makes gradients ready for clipping, in Horovod's recipe. Call it on all ranks before step().

        Afterwards the gradients are this worker's own; those of a worker of several ranks are the mean over
        its team (collective). With feedback="none" and a dense compressor they are the mean over all workers,
        as Horovod's are (collective).
        """
        self._saef.synchronize()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Returns the context of Horovod's recipe for clipping: `with optimizer.skip_synchronize(): step()`.

        A step() within the context does not synchronize gradients again. Local.
        """
        return self._saef.skip_synchronize()

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sets how many backward passes add up before a step, as Horovod's does, from the next one on. Local.

        torch adds up gradients in any case; only overlap=True must know when they are complete. All ranks
        must set the same number, or the next step raises ConfigurationMismatchError.

        Raises TypeError or ValueError for anything but a whole number >= 1, RuntimeError between backward and
        step() with overlap=True.
        """
        self._saef.set_passes(passes)

    def train(self) -> None:
        """Moves the parameters to b (x, stepped ahead), where this worker trains. Idempotent, local."""
        self._saef.modes.train()

    def eval(self) -> None:
        """Moves the parameters to x, the same on all workers, to evaluate or save. Idempotent, local."""
        self._saef.modes.eval()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Returns a context, `with optimizer.consensus():`, in which the parameters are at x. Local.

        After the context the parameters are where they were before.
        """
        evaluating = self._saef.modes.evaluating
        self.eval()
        try:
            yield
        finally:
            if not evaluating:
                self.train()

    def flush(self) -> None:
        """Completes a round early, for the last steps of an epoch with local_steps > 1. Collective."""
        self._saef.flush()

    def consolidate(self) -> None:
        """Averages errors and momentum over the workers, once; completes a round first. Collective."""
        self._saef.consolidate()

    def reanchor(self) -> None:
        """Replaces x by rank 0's parameters as they are now, and clears the errors. Collective.

        Call this after parameters were changed in a way that the optimizer cannot see.
        """
        self._saef.reanchor()

    def stats(self) -> dict[str, float]:
        """Returns this worker's numbers since the optimizer was wrapped. Local.

        rounds and skipped (steps) are counts. payload_bytes_sent, payload_bytes_received,
        averaging_bytes_sent and dense_bytes_sent are bytes between workers, of all ranks of this worker
        together. So is ring_allreduce_bytes, the bytes that a float32 ring allreduce would have sent in the
        same rounds; compression_ratio is these bytes divided by all bytes sent. node_bytes_sent are the bytes
        that this rank sent to the rest of its team. error_norm and server_error_norm are the Euclidean norms
        of e and of this rank's part of s. seconds_<phase> are seconds spent in each phase; on a GPU, by its
        own clock, and this call waits for it.
        """
        return self._saef.stats()


@functools.cache
def _wrapped_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Returns a subclass of `base` with SaefMethods, which has the name of `base`, as Horovod's has."""

    # SaefMethods has no step(): Horovod's broadcast_optimizer_state calls
    # super(optimizer.__class__, optimizer).step(), which must be a local step of torch.
    class Wrapped(SaefMethods, base):  # type: ignore[misc, valid-type]
        _step_supports_amp_scaling = True
        _in_step = False
        _held: torch.optim.Optimizer | None = None

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Takes one local step and, every `local_steps`-th time, the exchange. Collective."""
            scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            return self._saef.step(self._local_step, closure, scale, overflow)

        step.hooked = True  # type: ignore[attr-defined]  # torch's step hooks fire in super().step()

        def _local_step(self) -> None:
            # Gradients are unscaled by now; a fused optimizer that saw the scale would unscale them again.
            scaler = {
                name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)
            }
            self.__dict__.update(dict.fromkeys(scaler))
            self._in_step = True
            try:
                with self._saef.modes.local_step(self):
                    super().step()
            except Exception as error:
                if self._held is None:
                    raise
                raise RuntimeError(
                    f"{base.__name__}.step() failed: {error}. It gets no closure: that was called before it. "
                    f"If it needs one, as SAM does: {wrap_the_held(self._held, base.__name__)}"
                ) from error
            finally:
                self._in_step = False
                self.__dict__.update(scaler)

        def state_dict(self) -> dict[str, Any]:
            """Returns the wrapped optimizer's state dict, with the library's state under "hvd_saef".

            Local: each worker has its own. NumPy's numbers in the groups (a learning rate, say) become
            Python's, so that torch.load accepts the file.
            """
            self._saef.refuse_under_way("state_dict()")  # else e and momentum are a step ahead of x
            self._saef.take_in()
            state_dict: dict[str, Any] = super().state_dict()
            # The dicts in "state" stay the optimizer's own, since Horovod's broadcast writes into them.
            state_dict["param_groups"] = python_numbers(state_dict["param_groups"])
            return state_dict | {"hvd_saef": self._saef.origin.export()}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Loads what state_dict() returned. Local; at the next step all workers agree who loaded what."""
            state_dict = dict(state_dict)
            ours = state_dict.pop("hvd_saef", None)
            self._saef.take_in()
            self._saef.exchange.wait_until_encoded()
            if ours is not None:
                self._saef.origin.check(ours, self._saef.parameters.with_state)
            super().load_state_dict(state_dict)
            inner = self._saef.inner  # torch has replaced both in `self` only
            inner.state, inner.param_groups = self.state, self.param_groups
            self._saef.origin.restore(ours, self._saef.parameters.with_state, bool(state_dict.get("state")))

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            """Adds a group as torch does. All workers must add the same one between two rounds.

            The errors of its parameters start at 0.
            """
            self._saef.check_growth()
            super().add_param_group(param_group)
            self._saef.grow()

    Wrapped.__name__, Wrapped.__qualname__ = base.__name__, base.__qualname__
    # Horovod's broadcast_optimizer_state decides by the class's module whether step() is collective.
    hvd = loaded_horovod()
    Wrapped.__module__ = hvd.DistributedOptimizer.__module__ if hvd else __name__
    return Wrapped


def share(inner: torch.optim.Optimizer) -> Any:
    """Returns an instance of the wrapped class that shares all with `inner`: groups, state and hooks."""
    wrapped = object.__new__(_wrapped_class(type(inner)))  # type: ignore[arg-type]
    # "step" is left out: a scheduler made before wrapping has put a patch of the inner step() there.
    vars(wrapped).update({name: value for name, value in vars(inner).items() if name != "step"})
    return wrapped
