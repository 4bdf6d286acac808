"""The order of things in a step, for one wrapped optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.agreement import Word, agree, check_configuration, check_consensus
from hvd_saef.communicator import Communicator
from hvd_saef.errors import ConfigurationMismatchError, NonFiniteUpdateError
from hvd_saef.exchange import Exchange
from hvd_saef.layout import ChooseCompressor, Layout, build_layout
from hvd_saef.modes import Modes
from hvd_saef.settings import Settings
from hvd_saef.state import State
from hvd_saef.statistics import Statistics

BROADCAST_ADVICE = (
    "All workers must start from the same parameters: call hvd.broadcast_parameters(model.state_dict(), "
    "root_rank=0) before the first step."
)


class Session:
    """Everything that is ours about a wrapped optimizer. Methods are local unless they say collective."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[Tensor, str],
        choose: ChooseCompressor,
        settings: Settings,
        communicator: Communicator,
        check_consensus_every: int,
    ) -> None:
        self.optimizer = optimizer
        self.names = names
        self.settings = settings
        self.communicator = communicator
        self.statistics = Statistics()
        self.exchange = Exchange(communicator, settings, self.statistics)
        self.modes = Modes(self.exchange)
        self._choose = choose
        self._check_consensus_every = check_consensus_every
        self._layout: Layout | None = None
        self._anchored = False
        self._loaded = False
        self._skip_synchronize = False
        self._rounds_without_state = 0
        self._loaded_points: list[Tensor] | None = None
        self._consolidated = False

    # -- what there is ------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The buckets, laid out when first asked for."""
        if self._layout is None:
            self._layout = build_layout(self.optimizer.param_groups, self.names, self._choose, self.settings)
            self._warn_of_large_block(self._layout)
        return self._layout

    @property
    def averages_gradients(self) -> bool:
        """Whether to do Horovod's arithmetic: nothing is compressed and nothing fed back."""
        return self.settings.feedback == "none" and self.settings.local_steps == 1 and self.layout.dense

    @property
    def rounds(self) -> int:
        """t: completed rounds."""
        return self._rounds_without_state if self.modes.state is None else self.modes.state.rounds

    def consensus(self) -> dict[str, Tensor]:
        """x by parameter name: views."""
        if self.modes.state is None:
            return {slot.name: slot.parameter for slot in self.layout.slots}
        return self.modes.state.views_of("x")

    def _warn_of_large_block(self, layout: Layout) -> None:
        workers = self.communicator.size
        if not self.settings.sharded(workers) or self.communicator.rank != 0:
            return
        share, name = layout.largest_share()
        if share * workers > 2:
            warnings.warn(
                f"the largest block, of parameter {name!r}, is {share:.0%} of all that is compressed: the "
                f"worker that serves it sends {share * workers:.1f} times the others' share. "
                "Set block_size to cut it, or server='replicated'.",
                stacklevel=2,
            )

    # -- a step ---------------------------------------------------------------------------------------

    def step(self, local_step: Callable[[], Any], closure: Callable[[], Any] | None) -> Any:
        """One local step, and the exchange if it is the round's last. Collective."""
        loss, failure, word = None, None, Word.NOTHING
        try:
            self.modes.before_step()
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            word = self._prepare_gradients()
        except Exception as error:  # raised again below, once everyone knows
            failure = error
        if self._agree(word, failure):
            self.statistics.skipped += 1
            return loss
        if self.averages_gradients and not self._skip_synchronize:
            self.exchange.average_gradients(self.layout)
        with self.statistics.phase("local_step"):
            local_step()
        self.modes.local_steps_done += 1
        if self.modes.local_steps_done >= self.settings.local_steps:
            self.flush()
        return loss

    def _prepare_gradients(self) -> Word:
        """Make gradients dense, unscale them, and say what is wrong with them."""
        for slot in self.layout.slots:
            gradient = slot.parameter.grad
            if gradient is not None and gradient.is_sparse:
                if not self.settings.sparse_as_dense:
                    raise TypeError(
                        f"the gradient of {slot.name!r} is sparse: pass sparse_as_dense=True, or make it "
                        "dense (for an Embedding: sparse=False)."
                    )
                slot.parameter.grad = gradient.to_dense()
        found_inf: Tensor | None = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item() > 0:
            return Word.OVERFLOW
        scale: Tensor | None = getattr(self.optimizer, "grad_scale", None)
        gradients = [s.parameter.grad for s in self.layout.slots if s.parameter.grad is not None]
        if scale is not None:
            with torch.no_grad():
                for gradient in gradients:
                    gradient.div_(scale.to(gradient.device))
        finite = all(_is_finite(gradient) for gradient in gradients)
        return Word.NOTHING if finite else Word.NONFINITE

    def _agree(self, word: Word, failure: Exception | None) -> bool:
        """Whether all skip this step. Collective; takes x, e and s where a worker was new."""
        with self.statistics.phase("agreement"):
            combined = agree(
                self.communicator, word | (Word.NOTHING if self._anchored else Word.ANCHOR), failure
            )
            if Word.ANCHOR in combined:
                self._anchor()
            if Word.NONFINITE in combined and self.settings.on_nonfinite == "raise":
                self._raise_nonfinite()
        return bool(combined & (Word.OVERFLOW | Word.NONFINITE))

    def _raise_nonfinite(self) -> None:
        bad = [
            slot.name
            for slot in self.layout.slots
            if slot.parameter.grad is not None and not _is_finite(slot.parameter.grad)
        ]
        everyone = self.communicator.allgather_object(bad[:1])
        who = ", ".join(f"{names[0]!r} on rank {rank}" for rank, names in enumerate(everyone) if names)
        raise NonFiniteUpdateError(
            f"a gradient holds a NaN or an infinity: {who}. The step was not taken anywhere. Lower the "
            "learning rate, clip gradients, or pass on_nonfinite='skip' to skip such steps."
        )

    def flush(self) -> None:
        """Complete the round now, if any local step was taken since the last. Collective."""
        if self.modes.local_steps_done == 0:
            return
        state = self.modes.state
        self.modes.leave_x()
        evaluating = self.modes.evaluating
        self.modes.train()
        self.modes.local_steps_done = 0
        self._consolidated = False
        if state is None:
            self._rounds_without_state += 1
        else:
            self.exchange.complete_round(state)
        if evaluating:
            self.modes.eval()
        if self._check_consensus_every and self.rounds % self._check_consensus_every == 0:
            with self.statistics.phase("agreement"):
                check_consensus(self.communicator, self.consensus(), "Call optimizer.reanchor() to go on.")

    def check_can_grow(self) -> None:
        """Raise RuntimeError once training began."""
        if self._anchored or self.modes.state is not None:
            raise RuntimeError(
                "add_param_group after the first step is not available yet: add all groups before it."
            )

    def grow(self) -> None:
        """Lay out anew, after a parameter group was added."""
        for i, group in enumerate(self.optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                self.names.setdefault(parameter, f"noname.{i}.{j}")
        self._layout = None

    # -- where x, e and s come from -------------------------------------------------------------------

    def _anchor(self) -> None:
        """Agree who was loaded, and take x, e and s accordingly. Collective."""
        check_configuration(self.communicator, self.layout)
        mine = (self._loaded, self.rounds, self.modes.local_steps_done, self._consolidated)
        everyone = self.communicator.allgather_object(mine)
        loaded = [rank for rank, (was_loaded, *_) in enumerate(everyone) if was_loaded]
        if self.averages_gradients:
            self._rounds_without_state = everyone[loaded[0]][1] if loaded else self.rounds
        elif not loaded:
            self._take_x_from_parameters()
        elif len(loaded) == len(everyone):
            if len({counts[1:3] for counts in everyone}) > 1:
                raise ConfigurationMismatchError(
                    "workers loaded states of different steps: (rounds, local steps) are "
                    f"{[counts[1:3] for counts in everyone]}, by rank. Load the same checkpoint everywhere."
                )
            self.modes.to_start(self._loaded_points)  # the model may have been loaded after the optimizer
        else:
            self._take_all_from(loaded[0], consolidated=everyone[loaded[0]][3])
        check_consensus(self.communicator, self.consensus(), BROADCAST_ADVICE)
        self._anchored, self._loaded, self._loaded_points = True, False, None

    def _take_x_from_parameters(self) -> None:
        if self.modes.state is None:
            self.modes.state = State(
                self.layout, self.settings, self.communicator.rank, self.communicator.size
            )
        self.modes.state.anchor()
        self.modes.local_steps_done = 0

    def _take_all_from(self, root: int, consolidated: bool) -> None:
        """Only some ranks were loaded: everyone takes x, s and t of `root`, and e if it is everyone's."""
        if self.modes.state is None:
            self._take_x_from_parameters()
        state = self.modes.state
        if state is None:
            return
        for bucket_state in state.buckets:
            self.communicator.broadcast(bucket_state.x, root)
            if consolidated:
                self.communicator.broadcast(bucket_state.e, root)
            else:
                bucket_state.e.zero_()
            if bucket_state.s is not None:
                if bucket_state.sharded:
                    bucket_state.s.zero_()
                else:
                    self.communicator.broadcast(bucket_state.s, root)
        state.rounds = self.communicator.allgather_object(state.rounds)[root]
        self.modes.local_steps_done = 0
        self.modes.to_start()
        lost = [] if consolidated else ["the workers' errors"]
        if any(s.sharded for s in state.buckets):
            lost.append("the sharded server's error")
        if lost and self.communicator.rank == 0:
            warnings.warn(
                f"only rank {root} was loaded, and its state does not hold all of {' and '.join(lost)}: "
                "cleared on all workers. Let every rank save and load its own optimizer.state_dict().",
                stacklevel=2,
            )

    def reanchor(self) -> None:
        """Take x anew from rank 0's parameters, clear the errors, start a round there. Collective."""
        check_configuration(self.communicator, self.layout)
        with torch.no_grad():
            for slot in self.layout.slots:
                self.communicator.broadcast(slot.parameter, 0)
        if not self.averages_gradients:
            rounds = self.rounds
            self._take_x_from_parameters()
            if self.modes.state is not None:
                self.modes.state.rounds = rounds
        self._anchored, self._loaded = True, False

    # -- synchronize, consolidate ---------------------------------------------------------------------

    def synchronize(self) -> None:
        """Horovod's: averages gradients where gradients are averaged (collective), else nothing."""
        if self.averages_gradients:
            if not self._anchored:
                self._agree(Word.NOTHING, None)
            self.exchange.average_gradients(self.layout)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Horovod's: step() inside does not average gradients again."""
        self._skip_synchronize = True
        try:
            yield
        finally:
            self._skip_synchronize = False

    def consolidate(self) -> None:
        """One averaging of errors and of the optimizer's state tensors, at a round's start. Collective."""
        self.flush()
        if not self._anchored:
            self._agree(Word.NOTHING, None)
        if self.modes.state is not None:
            self.exchange.average_errors(self.modes.state)
            self.modes.to_start()
        self._average_optimizer_state()
        self._consolidated = True

    def _average_optimizer_state(self) -> None:
        """Means over workers of every floating state tensor that has its parameter's shape."""
        for bucket in self.layout.buckets:
            for slot in bucket.slots:
                mine = self.optimizer.state.get(slot.parameter, {})
                keys = {key for key, value in mine.items() if _is_moment(value, slot.parameter)}
                theirs = self.communicator.allgather_object(sorted(keys))
                for key in sorted({key for names in theirs for key in names}):
                    # A worker that has had no gradient yet adds zero, and keeps its empty state.
                    moment = mine[key] if key in keys else torch.zeros_like(slot.parameter)
                    self.communicator.allreduce_mean(moment, f"state.{slot.name}.{key}")

    # -- state dicts ----------------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """What stands under "hvd_saef" in the state dict: plain numbers and copies of tensors."""
        exported: dict[str, Any] = {"version": 1, "settings": self.settings.describe(), "rounds": self.rounds}
        exported["skipped"] = self.statistics.skipped
        exported["local_steps_done"] = self.modes.local_steps_done
        exported["consolidated"] = self._consolidated
        if self.modes.state is not None:
            exported |= self.modes.state.export()
            exported["reached"] = self.modes.points()
        return exported

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError if `saved` is not a state of ours for these parameters."""
        if saved.get("version") != 1:
            raise ValueError(
                f"the state under 'hvd_saef' is of version {saved.get('version')!r}: 1 is allowed."
            )
        if "x" in saved:
            State.check(saved, self.layout)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`export`; None for a state dict without ours, after which x is taken anew."""
        self._anchored = False
        self._loaded = saved is not None
        if saved is None or "x" not in saved:
            self.modes.state = None
            self.modes.local_steps_done = 0
            self._rounds_without_state = int(saved["rounds"]) if saved is not None else 0
            self._loaded = self._loaded and self._rounds_without_state > 0
            return
        if self.modes.state is None:
            self.modes.state = State(
                self.layout, self.settings, self.communicator.rank, self.communicator.size
            )
        self.modes.state.restore(saved)
        self.statistics.skipped = int(saved["skipped"])
        self.modes.local_steps_done = int(saved["local_steps_done"])
        self._consolidated = bool(saved["consolidated"])
        self._loaded_points = saved["reached"]
        self.modes.to_start(self._loaded_points)

    def stats(self) -> dict[str, float]:
        """See :func:`hvd_saef.DistributedOptimizer`."""
        e, s = (0.0, 0.0) if self.modes.state is None else self.modes.state.error_norms()
        return {"rounds": self.rounds} | self.statistics.as_dict() | {"error_norm": e, "server_error_norm": s}


def _is_finite(gradient: Tensor) -> bool:
    """One pass: a sum is finite if all terms are; a sum that is not may have overflowed, so look again."""
    if bool(torch.isfinite(gradient.detach().sum())):
        return True
    return bool(torch.isfinite(gradient).all())


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
