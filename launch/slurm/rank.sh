#!/usr/bin/env bash
# srun starts this once for each rank: SLURM's variables tell torch.distributed who the rank is, without MPI.
#
#   srun --mpi=none -N2 -n4 launch/slurm/rank.sh hvd-saef doctor
#   srun --mpi=none -N2 -n4 launch/slurm/rank.sh python train.py
#
# A variable that is set already stays: MASTER_ADDR (else the step's first node, where rank 0 runs) and
# MASTER_PORT (else a port of the job's own, by its number). INTERFACE is the network interface for gloo and NCCL.
set -euo pipefail

if [ -z "${SLURM_PROCID:-}" ]; then echo "rank.sh: no SLURM_PROCID: srun starts this script" >&2; exit 64; fi
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS

if [ -z "${MASTER_ADDR:-}" ]; then
  nodes=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  export MASTER_ADDR=${nodes%%$'\n'*}
fi
# 20000 to 31999: Linux gives none of these to outgoing connections. The steps of a job have ports of their own.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (10 * SLURM_JOB_ID + SLURM_STEP_ID % 10) % 12000))}

if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE; fi
exec "$@"
