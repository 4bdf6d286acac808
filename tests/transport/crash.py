"""A job in which one rank fails between two steps."""

import torch

import hvd_saef
from benchmarks.job import job

job.begin()
parameter = torch.nn.Parameter(torch.zeros(5))
optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
for step in range(5):
    if (job.rank(), step) == (1, 3):
        raise OSError("this rank's disk is gone")
    parameter.grad = torch.ones(5)
    optimizer.step()
