"""Checkpoints of all workers: one file for each worker and a manifest, written whole or not at all.

A checkpoint is a folder. Each worker's file holds the model at x, the optimizer's state dict with the
errors in it, and what the worker's ranks add; `manifest.json` names the files of one complete set, with
their sizes and hashes. The manifest is written after the files, and only then is the earlier set deleted, so
the folder holds a whole set at any time. All ranks must see the folder. Files are loaded with
`weights_only=True`: they run no code. Collective.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import secrets
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hvd_saef.checkpoints.loadable import as_loadable
from hvd_saef.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    damage,
    describe,
    file_of,
    opened,
    read_manifest,
    remove_others,
    sealed,
    write_whole,
)
from hvd_saef.checkpoints.redistribution import mean_state, without_errors
from hvd_saef.errors import CheckpointError, who_has_what
from hvd_saef.round.agreement import check_configuration
from hvd_saef.round.session import Session
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.together import attempted

OnMismatch = Literal["error", "redistribute", "reset"]
T = TypeVar("T")
_writers: weakref.WeakKeyDictionary[Session, str] = weakref.WeakKeyDictionary()
"""The optimizers of this process that have saved, each with the name that its manifests give it."""


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: Any, **extra: Any) -> None:
    """Saves the model at x, the optimizer and `extra` into the folder `path`, in place of what is there.

    Collective. `extra` consists of numbers, strings, tensors, and lists, tuples and dicts of them: an epoch,
    a scheduler's state_dict(), torch.get_rng_state(). Each rank's own `extra` is saved. NumPy's numbers
    become Python's, in `extra` and in the optimizer's state. Each optimizer needs a folder of its own.

    Raises CheckpointError on all ranks, naming rank and reason, if any rank cannot write, or has a value
    (named by its place) that :func:`load_checkpoint` would refuse, and ConfigurationMismatchError if ranks
    train other parameters or have other settings. The earlier checkpoint then stays whole.
    """
    session = _session(optimizer)
    communicator = session.communicator
    rank = communicator.rank
    _everyone(communicator, session.take_in)
    check_configuration(communicator, session.parameters.layout, {})
    nonce = communicator.allgather_object(secrets.token_hex(4) if rank == 0 else None)[0]
    rounds = session.progress.rounds
    first = communicator.groups[communicator.worker][0]
    name = file_of(rounds, nonce, first)
    ranks_own = _gather_on_node(communicator, model, extra)

    def write() -> dict[str, Any] | None:
        session.origin.check_whole()
        folder = Path(path)
        if rank == 0:
            _refuse_anothers(folder, session)
        if rank != first:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with optimizer.consensus():
            held = {"extra": extra, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            contents = {what: as_loadable(value, what) for what, value in held.items()}
            contents |= {"format": FORMAT, "others": ranks_own[1:]}
            write_whole(folder / name, lambda file: torch.save(contents, file))
        _read(folder / name, "meta")  # the file must load; the hash covers the tensors' numbers
        return describe(folder / name)

    try:
        files = [file for file in _everyone(communicator, write) if file is not None]
    except CheckpointError:
        with contextlib.suppress(OSError, TypeError):
            (Path(path) / name).unlink(missing_ok=True)
        raise

    def publish() -> None:
        if rank != 0:
            return
        folder = Path(path)
        for file in files:
            if not (folder / file["name"]).is_file():
                raise CheckpointError(f"{folder / file['name']} was written, but rank 0 does not see it")
        writer = _writers.setdefault(session, secrets.token_hex(8))
        manifest = {"format": FORMAT, "workers": communicator.workers, "rounds": rounds, "nonce": nonce}
        manifest |= {"writer": writer, "layout": session.parameters.layout.description, "files": files}
        opened(folder / MANIFEST, sealed(manifest))
        write_whole(folder / MANIFEST, lambda file: file.write(sealed(manifest)))
        remove_others(folder, files)

    _everyone(communicator, publish)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Any, on_mismatch: OnMismatch = "error"
) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` wrote into `path`, and returns this rank's `extra`.

    Collective. As many workers as saved the checkpoint restore every bit. If their number is another, or a
    worker's file is missing or damaged, `on_mismatch` says what happens:

    - "error", the default: a CheckpointError is raised;
    - "redistribute": every worker gets the mean error and the server's error, on which x̃ depends, and the
      mean momentum, of the files there are; local steps since the last round become a part of the errors;
    - "reset": x is kept; errors, those local steps, momentum and all other optimizer state start anew.

    In the last two cases worker k takes `extra` and the model's buffers from file k modulo the number of
    whole files; in the file, rank r of the worker takes those of rank r modulo the number of ranks there.

    Raises CheckpointError on all ranks, naming file and reason, with model and optimizer as they were.
    """
    session = _session(optimizer)
    communicator = session.communicator
    _agree_on_policy(communicator, on_mismatch)
    folder = _everyone(communicator, lambda: Path(path))[communicator.rank]
    _everyone(communicator, session.take_in)
    found = _everyone(communicator, lambda: _manifest(folder, session) if communicator.rank == 0 else {})
    manifest = found[0]
    files: list[dict[str, Any]] = manifest["files"]
    # First the ranks agree which files are whole: from here on all ranks do the same.
    told = _everyone(communicator, lambda: damage(folder, files[communicator.rank :: communicator.size]))
    problems = {name: reason for found in told for name, reason in found.items()}
    same = manifest["workers"] == communicator.workers and not problems
    if not same and on_mismatch == "error":
        why = "; ".join(f"{name} {reason}" for name, reason in problems.items())
        raise CheckpointError(
            f"{folder}: {why or _counts(manifest, communicator)}. "
            "Pass on_mismatch='redistribute' or 'reset' to go on with what there is."
        )
    whole = [file["name"] for file in files if file["name"] not in problems]
    if not whole:
        raise CheckpointError(f"{folder}: none of its {len(files)} files can be read ({problems}).")

    def read() -> dict[str, Any]:
        own = _read(folder / whole[communicator.worker % len(whole)])
        _take_ranks_own(own, communicator.team.rank)
        if not same:
            own["optimizer"] = (
                mean_state((_read(folder / name)["optimizer"] for name in whole), communicator.workers)
                if on_mismatch == "redistribute"
                else without_errors(own["optimizer"], communicator.workers)
            )
        _check_fit(own, model, optimizer)
        return own

    if not same and communicator.rank == 0:
        warnings.warn(
            f"{folder}: {problems or _counts(manifest, communicator)}; on_mismatch={on_mismatch!r}.",
            stacklevel=2,
        )
    own: dict[str, Any] = {}
    _everyone(communicator, lambda: own.update(read()))  # what this rank has read is not sent to the others

    def take() -> None:
        # The optimizer is first: loading a model whose values are the optimizer's x leaves the errors alone.
        optimizer.load_state_dict(own["optimizer"])
        with optimizer.consensus():  # needed if the model has no hooks of hvd_saef
            model.load_state_dict(own["model"])

    _everyone(communicator, take)
    extra: dict[str, Any] = own["extra"]
    return extra


