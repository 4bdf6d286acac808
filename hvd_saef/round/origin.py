"""Where x, e and s come from: at the first step, after loading, and on reanchor()."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_saef.errors import ConfigurationMismatchError, ExchangeError
from hvd_saef.memory.layout import Layout
from hvd_saef.memory.progress import Progress
from hvd_saef.memory.state import State
from hvd_saef.round.agreement import BROKEN_ADVICE, check_configuration, check_consensus
from hvd_saef.round.loaded import Held, Loaded
from hvd_saef.round.modes import Modes
from hvd_saef.round.state_dict import check_state, export_state
from hvd_saef.settings import Settings
from hvd_saef.transport.background import flushes_denormals
from hvd_saef.transport.communicator import Communicator

BROADCAST_ADVICE = (
    "All workers must start from the same parameters: call hvd.broadcast_parameters(model.state_dict(), "
    "root_rank=0) before the first step, and after hvd.broadcast_optimizer_state(), which may move them. "
    "Nothing may write to them after that but step(): nn.Embedding(max_norm=...) does so in its forward pass."
)


class Source(enum.Enum):
    """Where one worker's x comes from."""

    PARAMETERS = "parameters"
    """It was just wrapped, or its parameters were replaced: x is what they hold."""
    LOADED = "loaded"
    """Its optimizer's state was loaded, ours in it."""
    KEPT = "kept"
    """It goes on with what it has."""


@dataclass(frozen=True)
class Standing:
    """What one worker brings when all agree where x, e and s come from."""

    source: Source
    rounds: int
    local_steps_done: int
    consolidated: bool
    """Whether its e is everyone's, and it has all of s."""
    held: Held
    """What its loaded state holds."""


