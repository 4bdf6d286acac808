"""A job in which rank 1 fails while the others wait for it: `raise` an exception, or `die` by SIGKILL."""

import os
import signal
import sys

import torch

import hvd_saef
from benchmarks.job import job

job.begin()
parameter = torch.nn.Parameter(torch.zeros(5))
optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
for step in range(1000):
    if (job.rank(), step) == (1, 3):
        print("fails now", flush=True)
        if sys.argv[1] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("this rank's disk is gone")
    parameter.grad = torch.ones(5)
    optimizer.step()
