"""How the ranks of a job are spread over hosts, and which workers worker="node" would make of them."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_saef.doctor.findings import Finding, ok, some, warning

EVEN = (
    "the same number on each host (mpirun --map-by ppr:2:node, srun --ntasks-per-node=2, "
    "torchrun --nproc-per-node 2)"
)
OTHERWISE = 'or worker="node" with weights="ranks", where a host counts by its ranks'


def judge_spread(groups: Sequence[Sequence[int]], hosts: Sequence[str]) -> Finding:
    """Returns the finding for `groups` of ranks that share memory, each a node; rank r is on hosts[r]."""
    sizes = sorted({len(group) for group in groups})
    apart = [name for name in dict.fromkeys(hosts) if sum(hosts[group[0]] == name for group in groups) > 1]
    if apart:
        ranks = [rank for rank, name in enumerate(hosts) if name == apart[0]]
        found = f'ranks {some(ranks)} on {apart[0]} do not share memory: worker="node" takes them for several'
        fix = "start a host's ranks in one container, or let containers share memory and PIDs (--ipc, --pid)"
        return warning("nodes", found, fix)
    if len(sizes) > 1:
        largest, smallest = (pick(groups, key=len) for pick in (max, min))
        counts = f"{sizes[-1]} ranks on {hosts[largest[0]]}, {sizes[0]} on {hosts[smallest[0]]}"
        found = (
            f'{len(groups)} hosts with different numbers of ranks, as {counts}: worker="node" refuses them'
        )
        return warning("nodes", found, f"{EVEN}, {OTHERWISE}")
    if sizes == [1]:
        return ok("nodes", f"{len(groups)} of one rank: each is a worker of its own")
    several = f"{len(groups)} of {sizes[0]} ranks that share memory"
    workers = f'K = {len(groups)} with worker="node", {len(hosts)} with worker="rank"'
    alone = " (one worker: nothing to compress)" if len(groups) == 1 else ""
    return ok("nodes", f"{several}: {workers}{alone}")
