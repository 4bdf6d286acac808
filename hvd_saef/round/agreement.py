"""The small word that all ranks exchange before and after the local step, so that they decide alike.

A later feature that needs a common decision of all workers adds a bit to the word, not a collective.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hvd_saef.errors import (
    ConfigurationMismatchError,
    ConsensusError,
    ExchangeError,
    WorkerError,
    who_has_what,
)
from hvd_saef.memory.layout import Layout
from hvd_saef.transport.background import denormals
from hvd_saef.transport.communicator import Communicator, bytes_of
from hvd_saef.transport.together import in_words, together, who_raised

BROKEN_ADVICE = (
    "x and the errors may differ between the workers: load a checkpoint on all ranks, or go on from rank 0's "
    "parameters by optimizer.reanchor(); until then no step is taken."
)


BUCKETS = "the elements of each bucket (add parameters before or after loading, on all ranks alike)"
"""The fact that is compared last, as buckets also differ where parameters do."""


class Word(enum.IntFlag):
    """What one rank reports before or after a local step. All ranks receive the bitwise or of all words."""

    NOTHING = 0
    ANCHOR = enum.auto()
    """This rank was just wrapped or loaded: all must agree where x, e and s come from."""
    FAILED = enum.auto()
    """This rank raised an exception."""
    OVERFLOW = enum.auto()
    """A GradScaler found an overflow on this rank: all skip this step."""
    NONFINITE = enum.auto()
    """A gradient on this rank holds NaN or infinity, or the local step left one or a value near overflow."""
    HUGE = enum.auto()
    """A gradient's square is infinite: all keep a copy of the optimizer's state, as the step may overflow."""
    UNDER_WAY = enum.auto()
    """With overlap=True: this rank has already sent updates of this round."""
    STOP = enum.auto()
    """This rank received a signal: all stop after this step."""
    BROKEN = enum.auto()
    """The exchange itself failed on this rank: x may differ between the workers."""


def agree(communicator: Communicator, word: Word, failure: Exception | None) -> Word:
    """Returns the bitwise or of all ranks' words, FAILED added to `word` if there is a `failure`. Collective.

    If the result holds FAILED, the caller calls :func:`raise_failure` next.
    """
    return Word(communicator.combine(int(word | (Word.FAILED if failure else Word.NOTHING))))


def raise_failure(communicator: Communicator, failure: Exception | None) -> NoReturn:
    """Raises `failure` on the ranks that have one, WorkerError on the others. Collective."""
    reasons = who_raised(communicator.allgather_object(in_words(failure)))
    raise WorkerError(reasons) if failure is None else failure


def raise_broken(communicator: Communicator, failure: Exception | None) -> NoReturn:
    """Raises ExchangeError on all ranks, after an exchange failed on some of them. Collective."""
    reasons = who_raised(communicator.allgather_object(in_words(failure)))
    raise ExchangeError(f"the exchange of a round failed: {reasons}. {BROKEN_ADVICE}") from failure


def check_configuration(communicator: Communicator, layout: Layout, facts: Mapping[str, Any]) -> None:
    """Raises ConfigurationMismatchError on all ranks if settings, parameters or `facts` differ. Collective.

    `facts` gives by name the present values of what may change from call to call.
    """
    facts = {"torch.set_flush_denormal": denormals(), **facts}
    if len(set(communicator.allgather_object((layout.digest, repr(facts))))) == 1:
        return
    settings = layout.description["settings"] | facts
    everyone = communicator.allgather_object(layout.description | {"settings": settings})
    flattened = [_flatten(description) for description in everyone]
    keys = {key: None for items in flattened for key in items}
    # A key with different values explains more than a key that is missing on one rank, so it is named first.
    for key in sorted(keys, key=lambda key: not all(key in items for items in flattened)):
        values = [items.get(key, "(missing)") for items in flattened]
        if len({repr(value) for value in values}) > 1:
            raise ConfigurationMismatchError(
                f"workers disagree on {key}: {who_has_what(values)}. Make it the same on all of them."
            )
    raise ConfigurationMismatchError("workers disagree on the order of their parameters.")


def check_consensus(communicator: Communicator, x: Mapping[str, Tensor], advice: str) -> None:
    """Raises ConsensusError on all ranks unless x has the same bits on every rank. Collective.

    The check costs a hash of x and one gather of 16 bytes per rank.
    """
    digests, together = _digests(x)
    if len(set(communicator.allgather_object(together))) == 1:
        return
    everyone = communicator.allgather_object(digests)
    for name in digests:
        values = [theirs[name] for theirs in everyone]
        if len(set(values)) > 1:
            raise ConsensusError(f"x differs between workers in {name!r}: {who_has_what(values)}. {advice}")
    raise ConsensusError(f"x differs between workers. {advice}")


def check_workers(communicator: Communicator, state: Mapping[str, Tensor], advice: str) -> None:
    """Raises ConsensusError on all ranks unless the ranks of every team have the same `state`. Collective.

    The check compares bits. It costs a hash of the state and one gather of 16 bytes per rank; it costs
    nothing where every worker is one rank.
    """
    if communicator.workers == communicator.size:
        return
    digests, together = _digests(state)
    summary = communicator.allgather_object(together)
    if all(len({summary[rank] for rank in group}) == 1 for group in communicator.groups):
        return
    everyone = communicator.allgather_object(digests)
    for group in communicator.groups:
        for name in {name: None for rank in group for name in everyone[rank]}:
            values = [everyone[rank].get(name, "(missing)") for rank in group]
            if len(set(values)) > 1:
                who = who_has_what(values, group)
                raise ConsensusError(f"{name} differs between the ranks of one worker: {who}. {advice}")


def state_of(optimizer: torch.optim.Optimizer, layout: Layout) -> dict[str, Tensor]:
    """Returns a torch optimizer's state tensors and its groups' numbers, by title in messages. Local."""
    state = {
        f"{key} of {slot.name!r}": value
        for slot in layout.slots
        for key, value in sorted(optimizer.state.get(slot.parameter, {}).items())
        if isinstance(value, Tensor)
    }
    for i, group in enumerate(optimizer.param_groups):
        numbers = [float(v) for v in group.values() if isinstance(v, (int, float, Tensor))]
        state[f"parameter group {i}"] = torch.tensor(numbers, dtype=torch.float64)
    return state


def agree_on_sizes(
    communicator: Communicator, sizes: Callable[[], dict[int, list[int]]]
) -> dict[int, list[int]]:
    """Returns what `sizes` returns: the bytes of each bucket's payloads, by the bucket's index. Collective.

    Raises ConfigurationMismatchError on all ranks if the sizes differ between ranks. If `sizes` raises on a
    rank, that rank raises the same exception and the others WorkerError.
    """
    everyone = together(communicator, sizes)
    own = everyone[communicator.rank]
    for index in own:
        values = [theirs.get(index) for theirs in everyone]
        if any(theirs != own[index] for theirs in values):
            raise ConfigurationMismatchError(
                f"workers disagree on the bytes of bucket {index}: {who_has_what(values)}. What "
                "payload_bytes returns must depend on nothing but the layout that it is given."
            )
    return own


def _digests(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """Returns a hash of each tensor, by name, and one hash of all of them."""
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    return digests, hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(bytes_of(tensor).numpy().data, digest_size=16).hexdigest()


def _flatten(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one entry for each fact to agree on, under a name that a reader of the message understands."""
    items: dict[str, Any] = dict(description["settings"])
    buckets = items.pop(BUCKETS, None)
    frozen: Sequence[str] = description["frozen"]
    items["the number of parameters"] = len(description["parameters"]) + len(frozen)
    taking_part = {parameter["name"]: True for parameter in description["parameters"]}
    for name, takes_part in (taking_part | dict.fromkeys(frozen, False)).items():
        items[f"whether {name!r} takes part"] = takes_part
    for place, parameter in enumerate(description["parameters"]):
        items[f"the name of parameter {place}"] = parameter["name"]
        for key, value in parameter.items():
            if key != "name":
                items[f"{key} of {parameter['name']!r}"] = value
    items[BUCKETS] = buckets
    return items
