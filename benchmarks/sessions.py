"""Whether Linux shares out the cores between sessions before it does so between processes.

Ranks that wait offer their core again and again (sched_yield), which then reaches their own session alone. On
Linux 6.18, ranks of another session that are ready to run get no core for a minute at a time. Hosts that are
namespaces of one machine are one session each, so this is off, on the whole machine, while there are any.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

SETTING = Path("/proc/sys/kernel/sched_autogroup_enabled")


def share_no_cores(owner: Path) -> None:
    """Switch it off, if it is on and may be written; the folder `owner` remembers that."""
    with contextlib.suppress(OSError):
        if SETTING.read_text().strip() == "1":
            (owner / SETTING.name).touch()
            SETTING.write_text("0")


def share_cores_again(owner: Path) -> None:
    """Switch it on, if it was the owner of this folder who switched it off."""
    if (owner / SETTING.name).exists():
        with contextlib.suppress(OSError):
            SETTING.write_text("1")
