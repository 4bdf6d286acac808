"""A stand-in for torch.cuda on the CPU: it notes what is done in which order, and what could come too early.

Tensors of the class :class:`OnGpu` claim to lie on a GPU; what is done to them is done on the CPU at once,
and noted as work in the current stream. The order that a GPU would keep is followed by vector clocks: each
thread and each stream knows how much of all the others is surely over before what it does next. Work in a
stream comes after what its thread knew when it was submitted. Waits, futures and meetings of threads hand
knowledge on. A use of memory that does not surely come after what it needs is a complaint, whenever it was
done.

:func:`stand_in` replaces public functions of torch, and lets Python's futures hand on what threads know.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hvd_saef
from hvd_saef.transport.threads import Meeting

GPU = torch.device("cuda", 1)
"""Not the first one, which is the current device of every thread that sets none."""
SECONDS = 1000.0
"""How long each operation takes, in the stand-in's time."""
PACKAGE = f"{Path(hvd_saef.__file__).parent}/"
PASSED_ON = {"transport/streams.py": None, "transport/background.py": "take"}
"""Functions that wait for who calls them: all of a file's, or the named one."""
WAITS = (".take()", ".order()", ".wait()", ".join(", ".since(")
aten = torch.ops.aten
ASKS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
"""Operations for whose result the host waits."""


class Actor:
    """A thread or a stream, which does one thing after the other, and what it knows of all of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Actor, int] = {}

    def learn(self, other: dict[Actor, int]) -> None:
        """Adds what another one knows."""
        for actor, tick in other.items():
            if self.known.get(actor, 0) < tick:
                self.known[actor] = tick

    def act(self, what: str) -> Use:
        """Does one more thing."""
        self.known[self] = self.known.get(self, 0) + 1
        return Use(self, self.known[self], f"{what} in {self.name}")

    def knows(self, use: Use) -> bool:
        """True if this one comes after the use."""
        return self.known.get(use.actor, 0) >= use.tick


class Use(NamedTuple):
    """A use of some memory."""

    actor: Actor
    tick: int
    what: str


class Block:
    """A piece of memory: its last write, and its reads since then."""

    def __init__(self, recorder: Recorder, home: Stream | None = None) -> None:
        """Say whose memory it is: the stream's, whose later work may get it anew, or the host's."""
        self.recorder = recorder
        self.writes: list[Use] = []
        self.reads: list[Use] = []
        if home is not None:
            weakref.finalize(self, home.freed.append, (self.writes, self.reads))

    def use(self, actor: Actor, use: Use, write: bool) -> None:
        """Notes a use, and complains of what it does not come after."""
        for other in [*self.writes, *(self.reads if write else [])]:
            if not actor.knows(other):
                self.recorder.complaints.append(f"{use.what} does not come after {other.what}")
        if write:
            self.forget()
        (self.writes if write else self.reads).append(use)

    def forget(self) -> None:
        """Forgets all uses, since all are over."""
        del self.writes[:], self.reads[:]


class Stream(Actor):
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device(device)
        super().__init__(f"stream {CURRENT.number()} of {self.device}")
        self.time = 0.0
        self.freed: list[tuple[list[Use], list[Use]]] = []

    def wait_event(self, event: Event) -> None:
        """See torch."""
        if CURRENT.waits():
            with CURRENT.lock:
                self.learn(event.known)
                self.time = max(self.time, event.time)

    def wait_stream(self, other: Stream) -> None:
        """See torch."""
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """torch.cuda.Event. For the host, work is over when it has waited for it, and not before."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.known: dict[Actor, int] = {}
        self.time = 0.0
        self.timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        """See torch."""
        with CURRENT.lock:
            where = stream or CURRENT.stream()
            where.learn(CURRENT.thread().known)
            self.known, self.time = dict(where.known), where.time

    def synchronize(self) -> None:
        """See torch."""
        CURRENT.check_capture()
        if CURRENT.waits():
            with CURRENT.lock:
                CURRENT.thread().learn(self.known)

    def query(self) -> bool:
        """See torch."""
        CURRENT.check_capture()
        known = CURRENT.thread().known
        return all(known.get(actor, 0) >= tick for actor, tick in self.known.items())

    def elapsed_time(self, end: Event) -> float:
        """See torch: milliseconds."""
        if not (self.timing and end.timing and self.query() and end.query()):
            raise RuntimeError("both events need timing, and to be over")
        return 1e3 * (end.time - self.time)


