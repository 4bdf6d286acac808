"""Checks of torch.distributed: its backends, where its ranks meet, and the address that gloo takes. Local."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from hvd_saef.doctor.findings import Finding, failure, ok, warning
from hvd_saef.doctor.jobs import Job, has_gloo
from hvd_saef.doctor.machine import interfaces, is_bridge
from hvd_saef.doctor.torch_job import nccl, torchrun_serves
from hvd_saef.transport.hosts import VARIABLE, address_of, address_of_name

ON_ALL = "in the environment of all ranks, with the interface's name on each host"


def check_backends(job: Job) -> Finding:
    """Reports the backends of torch.distributed; without gloo nothing carries."""
    if not has_gloo():
        found = "this torch has no gloo, and Horovod with MPI is not installed: nothing carries the updates"
        return failure("torch.distributed", found, "install PyPI's torch, or run launch/bootstrap.sh")
    version = nccl()
    return ok("torch.distributed", "gloo" + (f", NCCL {version}" if version else "; no NCCL"))


def check_master(job: Job) -> Finding | None:
    """Reports where the ranks have met. Returns None if they have not."""
    if job.trouble is not None or "MASTER_ADDR" not in os.environ:
        return None
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    server = "torchrun" if torchrun_serves() else "rank 0"
    return ok("MASTER_ADDR", f"{where}, where {server} serves the store; all ranks have reached it")


def check_interfaces(job: Job) -> Finding:
    """Checks that other hosts can reach the address that gloo takes, and tells of other interfaces."""
    up, chosen, several = interfaces(), os.environ.get(VARIABLE), len(job.hosts) > 1
    listed = ", ".join(up) or "none but lo"
    if chosen:
        taken = chosen.split(",")[0]
        if taken not in ("lo", *up):
            fix = f"set {VARIABLE} to one of {listed}, or leave it unset"
            return failure("interfaces", f"{VARIABLE}={chosen}: {taken} is not there, or not up", fix)
        address, why = address_of(taken) or "an address that is not IPv4", f"as {VARIABLE} says"
    else:
        address = address_of_name()
        taken = next((name for name in ["lo", *up] if address_of(name) == address), "an unknown interface")
        why = f"the address of the name {socket.gethostname()}"
    found = f"{listed}: gloo takes {address} on {taken}, {why}"
    good = next((name for name in up if not is_bridge(name) and address_of(name)), "eth0")
    fix = f"export {VARIABLE}={good}, {ON_ALL}"
    if address.startswith("127.") and several:
        return failure("interfaces", f"{found}, which no other host can reach", fix)
    if is_bridge(taken) and several:
        return warning("interfaces", f"{found}, which may lead nowhere", fix)
    others = [name for name in up if name != taken and not is_bridge(name)]
    if others and several and not chosen:
        fix = f"export {VARIABLE}={taken} if that is the fastest, else another's name, {ON_ALL}"
        return warning("interfaces", f"{found}, though there is {', '.join(others)}", fix)
    return ok("interfaces", found)


def judge_connections(troubles: Sequence[str]) -> list[tuple[Finding, list[int]]]:
    """Returns a failure for each reason why gloo found no connection, with the ranks that gave it."""
    fix = f"export {VARIABLE}, {ON_ALL}; and see that no firewall is between hosts"
    ranks: dict[str, list[int]] = {}
    for rank, trouble in enumerate(troubles):
        if trouble:
            ranks.setdefault(trouble, []).append(rank)
    return [
        (failure("gloo", f"cannot connect the ranks: {trouble}", fix), who) for trouble, who in ranks.items()
    ]
