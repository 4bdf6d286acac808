"""Compiles the Triton kernels for GPUs that are not here, and prints a line of JSON for each.

    python -m tests.kernels.compiling cuda:90:32 hip:gfx942:64 --dtypes float32 --kernels encode decode

The kernels are those that real calls launch, with the same constants; nothing is launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
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


def launches(dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that a step with sign and with Top-K launches: each with its arguments and constants."""
    found: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def launch(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        module = kernel.__module__.rsplit(".", 1)[-1]
        found[f"{module}.{kernel.__name__}"] = kernel, arguments, constants

    for module in (sign, topk, magnitudes):
        module.launch = launch  # type: ignore[attr-defined]
    topk.AT_ONCE = ()  # type: ignore[assignment]
    blocks = Blocks.cut([200_000, 5], None, dtype)
    memory, x, e, y = (torch.zeros(blocks.numel, dtype=dtype) for _ in range(4))
    sign_table, topk_table = blocks.table(lambda size: 0), blocks.table(lambda size: max(1, size // 100))
    size = sign.format_of(sign_table.tolist(), dtype.itemsize)[1]
    payload = torch.zeros(size, dtype=torch.uint8)
    sign.sign_settle([Stretch(memory, sign_table, payload)])
    sign.sign_encode([Stretch(memory, sign_table, payload, x, None, [y])], 1.0)
    landed = Stretch(x, sign_table, payload, e, None, [y], [payload])
    sign.sign_decode([landed], 1.0, weights=[-1.0])
    payload = torch.zeros(topk.format_of(topk_table.tolist(), dtype.itemsize)[1], dtype=torch.uint8)
    topk.topk_encode([Stretch(memory, topk_table, payload, x, None, [y])], dtype, 1.0)
    landed = Stretch(x, topk_table, None, e, None, [y], [payload])
    topk.topk_decode([landed], dtype, 1.0, weights=[-1.0])
    magnitudes.at_most([x], 1.0)
    return found


def compile_one(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget
) -> dict[str, Any]:
    """What is known of a compiled kernel."""
    constants = dict(constants)
    warps = constants.pop("warps")
    names = [name for name in kernel.arg_names if name not in constants]
    types = [POINTERS[a.dtype] if isinstance(a, torch.Tensor) else "i64" for a in arguments]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
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
    parser.add_argument("--kernels", nargs="+", help="only these: a prefix of module.name")
    options = parser.parse_args()
    for dtype in options.dtypes:
        for name, (kernel, arguments, constants) in launches(getattr(torch, dtype)).items():
            if options.kernels and not name.startswith(tuple(options.kernels)):
                continue
            for target in options.targets:
                backend, architecture, threads = target.split(":")
                chip = int(architecture) if architecture.isdigit() else architecture
                facts = compile_one(kernel, arguments, constants, GPUTarget(backend, chip, int(threads)))
                line = {"kernel": name, "target": target, "dtype": dtype, **facts}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