class Thread(Actor):
    """A thread, and what is current in it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"thread {name!r}")
        self.device = 0
        self.streams: dict[int, Stream] = {}


class Recorder:
    """What happened, as far as it matters for the order."""

    def __init__(self, without: str = "") -> None:
        """Take away the waits at the site `without`."""
        self.without = without
        self.lock = threading.RLock()
        self.complaints: list[str] = []
        self.sites: set[str] = set()
        """Who waited."""
        self.log: list[str] = []
        """What was done in streams, and by the transport, as it came."""
        self.captured = False
        """True while work is captured into a CUDA graph."""
        self.buffers = 0
        """How much memory of GPUs was asked for uninitialized."""
        self.pinned: dict[int, tuple[Tensor, Block]] = {}
        """The page-locked memory, by its address."""
        self._defaults: dict[int, Stream] = {}
        self._local = threading.local()
        self._numbers = iter(range(1 << 30))

    def number(self) -> int:
        """Returns a number for something new."""
        return next(self._numbers)

    def thread(self) -> Thread:
        """Returns what is known in this thread."""
        if not hasattr(self._local, "thread"):
            self._local.thread = Thread(threading.current_thread().name)
        found: Thread = self._local.thread
        return found

    def stream(self, device: Any = None) -> Stream:
        """Returns this thread's current stream."""
        thread = self.thread()
        index = thread.device if device is None else torch.device(device).index or 0
        with self.lock:
            if index not in self._defaults:
                self._defaults[index] = Stream(torch.device("cuda", index))
            return thread.streams.get(index, self._defaults[index])

    def check_capture(self) -> None:
        """Raises RuntimeError, as CUDA does, if this thread asks about the device during a capture."""
        if self.captured:
            raise RuntimeError("operation not permitted when stream is capturing")

    def waits(self) -> bool:
        """Notes who waits; returns False if this wait is taken away."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            file, code = frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_code
            if PASSED_ON.get(file, "") not in (None, code.co_name):
                site = site_of(file, code, frame.f_lineno)
                self.sites.add(site)
                return site != self.without
            frame = frame.f_back
        return True  # a test's own

    # -- memory ----------------------------------------------------------------------------------

    def new_block(self, device: torch.device, what: str) -> Block:
        """Returns memory, which may have been used before, for what is made by `what`."""
        with self.lock:
            stream, thread = self.stream(device), self.thread()
            for use in [use for uses in stream.freed for some in uses for use in some]:
                if not (stream.knows(use) or thread.knows(use)):
                    self.complaints.append(f"memory is given to {what} before the end of {use.what}")
            stream.freed.clear()
            return Block(self, stream)

    def to_gpu(self, tensor: Tensor, device: torch.device = GPU) -> Tensor:
        """Returns a copy of a tensor on the CPU that lies on the device. The host has waited for it."""
        return OnGpu(tensor.detach().clone(), device, self.new_block(device, "a copy to the GPU"))

    def host_memory(self, size: int) -> Tensor:
        """Returns page-locked memory."""
        if self.thread().device != GPU.index:
            self.complaints.append(f"page-locked memory for GPU {self.thread().device}")
        memory = torch.zeros(size, dtype=torch.uint8)
        if size:
            self.pinned[memory.untyped_storage().data_ptr()] = memory, Block(self)
        return memory

    def _block_of(self, tensor: Tensor) -> Block | None:
        if isinstance(tensor, OnGpu):
            return tensor.block if tensor.block.recorder is self else None  # a cache may outlive a recorder
        address = tensor.untyped_storage().data_ptr() if self.pinned else 0
        return self.pinned[address][1] if address in self.pinned else None

    # -- what is done ----------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Does an operation on tensors of which some lie on a GPU."""
        tensors = _tensors((*args, *kwargs.values()))
        ours = [one for one in tensors if isinstance(one, OnGpu)]
        device = ours[0].device
        result = func(*(_inside(one) for one in args), **{name: _inside(one) for name, one in kwargs.items()})
        written, is_view = _written(func, args, kwargs)
        if not is_view:
            waits = func in ASKS
            if func is aten.copy_.default and len(ours) == 1:
                waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                if not waits and any(self._block_of(one) is None for one in tensors if one.numel()):
                    self.complaints.append(f"{func} does not wait, but the host's memory is not page-locked")
            self.submit(str(func), device, tensors, written, waits)
        known = {id(one.held): one for one in ours}

        def outside(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            if id(one) in known:
                return known[id(one)]
            return OnGpu(one, device, ours[0].block) if is_view else self._made(one, device, str(func))

        return type(result)(map(outside, result)) if isinstance(result, list | tuple) else outside(result)

    def _made(self, inner: Tensor, device: torch.device, what: str) -> Tensor:
        with self.lock:
            stream, block = self.stream(device), self.new_block(device, what)
            block.writes.append(Use(stream, stream.known.get(stream, 0), f"{what} in {stream.name}"))
            return OnGpu(inner, device, block)

    def submit(
        self,
        what: str,
        device: torch.device,
        tensors: Sequence[Tensor],
        written: Sequence[Tensor],
        waits: bool = False,
        stream: Stream | None = None,
    ) -> None:
        """Notes work in a stream, this thread's current one if none is given."""
        with self.lock:
            thread, stream = self.thread(), stream or self.stream(device)
            thread.act(what)
            stream.learn(thread.known)
            stream.time += SECONDS
            self._note(stream, what, tensors, written)
            if waits:
                self.check_capture()
                thread.learn(stream.known)

    def on_host(
        self, what: str, tensors: Sequence[Tensor], written: Sequence[Tensor] = (), reaches: bool = False
    ) -> None:
        """Notes that this thread itself uses memory, on the host; if it `reaches` so far, that of a GPU."""
        with self.lock:
            if any(isinstance(one, OnGpu) for one in tensors) and not reaches:
                self.complaints.append(f"{what} uses memory of a GPU")
            self._note(self.thread(), what, tensors, written)

    def _note(self, actor: Actor, what: str, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        use, changed = actor.act(what), {id(one) for one in written}
        self.log.append(use.what)
        for tensor in tensors:
            block = self._block_of(tensor)
            if block is not None:
                block.use(actor, use, id(tensor) in changed)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among arguments, and in lists of tensors among them."""
    found: list[Tensor] = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += [inner for inner in one if isinstance(inner, Tensor)]
    return found


def _inside(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.held
    return type(value)(map(_inside, value)) if isinstance(value, list | tuple) else value


@cache
def _aliases(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """Returns which arguments an operation changes, and whether it makes views."""
    aliased = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments) if a.alias_info]
    changed = [(place, name) for place, name, alias in aliased if alias.is_write]
    return changed, len(changed) < len(aliased)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
    """Returns the tensors that an operation changes, and whether it makes views."""
    changed, is_view = _aliases(func)
    return _tensors(args[i] if i < len(args) else kwargs.get(name) for i, name in changed), is_view


@cache
def site_of(file: str, code: CodeType, line: int) -> str:
    """Returns file:function, and which of its waits it is if there are several."""
    lines, first = inspect.getsourcelines(code)
    waits = [first + i for i, text in enumerate(lines) if any(wait in text for wait in WAITS)]
    number = sum(one <= line for one in waits)
    return f"{file}:{code.co_name}" + (f" {number}" if len(waits) > 1 else "")


class OnGpu(Tensor):
    """A tensor that claims to lie on a GPU, and a tensor `held` on the CPU that has its numbers."""

    held: Tensor
    block: Block
    _claimed: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, block: Block) -> OnGpu:  # noqa: ANN001, D102
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),  # for torch's own code, which would look for a driver
        )
        made.held, made.block, made._claimed = inner, block, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """See torch."""
        return self._claimed

    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def cpu(self) -> Tensor:  # type: ignore[override]
        """See torch."""
        CURRENT.submit("a copy to the host", self.device, [self], [], waits=True)
        return self.held.detach().clone()

    def tolist(self) -> Any:
        """See torch."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return CURRENT.run(func, args, kwargs or {})


CURRENT = Recorder()
"""The one that records now."""


@contextmanager
def stand_in(without: str = "") -> Iterator[Recorder]:
    """Within, there are GPUs as far as hvd_saef can tell. The waits at the site `without` are taken away."""
    global CURRENT
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # older torches look at torch.cuda when they make the first one
    before, CURRENT = CURRENT, Recorder(without)
    with pytest.MonkeyPatch.context() as patch:
        _replace_cuda(patch)
        _replace_memory(patch)
        _follow_threads(patch)
        try:
            yield CURRENT
        finally:
            CURRENT = before


def _replace_cuda(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        thread = CURRENT.thread()
        old, thread.device = thread.device, which.index or 0
        try:
            yield
        finally:
            thread.device = old

    @contextmanager
    def stream(which: Stream) -> Iterator[None]:
        thread, index = CURRENT.thread(), which.device.index
        old = CURRENT.stream(which.device)
        thread.streams[index] = which
        try:
            yield
        finally:
            thread.streams[index] = old

    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: CURRENT.stream(device),
        "current_device": lambda: CURRENT.thread().device,
        "device": device,
        "stream": stream,
        "is_current_stream_capturing": lambda: CURRENT.captured,
    }.items():
        patch.setattr(torch.cuda, name, value)


def _replace_memory(patch: pytest.MonkeyPatch) -> None:
    def on_gpu(device: Any) -> bool:
        return device is not None and torch.device(device).type == "cuda"

    def factory(name: str) -> Callable[..., Tensor]:
        original = getattr(torch, name)

        def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            if pin_memory:
                return CURRENT.host_memory(*args)
            if not on_gpu(device):
                kwargs |= {} if device is None else {"device": device}
                return original(*args, **kwargs)  # type: ignore[no-any-return]
            inner = original(*args, **kwargs)
            made = OnGpu(inner, torch.device(device), CURRENT.new_block(torch.device(device), name))
            if name == "empty":
                CURRENT.buffers += 1
            else:
                CURRENT.submit(name, made.device, [made], [made])
            return made

        return make

    for name in ("empty", "zeros", "full", "linspace", "arange", "tensor"):
        patch.setattr(torch, name, factory(name))
    to, numpy = Tensor.to, Tensor.numpy

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = kwargs.get("device", args[0] if args else None)
        if not isinstance(target, torch.device | str):
            return to(self, *args, **kwargs)
        if isinstance(self, OnGpu):
            return self if on_gpu(target) else self.cpu()
        return CURRENT.to_gpu(self, torch.device(target)) if on_gpu(target) else to(self, *args, **kwargs)

    def looked_at(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        CURRENT.on_host("a call with its memory", [self], [self])
        return numpy(self, *args, **kwargs)

    patch.setattr(Tensor, "to", moved)
    patch.setattr(Tensor, "numpy", looked_at)


def _follow_threads(patch: pytest.MonkeyPatch) -> None:
    """Futures and meetings hand on what threads know."""
    submit, exchange = ThreadPoolExecutor.submit, Meeting.exchange
    done, failed, result = Future.set_result, Future.set_exception, Future.result

    def submit_and_tell(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        known = dict(CURRENT.thread().known)

        def told() -> Any:
            CURRENT.thread().learn(known)
            return fn(*args, **kwargs)

        return submit(self, told)

    def end(original: Callable[..., None]) -> Callable[..., None]:
        def with_knowledge(self: Any, value: Any) -> None:
            self.known = dict(CURRENT.thread().known)
            original(self, value)

        return with_knowledge

    def result_and_knowledge(self: Any, timeout: float | None = None) -> Any:
        try:
            return result(self, timeout)
        finally:
            CURRENT.thread().learn(getattr(self, "known", {}))

    def meet(self: Meeting, rank: int, operation: str, value: Any, doing: str = "") -> list[Any]:
        everyone = exchange(self, rank, operation, (dict(CURRENT.thread().known), value), doing)
        for known, _ in everyone:
            CURRENT.thread().learn(known)
        return [theirs for _, theirs in everyone]

    patch.setattr(ThreadPoolExecutor, "submit", submit_and_tell)
    patch.setattr(Future, "set_result", end(done))
    patch.setattr(Future, "set_exception", end(failed))
    patch.setattr(Future, "result", result_and_knowledge)
    patch.setattr(Meeting, "exchange", meet)
