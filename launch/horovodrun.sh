#!/usr/bin/env bash
# horovodrun with what it needs to start on Open MPI 4 and 5, as root or not, with more ranks than cores.
#
#   launch/horovodrun.sh -np 4 python train.py
#
# All arguments are horovodrun's. Horovod 0.28.1 passes its binding options in the form of Open MPI 4,
# which Open MPI 5 takes for the name of a program; --binding-args says the same in a form both know.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An environment that is active already goes first, then the one of this checkout.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -d "$root/.venv/bin" ]; then PATH=$root/.venv/bin:$PATH; fi
command -v horovodrun >/dev/null || { echo "horovodrun.sh: no horovodrun: run launch/bootstrap.sh first" >&2; exit 1; }

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Ranks that wait give way to ranks that compute, and each rank computes with one thread unless told otherwise.
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec horovodrun --binding-args="--bind-to none --map-by slot" "$@"
