#!/usr/bin/env bash
# horovodrun with what it needs to start on Open MPI 4 and 5, MPICH and Intel MPI, as root or not, with more
# ranks than cores.
#
#   launch/horovodrun.sh -np 4 python train.py
#   HOSTS=node1:4,node2:4 INTERFACE=ib0 launch/horovodrun.sh python train.py
#
# All arguments are horovodrun's. Other hosts are reached by ssh without a password, and must see the checkout
# under the same path.
set -euo pipefail

# --- settings, also from the environment; MODULES and VENV: see environment.sh --------------------------
HOSTS=${HOSTS:-}           # name:slots,name:slots (a slot is a rank); empty: this machine, or horovodrun's -H
INTERFACE=${INTERFACE:-}   # the network interface that all hosts have in common; empty: horovodrun finds it
# ---------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"
command -v horovodrun >/dev/null || { echo "horovodrun.sh: no horovodrun: run launch/bootstrap.sh first" >&2; exit 1; }

options=()
if [ -n "$HOSTS" ]; then
  # A rank for each slot, unless -np comes later and says otherwise.
  ranks=$(tr ',' '\n' <<<"$HOSTS" | awk -F: '{ sum += NF > 1 ? $2 : 1 } END { print sum }')
  options+=(-np "$ranks" -H "$HOSTS")
fi
if [ -n "$INTERFACE" ]; then options+=(--network-interface "$INTERFACE"); fi

case $(mpi_on_path) in
  # Horovod 0.28.1 passes its binding options in the form of Open MPI 4, which Open MPI 5 takes for the name of a
  # program; --binding-args says the same in a form that both know.
  openmpi*) options=(--binding-args="--bind-to none --map-by slot" "${options[@]}") ;;
  # Horovod tells MPICH and Intel MPI nothing of the interface, and Intel MPI nothing of binding.
  mpich)
    use_interface "$INTERFACE"
    if ! grep -q MPICH <<<"$(mpirun --version)"; then PATH=$root/launch/mpich:$PATH; fi
    ;;
  intel)
    use_interface "$INTERFACE"
    bind_intel none
    ;;
esac

exec horovodrun "${options[@]}" "$@"
