"""The quick start, with x compared between all ranks after every round: it fails where they differ."""

import functools

import hvd_saef
from benchmarks import quickstart

hvd_saef.DistributedOptimizer = functools.partial(hvd_saef.DistributedOptimizer, check_consensus_every=1)
quickstart.main()
