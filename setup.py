"""Packaging lives in pyproject.toml; this file builds the C++ kernels, where that is possible.

They are a library of their own, which neither torch nor Python's headers are needed for, and which every
version of both can load. In a checkout: python setup.py build_ext --inplace
"""

from __future__ import annotations

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("hvd_saef/kernels")
CSRC = KERNELS / "csrc"
NAMES: dict[str, Any] = runpy.run_path(str(KERNELS / "sources.py"))
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add rounds once; the twins round twice
    "-fno-math-errno",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-Wno-maybe-uninitialized",  # g++ 12 warns of its own headers
]
LINK = ["-fopenmp"]
if os.environ.get("HVD_SAEF_SANITIZE") == "1":  # see make sanitize
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    LINK += ["-fsanitize=address,undefined"]


class BuildLibrary(build_ext):
    """A library instead of a module. A failed build is no failed installation: there are the twins."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or say in a line why not."""
        reason = Path(self.get_ext_fullpath(ext.name)).with_name(NAMES["NOT_BUILT"])
        reason.unlink(missing_ok=True)
        try:
            self.link(ext)
        except (Exception, SystemExit) as error:
            why = " ".join(str(error).split())
            print(
                f"hvd_saef: the C++ kernels were not built ({why}); the twins in plain torch will be used, "
                "which are slower. A C++17 compiler is needed."
            )
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{why}\n")  # pip shows no line of a build: the first use shows this one

    def link(self, ext: Extension) -> None:
        """The library of the sources, which are compiled side by side."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            compiled = threads.map(lambda source: self.compile(source, ext), ext.sources)
            objects = [name for names in compiled for name in names]
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(
            objects, path, extra_postargs=ext.extra_link_args, build_temp=self.build_temp, target_lang="c++"
        )

    def compile(self, source: str, ext: Extension) -> list[str]:
        """The names of what became of a source."""
        names: list[str] = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        return names


class OneWheel(bdist_wheel):
    """The wheel is for a platform, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The three parts at the end of its name."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            ".".join((KERNELS / NAMES["LIBRARY"]).with_suffix("").parts),
            sources=sorted(map(str, CSRC.glob("*.cpp"))),
            depends=sorted(map(str, CSRC.glob("*.h"))),
            define_macros=[("HVD_SAEF_SOURCES", f'"{NAMES["digest"](CSRC)}"')],
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": OneWheel},
)
