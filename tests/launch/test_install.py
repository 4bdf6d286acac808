"""`pip install .` adds hvd_saef alone, also from an sdist, and without a compiler says why it is slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvd_saef.kernels import sources
from tests.kernels.versions import compiled
from tests.mpi.launch import LIMIT, ROOT

pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 77 or newer")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation needs, without what a build in the checkout has left there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    left = shutil.ignore_patterns("*.so", sources.NOT_BUILT, "__pycache__")
    shutil.copytree(ROOT / "hvd_saef", folder / "hvd_saef", ignore=left)
    return folder


def python(folder: Path, *arguments: str) -> str:
    """What Python prints in a folder, where no compiler is found."""
    command = [sys.executable, *arguments]
    job = subprocess.run(
        command, cwd=folder, env=os.environ | NO_COMPILER, capture_output=True, text=True, timeout=LIMIT
    )
    assert job.returncode == 0, job.stderr
    return job.stdout


def test_pip_would_install_nothing_else(checkout: Path) -> None:
    """Nor a newer torch, whichever is here: with no index, what is not here would be an error."""
    options = ("--quiet", "--report", "-", "--no-index", "--no-build-isolation", "--dry-run")
    report = json.loads(python(checkout, "-m", "pip", "install", *options, "."))
    assert [each["metadata"]["name"] for each in report["install"]] == ["hvd_saef"]


def build(folder: Path, what: str) -> Path:
    """Builds an sdist or a wheel as pip does."""
    made = python(folder, "-c", f"from setuptools import build_meta as b; print(b.build_{what}('dist'))")
    return folder / "dist" / made.splitlines()[-1]


def names(files: Sequence[Path], within: Path) -> list[str]:
    return sorted(str(path.relative_to(within)) for path in files)


def test_a_wheel_of_an_sdist_without_a_compiler(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(build(checkout, "sdist")) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    wheel = build(source, "wheel")
    assert wheel.name.startswith("hvd_saef-")
    assert "-py3-none-" in wheel.name  # one for every Python, and for every torch
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed, here = tmp_path / "site" / "hvd_saef", ROOT / "hvd_saef"
    kept = [path for path in here.rglob("*") if path.suffix in (".py", ".json", ".typed", ".cpp", ".h")]
    found = [path for path in installed.rglob("*") if path.is_file() and path.name != sources.NOT_BUILT]
    assert names(found, installed) == names(kept, here)
    reason = (installed / "kernels" / sources.NOT_BUILT).read_text()
    assert reason.startswith("command '/nonexistent/c")
    assert len(reason.splitlines()) == 1
    if compiled is None:
        pytest.skip("the rest needs kernels: they are not built")
    monkeypatch.setattr(compiled, "_FOLDER", installed / "kernels")
    with pytest.raises(ImportError, match="they were not built: command '/nonexistent/c"):
        compiled._load()
    shutil.copy(here / "kernels" / sources.LIBRARY, installed / "kernels")
    compiled._load()  # the sources beside it are those that it was built of
