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
# Each MPI has a variable of its own for that, and takes no notice of the others'.
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}   # Open MPI
export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}   # MPICH 4 and 5; older ones have none
export I_MPI_THREAD_YIELD=${I_MPI_THREAD_YIELD:-2}                       # Intel MPI
# In a container, say, everyone is root, which Open MPI refuses unless it is told twice.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# Prints whose mpirun is first on the PATH: "openmpi4", "openmpi" (5 or newer), "mpich", "intel"; for any
# other, what it says of itself. MPICH's and Intel MPI's have the same launcher, Hydra.
mpi_on_path() {
  local said
  said=$(mpirun --version 2>&1 </dev/null) || true
  case $said in
    *"(Open MPI) 4."*) echo openmpi4 ;;
    *"(Open MPI)"*) echo openmpi ;;
    *"Intel(R) MPI"*) echo intel ;;
    *HYDRA*) echo mpich ;;
    *) head -n 1 <<<"$said" ;;
  esac
}

# Prints what srun's --mpi has to be for the MPI on the PATH. `srun --mpi=list` says what there is.
srun_mpi() {
  case $(mpi_on_path) in
    mpich | intel) echo pmi2 ;;
    *) echo pmix ;;
  esac
}

# For MPICH and Intel MPI, which have no options of mpirun for it: TCP over this network interface, in libfabric
# and in UCX; an empty name changes nothing. Ranks of one host talk through memory all the same.
use_interface() {
  if [ -z "$1" ]; then return; fi
  export FI_PROVIDER=tcp FI_TCP_IFACE=$1 UCX_TLS=tcp,self UCX_NET_DEVICES=$1
}

# Intel MPI binds each rank to a core of its own unless it is told: none, core or socket.
bind_intel() {
  case $1 in
    none) export I_MPI_PIN=0 ;;
    *) export I_MPI_PIN=1 I_MPI_PIN_DOMAIN=$1 ;;
  esac
}
