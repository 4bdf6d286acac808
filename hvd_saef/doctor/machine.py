"""Checks of ranks, cores, names and network interfaces. Local."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import torch

from hvd_saef.doctor import vendors
from hvd_saef.doctor.findings import Finding, failure, ok, warning
from hvd_saef.doctor.jobs import MPI, Job

STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where launchers say how many processes they started: Open MPI's, Hydra of MPICH and Intel MPI, srun."""


def check_ranks(job: Job) -> Finding:
    """Checks that the processes that a launcher started have found each other."""
    if job.trouble is not None:
        return job.trouble
    started = int(next((os.environ[name] for name in STARTED if name in os.environ), "1"))
    if job.size > 1 or started == 1:
        return ok("ranks", f"{job.size}")
    found = f"{started} processes were started, and {job.carrier} sees 1: each would train alone"
    if job.carrier == MPI:
        srun = f"srun --mpi={vendors.vendor().srun}"
        fix = f"{srun} (srun --mpi=list says what there is), or the mpirun of the library"
    else:
        fix = "start the ranks by torchrun or launch/slurm/torch.sbatch; or install MPI: launch/bootstrap.sh"
    return failure("ranks", found, fix)


def check_cores(job: Job) -> Finding:
    """Compares the threads of all ranks on this host with the cores that they may use."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    ranks = job.neighbours()
    bound = cores < (os.cpu_count() or 1)  # bound cores are a rank's own; else all ranks share them
    wanted = threads if bound else threads * ranks
    found = f"{ranks} ranks of {threads} threads on {cores} cores" + (" each" if bound and ranks > 1 else "")
    if wanted <= cores:
        return ok("cores", found)
    most = max(1, cores if bound else cores // ranks)
    fix = (
        f"OMP_NUM_THREADS={most}" if threads > most else "fewer ranks a host, or accept that they take turns"
    )
    return warning("cores", found, fix)


def check_name() -> Finding:
    """Checks that the host's name resolves, since launchers look up hosts by name."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        fix = f"add {name} to /etc/hosts or DNS, on all hosts"
        return failure("host name", f"{name} does not resolve ({error.strerror})", fix)
    return ok("host name", f"{name} is {', '.join(sorted(found))}")


def check_bridges(job: Job) -> Finding:
    """Warns of bridges: MPI over TCP uses all interfaces, and those of bridges lead nowhere."""
    up = interfaces()
    bridges = [name for name in up if is_bridge(name)]
    vendor = vendors.vendor()
    if bridges and not any(name in os.environ for name in vendor.interfaces):
        good = next((name for name in up if name not in bridges), "the right one")
        fix = vendor.avoid.format(bad=",".join(bridges), good=good)
        return warning("interfaces", f"{', '.join(up)}: MPI over TCP may take {bridges[0]}", fix)
    return ok("interfaces", ", ".join(up) or "none but lo")


def interfaces() -> list[str]:
    """Returns the names of the network interfaces that are up, without lo."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return [name for name in names if _reads(f"/sys/class/net/{name}/operstate") in ("up", "unknown")]


def is_bridge(interface: str) -> bool:
    """Returns True if the name is one that containers and virtual machines give to their bridges."""
    return re.match(r"docker|virbr|br-|cni|flannel|podman", interface) is not None


def _reads(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
