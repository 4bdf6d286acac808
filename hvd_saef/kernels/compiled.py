"""Calls the kernels in C++ (`csrc`), whose library uses nothing of torch, so that it serves all versions.

All memory is 1-D, contiguous and on the CPU, and has one dtype, float32 or float64. `runs` is int64, [n, 4];
a row is a run of blocks: its first element, the elements of a block, the number of blocks, and the number of
elements of each block that are sent (for Sign: all of them if the block is dense, else 0). `points` are
pieces that lie end to end and have together the length of all runs; each run lies within one piece. Payloads
(uint8) may begin at any byte. The kernels run on as many threads as torch uses, without the GIL. Local.

Wrong arguments raise ValueError. This module checks dtypes and strides before it takes an address; the C++
code checks lengths and the contents of payloads before it writes to the places that they name.

Importing this module raises ImportError if there is no library, or if the library was not built from the
sources beside it.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from hvd_saef.kernels.pieces import Pieces, is_gapless
from hvd_saef.kernels.sources import LIBRARY, digest

_FOLDER = Path(__file__).parent
_NUMBERS = (torch.float32, torch.float64)
_VALUES = {
    torch.float16: 1,
    torch.bfloat16: 2,
}  # the numbers are those of csrc/topk_payload.h, where 0 is the memory's own dtype
_Address = tuple[int, int]  # the address and the number of elements, which is -1 if there is no memory


class _Flat(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("size", c_int64))


class _Call(ctypes.Structure):
    """The arguments of a kernel: csrc/abi.h describes the fields."""

    _fields_ = (
        ("number", c_int64),
        ("value", c_int64),
        ("threads", c_int64),
        ("memory", _Flat),
        ("runs", _Flat),
        ("payload", _Flat),
        ("other", _Flat),
        ("server", _Flat),
        ("alpha", c_double),
        ("beta", c_double),
        ("points", _Flat),
        ("payloads", _Flat),
        ("weight", c_double),
    )


def _load() -> ctypes.CDLL:
    path = _FOLDER / LIBRARY
    if not path.exists():
        raise ImportError("they were not built")
    try:
        library = ctypes.CDLL(str(path))
        for name in ("sources", "message", "instruction_sets", "set_instruction_set"):
            getattr(library, f"hvd_saef_{name}").restype = c_char_p
        library.hvd_saef_set_instruction_set.argtypes = [c_char_p]
        for name in ("topk_encode", "topk_decode", "sign_encode", "sign_decode", "sign_settle"):
            getattr(library, f"hvd_saef_{name}").argtypes = [c_void_p]
        library.hvd_saef_at_most.argtypes = [c_void_p, c_double, ctypes.POINTER(c_int)]
        built_of = library.hvd_saef_sources().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path} is damaged, or for another machine: {error}") from error
    if built_of != digest(_FOLDER / "csrc"):
        raise ImportError(f"{path} was built of other sources than those beside it")
    return library


_library = _load()


# -- the arguments of a call ---------------------------------------------------------------------------


def _named(dtype: torch.dtype) -> str:
    """Returns the dtype's name as in torch's own errors: Float, Double, Half, Int and so on."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")


def _flat(tensor: Tensor, name: str, dtype: torch.dtype) -> _Address:
    """Returns the address and size of a tensor; raises ValueError, with its `name`, if it does not fit."""
    if not tensor.is_cpu:
        raise ValueError(f"{name}: a tensor on the CPU is needed")
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {_named(tensor.dtype)}; {_named(dtype)} is needed")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name}: a contiguous tensor of one dimension is needed")
    address, size = tensor.data_ptr(), tensor.numel()
    if not address and size:  # such a tensor has no memory of its own
        raise ValueError(f"{name}: a tensor on the CPU is needed")
    return address, size


def _maybe(tensor: Tensor | None, name: str, dtype: torch.dtype) -> _Address:
    return (0, -1) if tensor is None else _flat(tensor, name, dtype)


