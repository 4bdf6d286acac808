#!/usr/bin/env bash
# mpirun with what Open MPI 4 and 5, MPICH and Intel MPI need: hosts and slots, root, more ranks than cores,
# binding, the environment. Everything that starts MPI jobs here, tests too, asks this script.
#
#   launch/mpirun.sh -np 4 python -m mpi4py train.py
#   HOSTS=node1:4,node2:4 INTERFACE=ib0 launch/mpirun.sh python -m mpi4py train.py
#
# All arguments are mpirun's. `python -m mpi4py` ends the job when one rank fails. In a SLURM job leave HOSTS
# empty: mpirun asks SLURM. Other hosts are reached by ssh without a password, and must see the checkout
# under the same path.
set -euo pipefail

# --- settings, also from the environment; MODULES and VENV: see environment.sh --------------------------
HOSTS=${HOSTS:-}           # name:slots,name:slots (a slot is a rank); empty: this machine, or the scheduler's
INTERFACE=${INTERFACE:-}   # network interface for MPI over TCP; empty: MPI chooses (and finds InfiniBand)
BINDING=${BINDING:-none}   # core, socket, none: none is right when ranks share cores
OVERSUBSCRIBE=${OVERSUBSCRIBE:-auto}   # more ranks than slots: yes, no; auto: on this machine alone (Open MPI's)
# ---------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"
command -v mpirun >/dev/null || { echo "mpirun.sh: no mpirun: load an MPI module, or run launch/bootstrap.sh" >&2; exit 1; }

mpi=$(mpi_on_path)
start=mpirun
options=()

open_mpi() {
  if [ "$OVERSUBSCRIBE" = auto ]; then
    OVERSUBSCRIBE=no
    if [ -z "$HOSTS" ] && [ -z "${SLURM_JOB_ID:-}" ]; then OVERSUBSCRIBE=yes; fi
  fi
  local mapping=slot name
  if [ "$OVERSUBSCRIBE" = yes ]; then mapping=slot:OVERSUBSCRIBE; fi   # 4 and 5 both know it in this form
  options=(--bind-to "$BINDING" --map-by "$mapping")
  if [ -n "$HOSTS" ]; then options+=(-H "$HOSTS"); fi
  if [ -n "$INTERFACE" ]; then
    options+=(--mca pml ob1 --mca btl_tcp_if_include "$INTERFACE")
    case $mpi in
      openmpi4) options+=(--mca oob_tcp_if_include "$INTERFACE") ;;
      *) options+=(--prtemca oob_tcp_if_include "$INTERFACE") ;;
    esac
  fi
  # Ranks on other hosts get only what is named; what is set for some ranks alone can make a job hang.
  while IFS= read -r name; do
    options+=(-x "$name")
  done < <(compgen -e | grep -E '^(PATH|LD_LIBRARY_PATH|PYTHON.*|OMP_.*|MKL_.*|OMPI_MCA_mpi_yield_when_idle|(HVD_SAEF|HOROVOD|NCCL|UCX)_.*)$')
}

# MPICH and Intel MPI pass the whole environment on, take as many ranks as they are asked for, and do not mind root.
hydra() {
  if [ -n "$HOSTS" ]; then options+=(-hosts "$HOSTS"); fi
  if [ -n "$INTERFACE" ]; then options+=(-iface "$INTERFACE"); fi
  use_interface "$INTERFACE"
}

# Intel MPI's mpirun is a shell script: a signal ends it alone, and its ranks go on. Hydra itself passes signals on;
# what the script finds out of a scheduler other than SLURM is left to it.
of_intel() {
  if [ -n "${PBS_ENVIRONMENT:-}${LSB_JOBID:-}${PE_HOSTFILE:-}${LOADL_HOSTFILE:-}" ]; then return; fi
  if [ -n "${SLURM_JOB_ID:-}" ]; then export I_MPI_HYDRA_BOOTSTRAP=${I_MPI_HYDRA_BOOTSTRAP:-slurm}; fi
  start=mpiexec.hydra
}

case $mpi in
  openmpi*) open_mpi ;;
  mpich) options=(-bind-to "$BINDING"); hydra ;;
  intel) bind_intel "$BINDING"; hydra; of_intel ;;
  *) echo "mpirun.sh: $mpi: only Open MPI's, MPICH's and Intel MPI's options are known; call your mpirun by itself" >&2; exit 1 ;;
esac

# By its whole path: so it finds its own daemons on the other hosts, whatever their PATH is.
exec "$(command -v "$start")" "${options[@]}" "$@"