def _agree_on_policy(communicator: Communicator, on_mismatch: object) -> None:
    """Raises on all ranks if any rank passed a value that is not allowed, or another one. Collective."""
    wanted: list[Any] = communicator.allgather_object(on_mismatch)
    for one in wanted:  # all ranks raise, whichever rank passed the value
        if one not in ("error", "redistribute", "reset"):
            raise ValueError(f"on_mismatch={one!r}: 'error', 'redistribute' and 'reset' are allowed.")
    if len(set(wanted)) > 1:
        raise CheckpointError(f"on_mismatch is not the same on all ranks: {who_has_what(wanted)}")


def _session(optimizer: Any) -> Session:
    session = getattr(optimizer, "_saef", None)
    if not isinstance(session, Session):
        raise TypeError(f"optimizer={type(optimizer).__name__}: what hvd_saef.DistributedOptimizer returned.")
    session.check_process()
    return session


def _gather_on_node(communicator: Communicator, model: nn.Module, extra: dict[str, Any]) -> list[Any]:
    """Returns `extra` and the model's buffers of each rank of this worker; [] if all workers are one rank.

    Collective.

    Raises CheckpointError on all ranks if those of any rank cannot be saved.
    """
    if communicator.workers == communicator.size:
        return []
    mine = io.BytesIO()
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def pack() -> None:
        own = {"extra": as_loadable(extra, "extra"), "buffers": as_loadable(buffers, "buffers")}
        torch.save(own, mine)

    _everyone(communicator, pack)
    everyone = communicator.team.allgather_object(mine.getvalue())
    return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in everyone]


