"""Calls the kernels in C++ (`csrc`), whose library uses nothing of torch, so that it serves all versions.

`operations.py` says what each does and what is allowed. All memory is on the CPU. The kernels run on as many
threads as torch uses, without the GIL. The weights of one call are all the same number. Local.

This module checks dtypes and strides before it takes an address; the C++ code checks lengths and the
contents of payloads before it writes to the places that they name.

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

from hvd_saef.kernels.operations import Stretch, Stretches
from hvd_saef.kernels.pieces import Pieces, is_gapless, named
from hvd_saef.kernels.sources import LIBRARY, NOT_BUILT, digest

_FOLDER = Path(__file__).parent
_NUMBERS = (torch.float32, torch.float64)
_VALUES = {
    torch.float16: 1,
    torch.bfloat16: 2,
}  # the numbers are those of csrc/topk_payload.h, where 0 is the memory's own dtype
FUSES, UNEQUAL_WEIGHTS, NARROW_POINTS = True, False, False
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
        reason = path.with_name(NOT_BUILT)
        why = f": {reason.read_text().strip()}" if reason.exists() else ""
        raise ImportError(f"they were not built{why}")
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


def _flat(tensor: Tensor, name: str, dtype: torch.dtype) -> _Address:
    """Returns the address and size of a tensor; raises ValueError, with its `name`, if it does not fit."""
    if not tensor.is_cpu:
        raise ValueError(f"{name}: a tensor on the CPU is needed")
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {named(tensor.dtype)}; {named(dtype)} is needed")
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
        raise ValueError(f"float32 or float64 is needed, not {named(tensor.dtype)}")
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
        given = named(value_dtype)
        raise ValueError(f"value_dtype: {named(dtype)}, float16 or bfloat16 is needed, not {given}")
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


def describe() -> str:
    """See :meth:`Version.describe`."""
    return f"C++, for {instruction_sets()[-1]}"


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """See :meth:`Version.takes`."""
    return device.type == "cpu" and dtype in _NUMBERS


def raise_refusals() -> None:
    """See :meth:`Version.raise_refusals`: decoding has raised them."""


def at_most(tensors: Sequence[Tensor], limit: float) -> bool:
    """See :meth:`Version.at_most`."""
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
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_encode`."""
    for stretch in stretches:
        value = _value(_dtype(stretch.memory), value_dtype)
        _run("topk_encode", ("delta", "payload", "x"), value, stretch, alpha, beta, weights)


def topk_decode(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_decode`."""
    for stretch in stretches:
        value = _value(_dtype(stretch.memory), value_dtype)
        _run("topk_decode", ("out", "sent", "e"), value, stretch, alpha, beta, weights)


def sign_encode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_encode`."""
    for stretch in stretches:
        _run("sign_encode", ("delta", "payload", "x"), 0, stretch, alpha, beta, weights)


def sign_decode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_decode`."""
    for stretch in stretches:
        _run("sign_decode", ("out", "sent", "e"), 0, stretch, alpha, beta, weights)


def sign_settle(stretches: Stretches) -> None:
    """See :meth:`Version.sign_settle`."""
    for stretch in stretches:
        _run("sign_settle", ("memory", "payload", ""), 0, stretch)


def _run(
    kernel: str,
    names: tuple[str, str, str],
    value: int,
    stretch: Stretch,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """Calls a kernel. `names` are the names of memory, payload and other in error messages."""
    if len(weights) != len(stretch.payloads) or len(set(weights)) > 1:
        raise ValueError(f"weights={weights!r}: the same number for each of the payloads is needed")
    dtype = _dtype(stretch.memory)
    pieces = _table(stretch.points, "points", dtype)
    given = _table(stretch.payloads, "payloads", torch.uint8)
    call = _Call(
        dtype.itemsize,
        value,
        torch.get_num_threads(),
        _flat(stretch.memory, names[0], dtype),
        _runs(stretch.runs),
        _maybe(stretch.payload, names[1], torch.uint8),
        _maybe(stretch.other, names[2], dtype),
        _maybe(stretch.s, "s", dtype),
        alpha,
        beta,
        _many(pieces),
        _many(given),
        weights[0] if weights else 0.0,
    )
    _check(getattr(_library, f"hvd_saef_{kernel}")(ctypes.byref(call)))
