"""Training that asks to stop in its third step, saves, exits with 75, and goes on when started again."""

import sys
from pathlib import Path

import torch

import hvd_saef
from benchmarks.job import job

STEPS = 6

job.begin()
folder = Path(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model)
first = 0
if job.gather((folder / "manifest.json").exists())[0]:
    first = hvd_saef.load_checkpoint(folder, model, optimizer)["step"]
    print(f"rank {job.rank()} goes on from step {first}", flush=True)
with hvd_saef.GracefulStop(optimizer) as stop:
    for step in range(first, STEPS):
        if (first, step, job.rank()) == (0, 2, 1):
            stop.request()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if stop.requested:
            hvd_saef.save_checkpoint(folder, model, optimizer, step=step + 1)
            stop.exit()
print(f"rank {job.rank()} is done", flush=True)
