"""Which host a rank is on, and the address that gloo takes there, where no MPI says it. Local."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Hashable, Sequence
from pathlib import Path

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Names the network interface for gloo."""
ADDRESS_OF_INTERFACE = 0x8915
"""Linux's SIOCGIFADDR."""
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


def gloo_address() -> str:
    """Returns the address at which gloo lets other ranks reach this one."""
    return address_of(os.environ.get(VARIABLE, "").split(",")[0]) or address_of_name()


def address_of(interface: str) -> str:
    """Returns the IPv4 address of a network interface, or ""."""
    name = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), ADDRESS_OF_INTERFACE, name)[20:24])
        except OSError:
            return ""


def address_of_name() -> str:
    """Returns the address that gloo takes by itself: the first of the host's name that is this host's."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as tried:
            try:
                tried.bind(address)
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"
