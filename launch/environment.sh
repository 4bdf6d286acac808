# shellcheck shell=bash
# Sourced by the other files here, from the checkout: the environment in which ranks run.
#
#   MODULES   modules to load: the ones that launch/bootstrap.sh was called with, as "gcc/13 openmpi/5"
#   VENV      the environment that it made (default: .venv of the checkout; one that is active goes first)

for module in ${MODULES:-}; do
  module load "$module"
done

venv=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv}
if [ -n "${VENV:-}" ] || [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ -d "$venv/bin" ]; then PATH=$venv/bin:$PATH; fi
fi

# Threads a rank: the cores that SLURM gave it, else one. More in all than cores makes everything slow.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Ranks that wait give way to those that compute: hvd_saef and Horovod have threads beside the main one.
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
# In a container, say, everyone is root, which Open MPI refuses unless it is told twice.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
