#!/usr/bin/env bash
# mpirun with what Open MPI 4 and 5 need: hosts and slots, root, more ranks than cores, the environment.
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
OVERSUBSCRIBE=${OVERSUBSCRIBE:-auto}   # more ranks than slots: yes, no; auto: on this machine alone
# ---------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"
command -v mpirun >/dev/null || { echo "mpirun.sh: no mpirun: load an MPI module, or run launch/bootstrap.sh" >&2; exit 1; }

version=$(mpirun --version | head -n 1)
case $version in
  *"Open MPI"*) ;;
  *) echo "mpirun.sh: $version: its options are Open MPI's; call your mpirun by itself" >&2; exit 1 ;;
esac

if [ "$OVERSUBSCRIBE" = auto ]; then
  OVERSUBSCRIBE=no
  if [ -z "$HOSTS" ] && [ -z "${SLURM_JOB_ID:-}" ]; then OVERSUBSCRIBE=yes; fi
fi
mapping=slot
if [ "$OVERSUBSCRIBE" = yes ]; then mapping=slot:OVERSUBSCRIBE; fi   # 4 and 5 both know it in this form

options=(--bind-to "$BINDING" --map-by "$mapping")
if [ -n "$HOSTS" ]; then options+=(-H "$HOSTS"); fi
if [ -n "$INTERFACE" ]; then
  options+=(--mca pml ob1 --mca btl_tcp_if_include "$INTERFACE")
  case $version in
    *") 4."*) options+=(--mca oob_tcp_if_include "$INTERFACE") ;;
    *) options+=(--prtemca oob_tcp_if_include "$INTERFACE") ;;
  esac
fi
for name in PATH LD_LIBRARY_PATH PYTHONPATH OMP_NUM_THREADS OMPI_MCA_mpi_yield_when_idle; do
  if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi
done

# By its whole path: so Open MPI finds its own daemons on the other hosts, whatever their PATH is.
exec "$(command -v mpirun)" "${options[@]}" "$@"