def _take_ranks_own(contents: dict[str, Any], place: int) -> None:
    """Replaces the first rank's `extra` and buffers in `contents` by those of the rank at `place`."""
    others = contents.get("others", [])
    place %= 1 + len(others)
    if place:
        contents["extra"] = others[place - 1]["extra"]
        contents["model"] |= {
            name: buffer for name, buffer in others[place - 1]["buffers"].items() if name in contents["model"]
        }


def _refuse_anothers(folder: Path, session: Session) -> None:
    """Raises CheckpointError if the folder holds a checkpoint of another optimizer of this process."""
    try:
        writer = read_manifest(folder).get("writer")
    except CheckpointError:
        return

    def others() -> list[Session]:
        others = [other for other, name in list(_writers.items()) if name == writer and other is not session]
        return [other for other in others if _parameters(other).isdisjoint(_parameters(session))]

    if others():
        gc.collect()  # an optimizer that the user has dropped does not count
    if not others():
        return
    raise CheckpointError(
        f"{folder} holds the checkpoint of another optimizer, which this one would delete: save each into a "
        "folder of its own"
    )


def _parameters(session: Session) -> set[Tensor]:
    return {parameter for group in session.inner.param_groups for parameter in group["params"]}


def _everyone(communicator: Communicator, do: Callable[[], T]) -> list[T]:
    """Returns what `do` returned on every rank; raises CheckpointError on all if any raised. Collective."""
    failure, told, outcomes = attempted(communicator, do, _reason)
    if any(told):
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(told) if reason)
        raise CheckpointError(reasons) from failure
    return outcomes


def _reason(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    return str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"


def _manifest(folder: Path, session: Session) -> dict[str, Any]:
    """Returns the manifest in `folder`. Raises CheckpointError unless it is whole and of this model."""
    manifest = read_manifest(folder)
    saved = [(p["name"], p["shape"], p["dtype"]) for p in manifest["layout"]["parameters"]]
    ours = [(p["name"], p["shape"], p["dtype"]) for p in session.parameters.layout.description["parameters"]]
    if sorted(saved) != sorted(ours):
        odd = next(p for p in sorted(saved + ours) if (p in saved) != (p in ours))
        where = "the checkpoint" if odd in saved else "the optimizer"
        frozen = odd[0] in session.parameters.layout.description["frozen"]
        raise CheckpointError(
            f"{folder / MANIFEST} is of another model: parameter {odd} is in {where} only"
            f"{'; it is frozen here: set requires_grad before loading' if frozen else ''}"
        )
    return manifest


def _counts(manifest: Mapping[str, Any], communicator: Communicator) -> str:
    return f"it was saved by {manifest['workers']} workers, and there are {communicator.workers}"


def _read(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Returns the contents of a worker's file. With `device` "meta", the tensors' numbers are not read."""
    try:
        contents: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint file of this version ({FORMAT!r})")
    return contents


def _check_fit(own: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
    """Raises CheckpointError or ValueError if anything in `own` does not fit. Changes nothing."""
    shapes = {name: _shape(value) for name, value in model.state_dict().items()}
    saved = {name: _shape(value) for name, value in own["model"].items()}
    for name in [*shapes, *saved]:
        if shapes.get(name) != saved.get(name):
            raise CheckpointError(
                f"the model's {name!r} is {saved.get(name, 'missing')} in the checkpoint and "
                f"{shapes.get(name, 'missing')} here"
            )
    groups = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in own["optimizer"]["param_groups"]]
    if groups != theirs:
        raise CheckpointError(
            f"the optimizer has parameter groups of sizes {groups}, the checkpoint of {theirs}"
        )
    optimizer._saef.origin.check(own["optimizer"]["hvd_saef"], optimizer._saef.parameters.with_state)


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