def _dtype(tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in _NUMBERS:
        raise ValueError(f"float32 or float64 is needed, not {_named(tensor.dtype)}")
    return tensor.dtype


def _runs(table: Tensor) -> _Address:
    right = table.is_cpu and table.dtype is torch.int64 and table.dim() == 2 and table.is_contiguous()
    if not right or table.shape[1] != 4:
        raise ValueError("runs: a contiguous int64 tensor [n, 4] on the CPU is needed")
    return table.data_ptr(), table.shape[0]


def _table(tensors: Sequence[Tensor], name: str, dtype: torch.dtype) -> array[int]:
    """Returns a table with the address and the number of elements of each tensor in turn.

    A `Pieces` keeps its table; for other sequences the caller must keep the table alive during the call.
    """
    tables = tensors.tables if isinstance(tensors, Pieces) else {}
    if dtype not in tables:
        tables[dtype] = array("q", [number for tensor in tensors for number in _flat(tensor, name, dtype)])
    return tables[dtype]


def _many(table: array[int]) -> _Address:
    return table.buffer_info()[0], len(table) // 2


def _value(dtype: torch.dtype, value_dtype: torch.dtype) -> int:
    if value_dtype is dtype:
        return 0
    if value_dtype not in _VALUES:
        given = _named(value_dtype)
        raise ValueError(f"value_dtype: {_named(dtype)}, float16 or bfloat16 is needed, not {given}")
    return _VALUES[value_dtype]


def _check(status: int) -> None:
    """Raises the exception for a function's result other than 0 (csrc/module.cpp)."""
    if status:
        error = {1: ValueError, 2: MemoryError}.get(status, RuntimeError)
        raise error(_library.hvd_saef_message().decode())


# -- the kernels ---------------------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """Returns the instruction sets that this CPU has, of "baseline", "avx2" and "avx512"."""
    return str(_library.hvd_saef_instruction_sets().decode()).split()


def set_instruction_set(name: str) -> str:
    """Makes the kernels use the instruction set `name`; returns the one used so far. For tests.

    Raises ValueError if this CPU does not have it.
    """
    before = _library.hvd_saef_set_instruction_set(name.encode())
    if before is None:
        raise ValueError(f"no instruction set {name} on this CPU")
    return str(before.decode())


def at_most(tensors: Sequence[Tensor], limit: float) -> bool:
    """Returns True if every element lies from -`limit` to `limit`; NaN does not.

    The tensors have one dtype and are on the CPU; they may have any shape and strides.
    """
    if not tensors:
        return True
    dtype = _dtype(tensors[0])
    numbers: list[int] = []
    copies = []  # copies of tensors with gaps must live as long as the call takes
    for tensor in tensors:  # there may be many small tensors, so this loop must be fast
        if tensor.dtype is not dtype or not tensor.is_cpu:
            raise ValueError("tensors: on the CPU and of one dtype they have to be")
        if not tensor.is_contiguous() and not is_gapless(tensor):
            tensor = tensor.contiguous()
            copies.append(tensor)
        address, size = tensor.data_ptr(), tensor.numel()
        if not address and size:
            raise ValueError("tensors: on the CPU they have to be")
        numbers += (address, size)
    table = array("q", numbers)
    call = _Call(number=dtype.itemsize, threads=torch.get_num_threads(), points=_many(table))
    fits = c_int()
    _check(_library.hvd_saef_at_most(ctypes.byref(call), limit, fits))
    return bool(fits.value)


def topk_encode(
    delta: Tensor,
    runs: Tensor,
    payload: Tensor,
    value_dtype: torch.dtype,
    x: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    weight: float = 0.0,
) -> None:
    """Writes C(Δ) into `payload` and leaves Δ - C(Δ) in `delta`, in place.

    Δ is the value of `delta`; plus (x - alpha·delta - beta·s) - points, if x is given; plus
    Σ weight·C(payload) over `payloads`, in their order.
    """
    value, names = _value(_dtype(delta), value_dtype), ("delta", "payload", "x")
    _run("topk_encode", names, value, delta, runs, payload, x, s, alpha, beta, points, payloads, weight)


def topk_decode(
    out: Tensor,
    runs: Tensor,
    payloads: Sequence[Tensor],
    value_dtype: torch.dtype,
    weight: float,
    e: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
) -> None:
    """Adds Σ weight·C(payload) over `payloads` to `out`, in place and in their order.

    Then writes out - alpha·e - beta·s into `points`.
    """
    value, names = _value(_dtype(out), value_dtype), ("out", "", "e")
    _run("topk_decode", names, value, out, runs, None, e, s, alpha, beta, points, payloads, weight)


def sign_encode(
    delta: Tensor,
    runs: Tensor,
    payload: Tensor,
    x: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    weight: float = 0.0,
) -> None:
    """Writes C(Δ) into `payload` and leaves Δ in `delta`, in place (0 in dense blocks).

    A later :func:`sign_settle` or :func:`sign_decode` subtracts C(Δ) from `delta`. Δ is the value of `delta`;
    plus (x - alpha·delta - beta·s) - points, if x is given; plus Σ weight·C(payload) over `payloads`, in
    their order.
    """
    names = ("delta", "payload", "x")
    _run("sign_encode", names, 0, delta, runs, payload, x, s, alpha, beta, points, payloads, weight)


def sign_decode(
    out: Tensor,
    runs: Tensor,
    payloads: Sequence[Tensor],
    weight: float,
    e: Tensor | None = None,
    sent: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
) -> None:
    """Adds Σ weight·C(payload) over `payloads` to `out`, in place and in their order.

    If e and `sent`, the payload made from e, are given, settles e as :func:`sign_settle` does. Then writes
    out - alpha·e - beta·s into `points`.
    """
    names = ("out", "sent", "e")
    _run("sign_decode", names, 0, out, runs, sent, e, s, alpha, beta, points, payloads, weight)


def sign_settle(memory: Tensor, runs: Tensor, payload: Tensor) -> None:
    """Subtracts the values of `payload`, which was made from `memory`, from `memory`, in place.

    Dense blocks are left alone: :func:`sign_encode` has settled them.
    """
    _run("sign_settle", ("memory", "payload", ""), 0, memory, runs, payload)


def _run(
    kernel: str,
    names: tuple[str, str, str],
    value: int,
    memory: Tensor,
    runs: Tensor,
    payload: Tensor | None,
    other: Tensor | None = None,
    server: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    weight: float = 0.0,
) -> None:
    """Calls a kernel. `names` are the names of memory, payload and other in error messages."""
    dtype = _dtype(memory)
    pieces, given = _table(points, "points", dtype), _table(payloads, "payloads", torch.uint8)
    call = _Call(
        dtype.itemsize,
        value,
        torch.get_num_threads(),
        _flat(memory, names[0], dtype),
        _runs(runs),
        _maybe(payload, names[1], torch.uint8),
        _maybe(other, names[2], dtype),
        _maybe(server, "s", dtype),
        alpha,
        beta,
        _many(pieces),
        _many(given),
        weight,
    )
    _check(getattr(_library, f"hvd_saef_{kernel}")(ctypes.byref(call)))
