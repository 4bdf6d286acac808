"""Communication between the ranks of a torch.distributed group: gloo for CPU memory, NCCL for a GPU's.

Each channel has a group of its own, since collectives of several threads must not meet on one group. What
lies on a GPU goes through host memory unless the user's group has NCCL.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hvd_saef.transport.abort import abort_on_exceptions
from hvd_saef.transport.boxes import open_boxes
from hvd_saef.transport.communicator import (
    Channel,
    Communicator,
    SoloCommunicator,
    bytes_of,
)
from hvd_saef.transport.hosts import group_by_host, this_host
from hvd_saef.transport.objects import Bytes, exchange_objects
from hvd_saef.transport.posts import Post
from hvd_saef.transport.staging import Staging
from hvd_saef.transport.stores import StorePost
from hvd_saef.transport.watch import Patience, Watch, start
from hvd_saef.transport.watched import PAYLOADS, WatchedCommunicator

FOREVER = timedelta(days=365)
"""The timeout of our groups: the watch decides when to give up, by HVD_SAEF_STALL_ABORT_S."""
WITHOUT_BOXES = (
    "Ranks tell each other who waits through the job's store instead, which is lost with the process that "
    "serves it. GLOO_SOCKET_IFNAME names the network interface to use: hvd-saef doctor tells of them."
)
DESTROYED = (
    "the torch.distributed group was destroyed: step() comes before "
    "torch.distributed.destroy_process_group()."
)

_made: Counter[Sequence[int]] = Counter()
_of_groups: dict[tuple[tuple[int, ...], str], Communicator] = {}


def communicator_of(group: Any) -> tuple[Communicator, bool]:
    """Returns the communicator of a torch.distributed group, and whether this rank is in the group.

    None is the default group. The first call for a group is collective over it.
    """
    if dist.get_rank(group) < 0:
        return SoloCommunicator(), False
    ranks = tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))
    if len(ranks) == 1:
        return SoloCommunicator(), True
    has_nccl = "nccl" in str(dist.get_backend_config(group))
    key = ranks, "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    if not _of_groups:
        abort_on_exceptions(dist.get_rank(), lambda: os._exit(1))
    known = _of_groups.get(key)
    if known is None or not _is_alive(known):
        known = _of_groups[key] = GroupCommunicator(*key)
    return known, True


class GroupCommunicator(WatchedCommunicator):
    """The communicator of some ranks of a torch.distributed job, one worker a rank.

    `ranks` are their numbers in the job, and `backend` is the backend of payloads and means. Messages about
    missing ranks use `names` instead of the numbers within the communicator, if given.
    """

    def __init__(self, ranks: Sequence[int], backend: str, names: Sequence[int] | None = None) -> None:
        self.ranks, self.size = ranks, len(ranks)
        self.rank = list(ranks).index(dist.get_rank())
        self._backend = backend
        patience = Patience.of_environment()

        def watch(post: Post) -> Watch:
            return Watch(post, self.rank, self.size, patience, names)

        prefix = _prefix(ranks)
        self._watch = watch(StorePost(prefix, self.rank, self.size, patience.abort))
        self._groups = self._new_groups(list(Channel))
        post, reason = open_boxes(prefix, self.rank, self.size, self.allgather_object)
        if post is not None:
            self._watch = watch(post)
        elif reason:
            warnings.warn(f"rank {dist.get_rank()}: {reason}. {WITHOUT_BOXES}", RuntimeWarning, stacklevel=2)
        self._staging = {channel: Staging(self._reaches, follows=True) for channel in Channel}
        owner = os.getpid()
        atexit.register(lambda: self._watch.say_goodbye() if os.getpid() == owner else None)

    def _new_groups(self, channels: Iterable[Channel]) -> dict[Channel, Any]:
        """Makes a group for each channel. Collective over these ranks alone."""

        def create() -> dict[Channel, Any]:
            return {
                channel: dist.new_group(
                    list(self.ranks),
                    timeout=FOREVER,
                    backend="gloo" if channel is Channel.WORDS else self._backend,
                    use_local_synchronization=True,
                )
                for channel in channels
            }

        created = start(create)
        self._watch.wait(created.done, Channel.WORDS.name, "hvd_saef.DistributedOptimizer")
        return created.result()

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        return _Line(self, number)

    def new_part(self, ranks: Sequence[int], names: Sequence[int]) -> Communicator:  # noqa: D102
        return GroupCommunicator(ranks, self._backend, names)

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        return group_by_host(self.allgather_object(this_host()))

    def check(self) -> None:  # noqa: D102
        try:
            dist.get_rank(self._groups[Channel.WORDS])
        except (RuntimeError, ValueError):
            raise RuntimeError(DESTROYED) from None

    def _reaches(self, device: torch.device) -> bool:
        return device.type == "cpu" or (device.type == "cuda" and "nccl" in self._backend)

    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        staging, what = self._staging[channel], PAYLOADS[channel]
        alike = len({place.numel() for place in out}) == 1
        if not alike:  # an all_gather wants pieces of one size
            self._all_to_all(channel, self.size * [payload], out)
        elif staging.direct(payload.device):
            self._run(channel, what, lambda group: dist.all_gather([*out], payload, group, async_op=True))
        else:
            (leaving,), landed = staging.leaving([payload]), staging.room(out)
            self._run(channel, what, lambda group: dist.all_gather([*landed], leaving, group, async_op=True))
            staging.landed(landed, out)

    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:  # noqa: D102
        self._all_to_all(Channel.UP, pieces, out)

    def _all_to_all(self, channel: Channel, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Sends pieces[j] to rank j, from memory and to memory that lies end to end."""
        staging = self._staging[channel]
        leaving, landed = staging.leaving(pieces), staging.room(out)

        def begin(group: Any) -> Any:
            sizes = [place.numel() for place in landed], [piece.numel() for piece in leaving]
            return dist.all_to_all_single(_whole(landed), _whole(leaving), *sizes, group=group, async_op=True)

        self._run(channel, PAYLOADS[channel], begin)
        staging.landed(landed, out)

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        staging, what = self._staging[Channel.MEANS], f"the mean of {name}"
        if staging.direct(tensor.device):
            self._mean(tensor, what)
            return
        held = tensor.detach().contiguous()
        octets = held.view(-1).view(torch.uint8)
        (copy,) = staging.leaving([octets])
        self._mean(copy.view(tensor.dtype), what)
        staging.landed([copy], [octets])
        if held.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(held)

    def _mean(self, tensor: Tensor, what: str) -> None:
        self._run(Channel.MEANS, what, lambda group: dist.all_reduce(tensor, group=group, async_op=True))
        with torch.no_grad():
            tensor.div_(self.size)

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        flat, source = bytes_of(tensor).clone(), self.ranks[root]
        self._run(
            Channel.WORDS, "a broadcast", lambda group: dist.broadcast(flat, source, group, async_op=True)
        )
        with torch.no_grad():
            tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return exchange_objects(value, self._gather)

    def _gather(self, mine: Bytes) -> list[Bytes]:
        """Returns the bytes of all ranks, [n] uint8 each. Collective."""
        what = "a gather of objects"
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        own = torch.tensor([mine.size])
        self._run(Channel.WORDS, what, lambda group: dist.all_gather(sizes, own, group, async_op=True))
        most = max(map(int, sizes))
        padded = np.zeros(most, np.uint8)
        padded[: mine.size] = mine
        pieces = [torch.empty(most, dtype=torch.uint8) for _ in range(self.size)]
        send = torch.from_numpy(padded)
        self._run(Channel.WORDS, what, lambda group: dist.all_gather(pieces, send, group, async_op=True))
        return [piece.numpy()[: int(size)] for piece, size in zip(pieces, sizes, strict=True)]

    def combine(self, word: int) -> int:  # noqa: D102
        combined, what = torch.tensor([word]), "the agreement of all ranks"
        self._run(
            Channel.WORDS,
            what,
            lambda group: dist.all_reduce(combined, dist.ReduceOp.BOR, group, async_op=True),
        )
        return int(combined)

    def _run(self, channel: Channel, operation: str, begin: Callable[[Any], Any]) -> None:
        """Begins a collective on the channel's group, and waits until it is done, under the watch.

        Raises StalledExchangeError if the connection to a rank is lost, or the watch gives up.
        """
        work = begin(self._groups[channel])
        self._wait_until(work.is_completed, channel, operation)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._watch.cut_off(self._name(channel), error) from error


class _Line(GroupCommunicator):
    """The ranks of another communicator, `base`, on a line of their own."""

    def __init__(self, base: GroupCommunicator, number: int) -> None:
        self.rank, self.size, self.ranks = base.rank, base.size, base.ranks
        self._backend, self._line, self._watch = base._backend, number, base._watch
        self._staging = {channel: Staging(self._reaches, follows=True) for channel in Channel}
        own = self._new_groups([channel for channel in Channel if channel is not Channel.WORDS])
        self._groups = {Channel.WORDS: base._groups[Channel.WORDS], **own}


def _prefix(ranks: Sequence[int]) -> str:
    """Returns a name for what these ranks keep in stores, which no other ranks have, before or after them."""
    _made[tuple(ranks)] += 1  # after destroy_process_group() the same ranks may meet again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"hvd_saef/{attempt}/{'-'.join(map(str, ranks))}/{_made[tuple(ranks)]}"


def _is_alive(communicator: Communicator) -> bool:
    try:
        communicator.check()
    except RuntimeError:
        return False
    return True


def _whole(views: Sequence[Tensor]) -> Tensor:
    """Returns views of one buffer, which lie end to end, as one tensor [n] uint8."""
    return views[0].as_strided((sum(view.numel() for view in views),), (1,))
