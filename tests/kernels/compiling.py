"""Compiles the Triton kernels for GPUs that are not here, and prints a line of JSON for each.

    python -m tests.kernels.compiling cuda:90:32 hip:gfx942:64 --dtypes float32 --kernels sign.encode

The kernels are those that real calls launch, with the same constants; nothing is launched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.pop("TRITON_INTERPRET", None)  # which importing `tests` has set; torch has not imported Triton yet

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvd_saef.compression import Blocks
from hvd_saef.kernels import Stretch
from hvd_saef.kernels.on_triton import magnitudes, sign, topk

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ACCESS = re.compile(r"^\s+@%p\d+ (ld\.global|st\.global)[.\w:]*?\.(v\d\.)?[bfsu](\d+)", re.M)
"""Loads and stores with a mask: all but those that a whole program does once."""


Launched = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What is compiled otherwise."""

    sizes: tuple[int, ...]
    points: torch.dtype | None
    """The parameters' dtype; None is x's."""
    odd: bool
    """Whether payloads begin at an odd byte."""
    beta: float
    values: torch.dtype | None
    """The dtype of Top-K's values; None is x's."""

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether x may be of this dtype."""
        return self.points is None or dtype is torch.float32


KINDS = {
    "usual": Kind((200_000, 5), None, False, 0.0, None),
    "small": Kind((40, 5), torch.float16, True, 0.5, torch.bfloat16),
    "tiny": Kind((3,), torch.bfloat16, True, 0.5, torch.float16),
    "small, wide": Kind((40, 5), None, True, 0.5, torch.float16),
    "odd": Kind((200_000, 5), torch.bfloat16, True, 0.5, torch.bfloat16),
}


def launches(dtype: torch.dtype, kind: Kind = KINDS["usual"]) -> dict[str, Launched]:
    """The kernels that a step with sign and with Top-K launches: each with its arguments and constants.

    Kernels that are launched twice with other constants have a number after their names.
    """
    found: dict[str, Launched] = {}

    def launch(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        name = f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"
        same = [one for one in found if one.split(" ")[0] == name]
        runs = 0 not in (programs if isinstance(programs, tuple) else (programs,))
        if runs and all(found[one][2] != constants for one in same):
            found[f"{name} {len(same) + 1}" if same else name] = kernel, arguments, constants

    for module in (sign, topk, magnitudes):
        module.launch = launch  # type: ignore[attr-defined]
    topk.AT_ONCE = ()  # type: ignore[assignment]
    blocks = Blocks.cut(list(kind.sizes), None, dtype)
    memory, x, e, s = (torch.zeros(blocks.numel, dtype=dtype) for _ in range(4))
    s_or_none = s if kind.beta else None
    y = [torch.zeros(blocks.numel, dtype=kind.points or dtype)]
    number, values = dtype.itemsize, kind.values or dtype
    for table, format_of, item in (
        (blocks.table(lambda size: 0), sign.format_of, number),
        (blocks.table(lambda size: max(1, size // 100)), topk.format_of, values.itemsize),
    ):
        size = format_of(table.tolist(), item)[1]
        payload = torch.zeros(size + kind.odd, dtype=torch.uint8)[kind.odd :]
        sending = [Stretch(memory, table, payload, x, s_or_none, y)]
        serving = [Stretch(memory, table, payload, payloads=[payload, payload])]
        landing = [Stretch(x, table, payload, e, s_or_none, y, [payload])]
        if format_of is sign.format_of:
            sign.sign_settle([Stretch(memory, table, payload)])
            sign.sign_encode(sending, 1.0, kind.beta)
            sign.sign_encode(serving, weights=[0.5, 0.5])
            sign.sign_decode(landing, 1.0, kind.beta, [-1.0])
        else:
            topk.topk_encode(sending, values, 1.0, kind.beta)
            topk.topk_encode(serving, values, weights=[0.5, 0.5])
            topk.topk_decode(landing, values, 1.0, kind.beta, [-1.0])
    magnitudes.at_most([x], 1.0)
    return found


def type_of(value: Any) -> str:
    """An argument's type, as a launch finds it."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_one(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget
) -> dict[str, Any]:
    """What is known of a compiled kernel."""
    constants = dict(constants)
    warps = constants.pop("warps")
    names = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(names, arguments, strict=True))
    constants |= {name: value for name, value in given.items() if type(value) is int and value == 1}
    types = {name: type_of(value) for name, value in given.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [
        (place,)
        for place, name in enumerate(kernel.arg_names)
        if name in types and (types[name].startswith("*") or given[name] % 16 == 0)
    ]
    hints: dict[tuple[int, ...], Any] = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": max(1, warps * 32 // target.warp_size), "enable_fp_fusion": False}
    made = triton.compile(source, target=target, options=options)
    facts: dict[str, Any] = {"warps": warps, "tile": constants.get("TILE")}
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        facts["spilled"] = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)))  # into memory
        facts["fused"] = len(re.findall(r"^\s+v_(?:fma|fmac|mad|mac)_f32", text, re.M))
        return facts
    text = made.asm["ptx"]
    facts["spilled"] = _stack(made.asm["cubin"])
    facts["fused"] = len(re.findall(r"\bfma\.|\bmad\.\w*\.?f|\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)", text))
    accesses = Counter(f"{kind} {bits}" for kind, _, bits in ACCESS.findall(text))
    facts["accesses"] = dict(accesses)
    return facts


def _stack(cubin: bytes) -> int:
    """The bytes of the stack and of local memory of a thread: what does not fit into registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", report)
    if not sizes:
        raise ValueError(f"no sizes in {report!r}")
    return sum(map(int, sizes))


def main() -> None:
    """Compile, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", help="backend:architecture:threads of a warp")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--kernels", nargs="+", help="only these: module.name")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["usual"])
    options = parser.parse_args()
    for kind, dtype in itertools.product(options.kinds, options.dtypes):
        if not KINDS[kind].fits(getattr(torch, dtype)):
            continue
        for name, (kernel, arguments, constants) in launches(getattr(torch, dtype), KINDS[kind]).items():
            if options.kernels and name not in options.kernels:
                continue
            for target in options.targets:
                backend, architecture, threads = target.split(":")
                chip = int(architecture) if architecture.isdigit() else architecture
                facts = compile_one(kernel, arguments, constants, GPUTarget(backend, chip, int(threads)))
                line = {"kernel": name, "kind": kind, "target": target, "dtype": dtype, **facts}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
