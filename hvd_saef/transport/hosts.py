"""Which host a rank is on, where no MPI says it. Local."""

from __future__ import annotations

import socket
from collections.abc import Hashable, Sequence
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> tuple[str, str]:
    """Returns what tells this host from others: its name, and the number that Linux draws at each start.

    The name alone would not do, since many hosts are called "localhost". Containers of one host have names
    of their own, and count as hosts.
    """
    try:
        return socket.gethostname(), BOOT.read_text().strip()
    except OSError:
        return socket.gethostname(), ""


def group_by_host(hosts: Sequence[Hashable]) -> list[list[int]]:
    """Returns the ranks of each host, in the order of their first ranks; rank r is on hosts[r]."""
    return [[rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
