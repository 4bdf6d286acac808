"""A job that removes its process sets from Horovod and adds them again, and trains with them each time."""

import horovod.torch as hvd
import torch

import hvd_saef


def train(process_set: hvd.ProcessSet) -> None:
    """A few steps whose error averaging goes through Horovod's own process set."""
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = hvd_saef.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), process_set=process_set, averaging_period=2
    )
    for _ in range(4):
        parameter.grad = torch.arange(5.0) + hvd.rank()
        optimizer.step()
    assert optimizer.stats()["rounds"] == 4


hvd.init()
for _ in range(3):
    # Adding and removing are collective, one at a time; between them all ranks are out of the sets.
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    train(sets[hvd.rank()])
    hvd.barrier()
    for process_set in sets:
        assert hvd.remove_process_set(process_set)
    hvd.barrier()
