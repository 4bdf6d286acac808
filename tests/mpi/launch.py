"""How tests start MPI jobs on one machine: more ranks than cores, as root or not."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import hosts

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = os.environ | hosts.ENVIRONMENT