class Origin:
    """Takes x, e and s into `modes.state`, once all workers have agreed on where they come from."""

    def __init__(
        self, communicator: Communicator, settings: Settings, modes: Modes, progress: Progress
    ) -> None:
        self._flushed = False
        self._settled = False
        """Whether all workers agreed, since the last wrapping, loading or growing here."""
        self._whole_server_errors: dict[str, Any] | None = None
        """After consolidate(), until the next round: all of s, so that one worker's state is everyone's."""
        self._source = Source.PARAMETERS
        self._broken = False
        self._loaded = Loaded()
        self._communicator = communicator
        self._settings = settings
        self._modes = modes
        self._progress = progress

    @property
    def consolidated(self) -> bool:
        """Whether e is the same on all workers, and all of s is here."""
        return self._whole_server_errors is not None

    def x(self, layout: Layout) -> Mapping[str, Tensor]:
        """The consensus point by parameter name: views. The parameters, where no other x is kept."""
        kept = self._modes.state.views_of("x") if self._modes.state else {}
        return kept or {slot.name: slot.parameter for slot in layout.slots}

    # -- at the first step after wrapping or loading, collective --------------------------------------

    def agree(self, layout: Layout, with_state: Layout, facts: Mapping[str, Any]) -> None:
        """Agree where x, e and s come from, and take them. Collective.

        Workers must agree on `layout` and `facts`; `with_state` is the part of it that has x and errors.
        """
        check_configuration(self._communicator, layout, facts)
        rounds, steps = self._progress.rounds, self._progress.local_steps_done
        mine = Standing(self._source, rounds, steps, self.consolidated, self._loaded.held)
        everyone: list[Standing] = self._communicator.allgather_object(mine)
        loaded = [rank for rank, standing in enumerate(everyone) if standing.source is Source.LOADED]
        new = [rank for rank, standing in enumerate(everyone) if standing.source is Source.PARAMETERS]
        if len(loaded) == len(everyone):
            self._go_on_as_loaded(everyone)
        elif loaded:
            self._take_all_from(loaded[0], everyone[loaded[0]], with_state)
        elif new:
            if len(new) < len(everyone):
                self._broadcast_parameters(layout, new[0])
            self._take_parameters(with_state)
        check_consensus(self._communicator, {**self.x(layout), **self._server_errors()}, BROADCAST_ADVICE)
        self._agreed_now()

    def renew(self, layout: Layout, with_state: Layout, facts: Mapping[str, Any]) -> None:
        """Take x from rank 0's parameters as they are, and clear the errors. Collective."""
        check_configuration(self._communicator, layout, facts)
        self._broadcast_parameters(layout, 0)
        self._take_parameters(with_state)
        self._agreed_now()
        self._broken = False

    def is_agreed(self) -> bool:
        """The same as :attr:`agreed`, to be passed on."""
        return self.agreed

    def forget_agreement(self) -> None:
        """Let all workers agree anew at what they do together next."""
        self._settled = False

    def broke(self) -> None:
        """An exchange failed somewhere: what is here is not to be trained on."""
        self._settled, self._broken = False, True

    def consolidated_with(self, server_errors: dict[str, Any]) -> None:
        """Note that e is the same on all workers, and what all of s is. Local."""
        self._whole_server_errors = server_errors

    def forget_consolidation(self) -> None:
        """A round is completed: e and s are each worker's own again. Local."""
        self._whole_server_errors = None

    def check_whole(self) -> None:
        """Raise ExchangeError if an exchange failed, and x was not taken anew since."""
        if self._broken:
            raise ExchangeError(f"the exchange of an earlier round failed. {BROKEN_ADVICE}")

    def _agreed_now(self) -> None:
        self._settled, self._source, self._loaded = True, Source.KEPT, Loaded()
        self._flushed = flushes_denormals()

    @property
    def agreed(self) -> bool:
        """Whether all workers agreed, and this thread's arithmetic is what it was then."""
        return self._settled and self._flushed == flushes_denormals()

    def _broadcast_parameters(self, layout: Layout, root: int) -> None:
        for slot in layout.slots:
            self._communicator.broadcast(slot.parameter, root)

    def _new_state(self, with_state: Layout) -> State:
        communicator = self._communicator
        return State(with_state, self._settings, communicator.worker, communicator.workers, self._progress)

    def _take_parameters(self, with_state: Layout) -> None:
        self._anchor(self._modes.state or self._new_state(with_state))

    def _anchor(self, state: State) -> None:
        """Take x from the parameters here, and clear the errors: what was known of them is over too."""
        state.anchor()
        self._whole_server_errors = None
        self._modes.begin(state)

    def _go_on_as_loaded(self, everyone: list[Standing]) -> None:
        steps = [(standing.rounds, standing.local_steps_done) for standing in everyone]
        if len(set(steps)) > 1:
            raise ConfigurationMismatchError(
                f"workers loaded states of different steps: (rounds, local steps) are {steps}, by rank. "
                "Load the same checkpoint everywhere."
            )
        if not all(standing.consolidated for standing in everyone):
            self._whole_server_errors = None
        state = self._modes.state
        if state and state.buckets:
            begins, lost = self._loaded.go_on(self._communicator, state, [one.held for one in everyone])
            if begins:
                self._loaded.points = None
                self._progress.undid_steps()
            self._warn_of_loss(lost)
        self._modes.to_start(self._loaded.points)  # the model may have been loaded after the optimizer

    @torch.no_grad()
    def _take_all_from(self, root: int, standing: Standing, with_state: Layout) -> None:
        """Only some workers were loaded: take x, s and t of worker `root`; its e too if it is everyone's.

        Its local steps since the last round are taken up into the errors of all.
        """
        state = self._modes.state or self._new_state(with_state)
        self._progress.restored(standing.rounds)
        held, mine = standing.held, self._communicator.rank == root
        if not mine:
            self._whole_server_errors = None
        updates = self._loaded.updates(state) if mine else []
        for i, bucket in enumerate(state.buckets):
            self._communicator.broadcast(bucket.x, root)
            if standing.consolidated:
                self._communicator.broadcast(bucket.e, root)
            else:
                bucket.e.zero_()
            if held.reached:
                update = updates[i] if mine else bucket.bucket.new_flat()
                self._communicator.broadcast(update, root)
                bucket.e.add_(update)
            if held.pieces or bucket.s is not None:
                whole = bucket.bucket.new_flat()
                if mine and self._loaded.has_all_of(bucket):
                    whole = self._loaded.server_error(bucket)
                self._communicator.broadcast(whole, root)
                if bucket.s is None:
                    bucket.e.add_(whole)
                else:
                    part = bucket.parts[bucket.mine]
                    bucket.s.copy_(whole[part.start : part.stop])
        lost = [] if standing.consolidated else ["the workers' errors"]
        if not held.whole:
            lost.append("the sharded server's error")
        if held.reached:
            lost.append("the other workers' local steps since the last round")
        self._modes.begin(state)
        if state.buckets:
            self._warn_of_loss(lost, f"only rank {root} was loaded: ")

    def _warn_of_loss(self, lost: list[str], why: str = "") -> None:
        if lost and self._communicator.rank == 0:
            warnings.warn(
                f"{why}the loaded state does not hold all of {' and '.join(lost)}, cleared on all workers. "
                "Let every rank save and load its own optimizer.state_dict().",
                stacklevel=2,
            )

    def _server_errors(self) -> dict[str, Tensor]:
        """What a replicated server keeps, which must be the same on all workers, too."""
        buckets = self._modes.state.buckets if self._modes.state else []
        return {
            f"the server's error {state.bucket.index}": state.s
            for state in buckets
            if state.s is not None and not state.sharded
        }

    # -- what happens between two steps, local ---------------------------------------------------------

    def grow(self, layout: Layout) -> None:
        """Parameters were added: they start at their present values, without errors."""
        self._settled, self._whole_server_errors = False, None
        added = self._modes.grow(layout)
        if self._loaded.points is not None:
            self._loaded.points += added

    def parameters_replaced(self) -> None:
        """A state was loaded into the model: x is that, unless it was so before."""
        state = self._modes.state
        if state is None or not state.buckets:
            return
        if state.shows_x() and not self._broken:
            return  # where a hook had brought the parameters: the training point is kept
        steps = self._local_steps()
        self._anchor(state)
        self._broken = False
        self._settled, self._source, self._loaded = False, Source.PARAMETERS, Loaded()
        warnings.warn(
            "a state was loaded into the model: the consensus point x is taken from it, and all compression "
            f"errors are cleared{steps}. To keep them, load the optimizer's state too.",
            stacklevel=4,
        )

    def _local_steps(self) -> str:
        """Those that go with the errors, in words."""
        steps = self._progress.local_steps_done
        return f", with {steps} local step{'s' if steps > 1 else ''} since the last round" if steps else ""

    # -- state dicts, local ---------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """What stands under "hvd_saef" in the state dict: plain numbers and copies of tensors."""
        return export_state(
            self._communicator, self._settings, self._modes, self._loaded, self._whole_server_errors
        )

    def check(self, saved: Mapping[str, Any], with_state: Layout) -> None:
        """Raise ValueError, before anything changes, if `saved` is not a state for these parameters."""
        check_state(saved, with_state, self._settings, self._communicator.workers)

    def restore(self, saved: Mapping[str, Any] | None, with_state: Layout, resumed: bool) -> None:
        """Take what :meth:`check` found fitting; without x in it, x is taken at the next step.

        `resumed`: the torch optimizer's part is that of an optimizer that has taken steps.
        """
        if saved is None:
            self._take_plain_state(with_state, resumed)
        self._settled = self._broken = False
        self._whole_server_errors, self._loaded = None, Loaded()
        if saved is None or not State.is_in(saved):
            self._source = Source.PARAMETERS
            self._progress.restored()
            self._modes.begin(None)
            return
        self._source = Source.LOADED
        state = self._modes.state or self._new_state(with_state)
        serves = state.restore(saved)
        self._whole_server_errors = saved["server_errors"] if saved["consolidated"] else None
        own = self.consolidated or saved["rank"] == self._communicator.worker
        self._loaded = Loaded.of(saved, with_state, own, serves)
        self._progress.restored(int(saved["rounds"]), int(saved["local_steps_done"]))
        self._modes.begin(state, self._loaded.points)

    def _take_plain_state(self, with_state: Layout, resumed: bool) -> None:
        """A state without ours: say what is gone, and leave x in the parameters."""
        began = self._modes.state is not None
        if with_state.buckets and (began or (resumed and self._communicator.rank == 0)):
            gone = f"rounds begin at 0, and all compression errors are cleared{self._local_steps()}"
            warnings.warn(
                "a state without 'hvd_saef' was loaded into the optimizer: the consensus point x is taken "
                f"from its parameters, {gone if began else 'rounds and errors begin at 0'}. If it is of an "
                "optimizer of torch, all is well. If it was one of hvd_saef's, something has dropped the key "
                "(torch.distributed.checkpoint's get_state_dict does): save optimizer.state_dict() as it is, "
                "or call hvd_saef.save_checkpoint.",
                stacklevel=4,
            )
        self._modes.let_go()
