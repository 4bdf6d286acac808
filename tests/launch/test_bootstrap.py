"""launch/bootstrap.sh says in one line what is missing, and keeps the torch that is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.mpi.launch import LIMIT, ROOT

# The interpreter below the virtual environment that the tests run in.
PYTHON = str(Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_python_version()}")
TOOLS = ("bash", "sed", "cat", "cut", "sha256sum", "dirname", "grep", "mkdir", "g++", "cmake", "make")


def bootstrap(folder: Path, tools: tuple[str, ...] = TOOLS, **environment: str) -> tuple[int, str]:
    """Run it where only `tools` are on the PATH; nothing is installed before the tools are checked."""
    path = folder / "bin"
    path.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found is not None
        (path / tool).symlink_to(found)
    command = [str(ROOT / "launch" / "bootstrap.sh"), "--venv", str(folder / "venv")]
    variables = {"PATH": str(path), "HOME": str(folder), "PYTHON": PYTHON} | environment
    job = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT)
    assert not (folder / "venv").exists()
    return job.returncode, job.stderr


@pytest.mark.parametrize("tool", ["g++", "cmake", "make"])
def test_a_missing_tool(tmp_path: Path, tool: str) -> None:
    code, said = bootstrap(tmp_path, tuple(name for name in TOOLS if name != tool))
    assert code == 1
    assert len(said.splitlines()) == 1
    assert tool in said
    assert "install" in said


def fake_python(folder: Path, refuses: str) -> str:
    """An interpreter that fails one of the questions that it is asked."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"{refuses}"*) exit 1;; esac\nexec "{PYTHON}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("refuses", "says"),
    [("Python.h", "python3-dev"), ("ensurepip", "python3-venv"), ("version_info < (3, 10)", "3.10 or newer")],
)
def test_a_lacking_python(tmp_path: Path, refuses: str, says: str) -> None:
    code, said = bootstrap(tmp_path, PYTHON=fake_python(tmp_path, refuses))
    assert code == 1
    assert len(said.splitlines()) == 1
    assert says in said


def test_an_mpi_that_compiles_nothing(tmp_path: Path) -> None:
    """Intel MPI's, say, where its module is not loaded."""
    compiler = tmp_path / "mpicxx"
    compiler.write_text("#!/bin/sh\necho 'mpi.h: No such file'\necho more\nexit 1\n")
    compiler.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{tmp_path}"
    code, said = bootstrap(tmp_path, (*TOOLS, "head"), PATH=path)
    assert code == 1
    assert len(said.splitlines()) == 1
    assert "mpicxx does not compile MPI programs (mpi.h: No such file): load its module" in said


def with_torch(folder: Path, version: str) -> str:
    """The interpreter of a virtual environment in which a torch of this version is all there is."""
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=LIMIT)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch.py").write_text(f"__version__ = {version!r}\n")
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.2.2+cu121", "has torch 2.2.2+cu121, older than 2.3, the oldest tried"),
        ("2.10.0", "no cmake"),  # a newer one, whose number is no larger as text
    ],
)
def test_a_torch_that_is_there(tmp_path: Path, version: str, says: str) -> None:
    tools = [tool for tool in (*TOOLS, "sort", "head") if tool != "cmake" or says.startswith("has")]
    code, said = bootstrap(tmp_path, tuple(tools), PYTHON=with_torch(tmp_path / "site", version))
    assert code == 1
    assert len(said.splitlines()) == 1
    assert says in said


def test_the_environment_sees_the_torch_of_another(tmp_path: Path) -> None:
    """Of an interpreter that itself is of a virtual environment: what is below that is not enough."""
    command = [str(ROOT / "launch" / "bootstrap.sh"), "--without-horovod", "--venv", str(tmp_path / "venv")]
    site = with_torch(tmp_path / "site", "2.3.1+of.the.site")
    nothing = {
        "PYTHON": site,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
    }  # it ends at the first package
    job = subprocess.run(command, env=os.environ | nothing, capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 1
    asked = [str(tmp_path / "venv" / "bin" / "python"), "-c", "import torch; print(torch.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "2.3.1+of.the.site\n"


def wheel(folder: Path, says: str) -> None:
    """A built Horovod of always the same version, as the cache keeps it."""
    folder.mkdir(parents=True)
    about = "horovod-1.0.dist-info"
    with zipfile.ZipFile(folder / "horovod-1.0-py3-none-any.whl", "w") as file:
        file.writestr("horovod.py", f"built_for = {says!r}\n")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: horovod\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(
            f"{about}/RECORD", f"horovod.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n"
        )


def test_what_was_built_for_another_mpi_is_replaced(tmp_path: Path) -> None:
    """Both have the same name and version, for which pip alone would keep the one that is there."""
    for mpi in ("one", "another"):
        wheel(tmp_path / f"horovod-{mpi}", mpi)
    venv = tmp_path / "venv"
    quick = ["--without-pip", "--system-site-packages"]  # pip is that of the interpreter below
    subprocess.run([PYTHON, "-m", "venv", *quick, str(venv)], check=True, timeout=LIMIT)
    script = (ROOT / "launch" / "bootstrap.sh").read_text()
    functions = re.findall(
        r"^(?:pip\(\) [^\n]*|cached_wheel\(\) \{.*?^\})$", script, re.MULTILINE | re.DOTALL
    )
    commands = [f"venv={venv} cache={tmp_path}", *functions]
    for mpi in ("one", "another"):
        commands += [
            f"cached_wheel horovod {mpi} no_build",
            f"{venv}/bin/python -c 'import horovod; print(horovod.built_for)'",
        ]
    job = subprocess.run(
        ["bash", "-euc", "\n".join(commands)], stdout=subprocess.PIPE, text=True, timeout=LIMIT
    )
    assert job.returncode == 0
    assert job.stdout.split() == ["one", "another"]


def test_no_python_and_wrong_option(tmp_path: Path) -> None:
    code, said = bootstrap(tmp_path, PYTHON="no-such-python")
    assert code == 1
    assert "no no-such-python found" in said
    command = [str(ROOT / "launch" / "bootstrap.sh"), "--gpu"]
    job = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 1
    assert "--gpu" in job.stderr
    assert "--cuda" in job.stderr


def test_make_starts_only_programs_that_the_set_up_installs() -> None:
    """Those of torch and Horovod may belong to another environment, which leaves no scripts in this one."""
    started = set(re.findall(r"\.venv/bin/([\w-]+)", (ROOT / "Makefile").read_text()))
    assert started == {"python", "ruff", "mypy", "shellcheck", "hadolint", "sphinx-build"}
