"""Decides where x, e and s come from: at the first step, after loading, and on reanchor()."""

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
    "root_rank=0) before the first step, and after hvd.broadcast_optimizer_state(), which may move them; "
    "with torch.distributed, seed all ranks alike or call torch.distributed.broadcast(p.data, 0) for each p. "
    "Nothing may write to them after that but step(): nn.Embedding(max_norm=...) does so in its forward pass."
)


class Source(enum.Enum):
    """Where one worker's x comes from."""

    PARAMETERS = "parameters"
    """The worker was just wrapped, or its parameters were replaced: x is taken from the parameters."""
    LOADED = "loaded"
    """An optimizer state with the part "hvd_saef" was loaded: x is taken from it."""
    KEPT = "kept"
    """The worker keeps the x that it has."""


@dataclass(frozen=True)
class Standing:
    """What one worker reports when all workers agree where x, e and s come from."""

    source: Source
    rounds: int
    local_steps_done: int
    consolidated: bool
    """True after consolidate(): e is the mean of all workers' e, and this worker has all of s."""
    held: Held
    """The description of the worker's loaded state."""


class Origin:
    """Takes x, e and s into `modes.state`, once all workers have agreed on where they come from."""

    def __init__(
        self, communicator: Communicator, settings: Settings, modes: Modes, progress: Progress
    ) -> None:
        self._flushed = False
        self._settled = False
        """True if all workers have agreed since the last wrapping, loading or growing on this rank."""
        self._whole_server_errors: dict[str, Any] | None = None
        """All of s, from consolidate() to the next round: any worker's state then serves all workers."""
        self._source = Source.PARAMETERS
        self._broken = False
        self._loaded = Loaded()
        self._communicator = communicator
        self._settings = settings
        self._modes = modes
        self._progress = progress

    @property
    def consolidated(self) -> bool:
        """True if e is the same on all workers and this worker has all of s. Local."""
        return self._whole_server_errors is not None

    def x(self, layout: Layout) -> Mapping[str, Tensor]:
        """Returns views of x by parameter name, or the parameters where no other x is kept. Local."""
        kept = self._modes.state.views_of("x") if self._modes.state else {}
        return kept or {slot.name: slot.parameter for slot in layout.slots}

    # -- at the first step after wrapping or loading, collective --------------------------------------

    def agree(self, layout: Layout, with_state: Layout, facts: Mapping[str, Any]) -> None:
        """Agrees with all workers where x, e and s come from, and takes them from there. Collective.

        Workers must agree on `layout` and `facts`; `with_state` is the part of `layout` with x and errors.
        Raises ConfigurationMismatchError or ConsensusError on all ranks if they differ.
        """
        check_configuration(self._communicator, layout, facts)
        self._loaded = self._loaded.with_writes(self._modes)
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
            self._progress.restored(everyone[new[0]].rounds)  # some ranks may load a plain state
            self._take_parameters(with_state)
        check_consensus(self._communicator, {**self.x(layout), **self._server_errors()}, BROADCAST_ADVICE)
        self._agreed_now()

    def renew(self, layout: Layout, with_state: Layout, facts: Mapping[str, Any]) -> None:
        """Takes x from rank 0's parameters as they are now, and clears e and s. Collective."""
        check_configuration(self._communicator, layout, facts)
        self._broadcast_parameters(layout, 0)
        self._progress.restored(self._communicator.allgather_object(self._progress.rounds)[0])
        self._take_parameters(with_state)
        self._agreed_now()
        self._broken = False

    def forget_agreement(self) -> None:
        """Lets all workers agree again at their next collective call. Local."""
        self._settled = False

    def broke(self) -> None:
        """Notes that an exchange failed on some rank, so that training cannot continue from here. Local."""
        self._settled, self._broken = False, True

    def consolidated_with(self, server_errors: dict[str, Any]) -> None:
        """Notes that e is the same on all workers, and keeps `server_errors`, all of s. Local."""
        self._whole_server_errors = server_errors

    def forget_consolidation(self) -> None:
        """Notes that an exchange begins, after which e differs between workers again. Local."""
        self._whole_server_errors = None

    def check_whole(self) -> None:
        """Raises ExchangeError if an exchange failed and x was not taken anew since then. Local."""
        if self._broken:
            raise ExchangeError(f"the exchange of an earlier round failed. {BROKEN_ADVICE}")

    def _agreed_now(self) -> None:
        if self._whole_server_errors is not None and self._source is Source.LOADED and self._modes.state:
            self._whole_server_errors = self._loaded.all_server_errors(self._modes.state)
        self._settled, self._source, self._loaded = True, Source.KEPT, Loaded()
        self._flushed = flushes_denormals()

    def is_agreed(self) -> bool:
        """True if all workers have agreed, and this thread treats denormal numbers as it did then. Local."""
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
        """Takes x from this rank's parameters, and clears e and s and the note of a consolidation."""
        state.anchor()
        self._whole_server_errors = None
        self._modes.begin_here(state)

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
                self._whole_server_errors = self._loaded.training_point = None
                self._progress.undid_steps()
            self._warn_of_loss(lost)
        # The model may have been loaded after the optimizer.
        self._modes.to_start(self._loaded.training_point)

    @torch.no_grad()
    def _take_all_from(self, root: int, standing: Standing, with_state: Layout) -> None:
        """Takes x, s and t from rank `root`, since only some ranks were loaded. Collective.

        The e of `root` is taken too if it is consolidated; otherwise e becomes zero. The local steps of
        `root` since the last round are added to e on all workers.
        """
        state = self._modes.state or self._new_state(with_state)
        self._progress.restored(standing.rounds)
        held, mine = standing.held, self._communicator.rank == root
        if not mine or not self._settings.double_compression:
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
        """Returns s of the buckets with a replicated server, which must be the same on all workers."""
        buckets = self._modes.state.buckets if self._modes.state else []
        return {
            f"the server's error {state.bucket.index}": state.s
            for state in buckets
            if state.s is not None and not state.sharded
        }

    # -- what happens between two steps, local ---------------------------------------------------------

    def grow(self, layout: Layout) -> None:
        """Adds the new parameters of `layout`, at their present values and without errors. Local."""
        self._settled, self._whole_server_errors = False, None
        added = self._modes.grow(layout)
        if self._loaded.training_point is not None:
            self._loaded.training_point += added

    def parameters_replaced(self) -> None:
        """Takes x from the parameters after a state was loaded into the model, unless they hold x already."""
        state = self._modes.state
        if state is None or not state.buckets:
            return
        if state.shows_x() and not self._broken:
            return  # a hook had moved the parameters to x: the training point is kept
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
        """Returns in words, for a warning, the local steps that are lost with the errors; "" if none."""
        steps = self._progress.local_steps_done
        return f", with {steps} local step{'s' if steps > 1 else ''} since the last round" if steps else ""

    # -- state dicts, local ---------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """Returns the part "hvd_saef" of the state dict: plain numbers and copies of tensors."""
        return export_state(
            self._communicator, self._settings, self._modes, self._loaded, self._whole_server_errors
        )

    def check(self, saved: Mapping[str, Any], with_state: Layout) -> None:
        """Raises ValueError if `saved` is not a state for these parameters; changes nothing."""
        check_state(saved, with_state, self._settings, self._communicator.workers)

    def restore(self, saved: Mapping[str, Any] | None, with_state: Layout, resumed: bool) -> None:
        """Takes x, e and s from `saved`, which :meth:`check` has accepted; None if a state lacks this part.

        Without x in `saved`, x is taken from the parameters at the next step. `resumed` is True if the torch
        optimizer's part of the state is of an optimizer that has taken steps.
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
        self._modes.begin(state, self._loaded.training_point)

    def _take_plain_state(self, with_state: Layout, resumed: bool) -> None:
        """Warns of what is lost with a state without the part "hvd_saef", and moves the parameters to x."""
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
