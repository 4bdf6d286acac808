"""Packaging lives in pyproject.toml; this file builds the C++ kernels, where that is possible."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

CSRC = Path("hvd_saef/kernels/csrc")
FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",  # a fused multiply-add rounds once; the twins round twice
    "-fno-math-errno",
    "-Wno-psabi",  # vectors are passed between inlined functions only
]
if os.environ.get("HVD_SAEF_SANITIZE") == "1":  # see make sanitize
    FLAGS[:2] = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    LINK = ["-fopenmp", "-fsanitize=address,undefined"]
else:
    LINK = ["-fopenmp"]


def kernels() -> dict[str, Any]:
    """The extension and how it is built; nothing if torch is not here to build against.

    A failed build is no failed installation: without the extension the twins in plain torch work.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"hvd_saef: no C++ kernels ({error}): the twins in plain torch will be used.")
        return {}

    class Optional(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                print(
                    f"hvd_saef: the C++ kernels were not built ({error}); the twins in plain torch will be "
                    "used, which are slower. A C++20 compiler and Python's headers are needed."
                )

    extension: Extension = CppExtension(
        "hvd_saef.kernels._native",
        sources=sorted(map(str, CSRC.glob("*.cpp"))),
        depends=sorted(map(str, CSRC.glob("*.h"))),
        extra_compile_args=FLAGS,
        extra_link_args=LINK,
        optional=True,
    )
    ninja = shutil.which("ninja") is not None
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Optional.with_options(use_ninja=ninja, no_python_abi_suffix=False)},
    }


setup(**kernels())
