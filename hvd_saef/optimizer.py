"""The function that users call, `hvd_saef.DistributedOptimizer`, which takes Horovod's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hvd_saef.arguments import (
    Workers,
    advise_on_adaptive_rates,
    check_horovod_arguments,
    check_optimizer,
    compressor_chooser,
    give_advice,
    groups_of,
    models_of,
    name_parameters,
    warn_of_large_block,
)
from hvd_saef.compression import Compression
from hvd_saef.memory.layout import ChooseCompressor, averages_gradients, build_layout
from hvd_saef.modules import advise_on_unused_rows, refuse_writing_modules
from hvd_saef.other_steps import refuse_steps_past_ours, undo_horovods_initial_step
from hvd_saef.round.determinism import check_compressors
from hvd_saef.round.parameters import Parameters
from hvd_saef.round.session import Session
from hvd_saef.settings import Feedback, OnNonfinite, Server, Settings, Weights, check_passes
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.teams import find_workers
from hvd_saef.transport.together import together
from hvd_saef.wrapped import SaefMethods, share


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.sign,
    backward_passes_per_step: int = 1,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    model: nn.Module | Sequence[nn.Module] | None = None,
    feedback: Feedback = "saef",
    step_ahead: float = 1.0,
    server_step_ahead: float = 0.0,
    double_compression: bool = True,
    averaging_period: int | None = None,
    averaging_spread: bool = False,
    averaging_fp16: bool = False,
    local_steps: int = 1,
    warmup_steps: int = 0,
    block_size: int | None = None,
    dense_below: int = 0,
    server: Server = "auto",
    bucket_bytes: int = Settings.bucket_bytes,
    overlap: bool = False,
    on_nonfinite: OnNonfinite = "raise",
    check_consensus_every: int = 0,
    worker: Workers = "rank",
    weights: Weights = "equal",
    process_group: Any = None,
) -> Any:
    """Wrap `optimizer` so that each step exchanges compressed updates with step-ahead error feedback.

    Collective over the process set, as all of the returned optimizer's methods are that say so.
    The arguments before `model` are `horovod.torch.DistributedOptimizer`'s, in its order.

    Args:
        optimizer: the torch optimizer that takes the local steps. It is shared, not copied: its
            param_groups and state are the returned optimizer's. Momentum stays local.
        named_parameters: names for messages and state dicts, usually model.named_parameters().
        compression: `Compression.sign` (1 bit a parameter), `.topk(0.01)` (the largest 1 %; 4 instead of 6
            bytes an entry with `value_dtype=torch.float16` or `torch.bfloat16`), `.none`, `.fp16`, a
            `Compressor` of your own, one of Horovod's own two, or a callable
            `(name, parameter) -> Compressor`.
        backward_passes_per_step: backward passes whose gradients add up before step().
        op: `hvd.Average` only, which None stands for.
        gradient_predivide_factor: 1.0 only.
        num_groups: without effect.
        groups: without effect; buckets are formed by `bucket_bytes`.
        sparse_as_dense: make sparse gradients dense (not for SparseAdam, which takes none). Else the
            local step takes them as they are; where gradients are averaged, they are refused.
        process_set: the Horovod process set whose ranks are the workers, others train alone; None is
            `hvd.global_process_set`.
        model: with it, forward passes in eval mode and model.state_dict() see x by themselves. It is a
            module, or a list of the modules that you call; a container without a forward of its own counts as
            its children.
        feedback: "saef" is step-ahead error feedback, "ef" is plain error feedback, "none" is no feedback.
            "none" with an uncompressed `compression` is Horovod's own arithmetic.
        step_ahead: α in [0, 1]: how far each worker steps ahead by its own error; only with "saef". A smaller
            α is closer to plain error feedback.
        server_step_ahead: β in [0, 1]: how far each worker steps ahead by the server's error too. β > 0 needs
            "saef", double-way compression and a replicated server, which sends more bytes.
        double_compression: True compresses the server's answer too: double-way compression (DC). False is
            single-way compression (SC).
        averaging_period: p >= 2: the errors are averaged every p rounds, by a ring allreduce. A smaller p
            means less gradient mismatch and more bytes. None is never.
        averaging_spread: with True, each bucket is averaged in a round of its own among the p rounds, instead
            of all buckets in one round.
        averaging_fp16: with True, errors are averaged in float16; what that rounds away stays in each
            worker's error.
        local_steps: H >= 1: the number of local steps in a round, which ends with one exchange; `flush()`
            completes a round early. A larger H means fewer bytes, and workers that are further apart.
        warmup_steps: the number of first rounds that are exchanged uncompressed.
        block_size: the most elements of a block; each block has a scale or a top k of its own. Smaller blocks
            fit better and send more scales. None is one block a tensor.
        dense_below: blocks of fewer elements (biases, norms) travel uncompressed, in the same payload; their
            error stays 0.
        server: "sharded" cuts the server of DC between the workers: less work and fewer bytes, but β must be
            0. "replicated" runs the server on every worker. "auto" is "sharded" where β = 0.
        bucket_bytes: bytes of the parameters that travel together as a bucket. The first bucket, which leaves
            last, has an eighth of that. A parameter is never cut.
        overlap: with True, each bucket is stepped and sent while backward computes the gradients of the other
            buckets. It excludes whatever changes gradients or options (a learning rate, say) between backward
            and step(): clipping, GradScaler. It also excludes closures, on_nonfinite="skip", and optimizers
            whose step writes to its parameter group. The optimizers of torch.optim step in a thread of their
            own. Other optimizers step in the thread that computes, with one call for each bucket. With step
            hooks, all updates wait for step(), so that a hook fires once a step and may look at the model.
            After an error in a step, the errors and the momentum are those of a half-taken step (x is not):
            load a checkpoint. With several optimizers, what Horovod averages waits for step().
        on_nonfinite: at a NaN or an infinity, "raise" raises NonFiniteUpdateError on all workers, and "skip"
            skips the step on all. A local step that overflows is undone on all workers, together with the
            local steps since the round began. The optimizer's own state is undone in some cases only (see
            NonFiniteUpdateError).
        check_consensus_every: the number of rounds between two checks that x has the same bits on all
            workers, and a worker's state the same bits on all its ranks; 0 is never.
        worker: what a worker is: "rank", or "node", which is all ranks of a host. Their gradients are
            averaged in full precision before each local step, so e, momentum and all other state belong to
            the node. A list of groups of ranks is allowed too, as Horovod process sets or lists of ranks.
            With Horovod, all but "rank" need `hvd.init(process_sets=hvd_saef.process_sets(worker))`.
        weights: "equal" is for workers of the same number of ranks. With "ranks", each worker counts by its
            number of ranks.
        process_group: the torch.distributed group whose ranks are the workers, others train alone; neither
            Horovod nor MPI is needed then. None is what hvd.init() started, or else torch.distributed's
            default group.

    Returns:
        An instance of the wrapped optimizer's class, with the methods of :class:`SaefMethods`.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it, its value and what is allowed.
        WorkerError: another rank raised one of these; named with its reason.
        RuntimeError: neither Horovod nor torch.distributed is initialized; or Horovod is elastic, or does not
            run on MPI.

    """

    def look() -> Plan:
        check_horovod_arguments(op, gradient_predivide_factor)
        check_passes(backward_passes_per_step)
        settings = Settings(
            feedback=feedback,
            step_ahead=step_ahead,
            server_step_ahead=server_step_ahead,
            double_compression=double_compression,
            averaging_period=averaging_period,
            averaging_spread=averaging_spread,
            averaging_fp16=averaging_fp16,
            local_steps=local_steps,
            warmup_steps=warmup_steps,
            block_size=block_size,
            server=server,
            bucket_bytes=bucket_bytes,
            overlap=overlap,
            on_nonfinite=on_nonfinite,
            check_consensus_every=check_consensus_every,
            worker=groups_of(worker),
            weights=weights,
            sparse_as_dense=sparse_as_dense,
        )
        models = models_of(model)
        check_optimizer(optimizer, [name for name in vars(SaefMethods) if not name.startswith("_")])
        choose = compressor_chooser(compression, dense_below)
        names = name_parameters(optimizer, named_parameters)
        refuse_writing_modules(models, [p for group in optimizer.param_groups for p in group["params"]])
        return Plan(settings, choose, names, models)

    plan, communicator, included = _plan_together(optimizer, look, process_set, process_group)
    settings = plan.settings
    lease = communicator.lines.take(frozenset(id(p) for g in optimizer.param_groups for p in g["params"]))
    communicator = find_workers(communicator, settings).line(lease.number)
    together(communicator, lambda: check_compressors(plan.layout, settings, communicator))
    wrapped = share(optimizer)
    parameters = Parameters(optimizer, plan.names, plan.choose, settings, plan.layout)
    session = wrapped._saef = Session(
        optimizer, parameters, settings, backward_passes_per_step, communicator, lease
    )
    undo_horovods_initial_step(wrapped)
    refuse_steps_past_ours(wrapped)
    if plan.models:
        from hvd_saef.round.model_hooks import ModelHooks  # loads torch's compiler, as optimizers do too

        ModelHooks(session.modes, session.origin.parameters_replaced).attach(plan.models)
    if communicator.rank == 0 and included:
        give_advice(settings, compression, plan.models)
        warn_of_large_block(settings, plan.layout, communicator.workers)
        advise_on_unused_rows(plan.models, session.parameters.layout, block_size)
        if not session.parameters.averages_gradients:
            advise_on_adaptive_rates(optimizer, communicator.workers)
    return wrapped


@dataclass
class Plan:
    """Holds what the arguments ask for on this rank, once they are checked."""

    settings: Settings
    choose: ChooseCompressor
    names: dict[Tensor, str]
    models: Sequence[nn.Module]

    def lay_out(self, optimizer: torch.optim.Optimizer) -> None:
        """Lays out the optimizer's parameters. Raises TypeError or ValueError for one that does not fit."""
        self.layout = build_layout(optimizer.param_groups, self.names, self.choose, self.settings)
        if self.settings.overlap and averages_gradients(self.settings, self.layout):
            raise ValueError(
                "overlap=True has nothing to send early with feedback='none' and a dense compressor, where "
                "gradients are averaged in step(): pass overlap=False."
            )

    def alone(self) -> Plan:
        """Returns the plan of a rank outside the process set, which exchanges with nobody."""
        settings = Settings(feedback="none", sparse_as_dense=self.settings.sparse_as_dense)
        return Plan(settings, compressor_chooser(Compression.none), self.names, self.models)


def _plan_together(
    optimizer: torch.optim.Optimizer, look: Callable[[], Plan], process_set: Any, process_group: Any
) -> tuple[Plan, Communicator, bool]:
    """Returns the plan, the communicator, and True if this rank is in the process set. Collective over that.

    If `look` or the layout raises on one rank, all ranks raise.
    """
    plan: Plan | None = None
    failure: Exception | None = None
    try:
        plan = look()
    except Exception as error:
        failure = error
    try:
        communicator, included = find_communicator(process_set, process_group)
    except Exception as error:
        raise failure or error from None
    if plan is not None and not included:  # as with Horovod, a rank outside the process set trains alone
        plan = plan.alone()

    def lay_out() -> None:
        if plan is None:
            raise failure or AssertionError
        plan.lay_out(optimizer)

    together(communicator, lay_out)
    return cast(Plan, plan), communicator, included
