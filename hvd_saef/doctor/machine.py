"""Checks of cores, names and network interfaces. Local, but that check_cores() is collective."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import torch

from hvd_saef.doctor import vendors
from hvd_saef.doctor.findings import Finding, failure, ok, warning
from hvd_saef.transport.mpi import MPI


def check_cores() -> Finding:
    """Compares the threads of all ranks on this host with the cores that they may use. Collective."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    ranks = _ranks_here()
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


def _ranks_here() -> int:
    if MPI is None:
        return 1
    here = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        return int(here.Get_size())
    finally:
        here.Free()


def check_name() -> Finding:
    """Checks that the host's name resolves, since launchers look up hosts by name."""
    name = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        fix = f"add {name} to /etc/hosts or DNS, on all hosts"
        return failure("host name", f"{name} does not resolve ({error.strerror})", fix)
    return ok("host name", f"{name} is {', '.join(sorted(found))}")


def check_interfaces() -> Finding:
    """Warns of bridges: MPI over TCP uses all interfaces, and those of bridges lead nowhere."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    up = [name for name in names if _reads(f"/sys/class/net/{name}/operstate") in ("up", "unknown")]
    bridges = [name for name in up if re.match(r"docker|virbr|br-|cni|flannel|podman", name)]
    vendor = vendors.vendor()
    if bridges and not any(name in os.environ for name in vendor.interfaces):
        good = next((name for name in up if name not in bridges), "the right one")
        fix = vendor.avoid.format(bad=",".join(bridges), good=good)
        return warning("interfaces", f"{', '.join(up)}: MPI over TCP may take {bridges[0]}", fix)
    return ok("interfaces", ", ".join(up) or "none but lo")


def _reads(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
