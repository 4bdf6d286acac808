"""`hvd-saef calibrate` measures the model's constants on the ranks of a job, and writes them to a file.

The file is what `hvd-saef plan --constants` takes. Everything here is collective over the ranks of the job.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hvd_saef import kernels
from hvd_saef.errors import SaefError, StalledExchangeError
from hvd_saef.planning.codec import considered, measure_codec
from hvd_saef.planning.constants import FEATURES, Constants
from hvd_saef.planning.network import measure_network
from hvd_saef.planning.plan import predict
from hvd_saef.planning.steps import METHOD, measure_steps
from hvd_saef.planning.timing import Clock, Progress
from hvd_saef.transport.communicator import Channel, Communicator
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.libraries import horovod, missing, mpi4py
from hvd_saef.transport.together import together
from hvd_saef.transport.watch import Patience

PATIENCE = 120.0
"""The seconds to wait for a rank that does not come, unless HVD_SAEF_STALL_ABORT_S says otherwise."""
STAGES = 12
"""What is measured, at most, for the progress bar; the compressors' stages come on top."""
SHARES = 20
"""Each call's turns take this part of the seconds asked for. There are some 25 calls; most take less."""
OFF = 0.3
"""The share by which the model may be off for the step that was timed, before the report says so."""
ALONE = (
    "1 rank: there is no network to measure. Start it as the job is started: srun --mpi=pmix -N2 -n8 "
    "hvd-saef calibrate, mpirun -np 8 hvd-saef calibrate, or torchrun --nproc-per-node 4 --no-python "
    "hvd-saef calibrate"
)


def report(known: Constants) -> str:
    """Returns the constants that were measured as lines for readers, and a step's time beside the model's."""
    made = known.made
    where = f"{made['ranks']} ranks, {_hosts(made['hosts'])}"
    lines = [f"Measured on {where}: {known.device}; {known.network}."]
    for name, rate in (("a node to others", known.bandwidth), ("a rank inside its node", known.inside)):
        lines += [f"  {name + ' sends':<32}{rate / 1e9:>10.3f} Gbit/s"] if rate else []
    for name in FEATURES:
        value, unit = _readable(name, known.seconds[name])
        mark = "  ESTIMATED: these ranks cannot tell" if name in known.estimated else ""
        lines.append(f"  {name:<32}{value:>10.3f} {unit}{mark}")
    lines.append(f"  {'hidden by overlap':<32}{100 * known.hidden:>10.0f} %")
    check = made["check"]
    lines.append(
        f"Check: a step of {check['parameters'] / 1e6:.1f} M parameters took {check['measured']:.4f} s "
        f"({check['compute']:.4f} s without an exchange); the model says {check['model']:.4f} s."
    )
    if abs(check["model"] / check["measured"] - 1) > OFF:
        lines.append("That is far off: did anything else run on these hosts? Then measure again.")
    if known.bandwidth is None:
        lines.append("All ranks are on one host: pass --bandwidth of the network between hosts to plan.")
    return "\n".join(lines)


def _hosts(hosts: Sequence[object]) -> str:
    return f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}"


def _readable(name: str, seconds: float) -> tuple[float, str]:
    """Returns a constant in a unit in which it is neither tiny nor huge."""
    if name == "wire":
        return seconds, "times the bytes over the bandwidth"
    if name in ("message", "collective", "latency", "mean", "fixed"):
        return seconds * 1e6, "µs"
    return seconds * 1e9, "ns a byte" if name == "byte" else "ns an element"


def calibrate(
    communicator: Communicator,
    device: torch.device,
    seconds: float,
    begin: Callable[[str], None],
    carrier: str,
) -> Constants:
    """Measures for about so many `seconds`, and returns the same on all ranks. Collective.

    `begin` is told each stage as it begins, and `carrier` names what carries. Raises ValueError on one rank
    alone, and where ranks compute on different kinds of devices.
    """
    if communicator.size < 2:
        raise ValueError(ALONE)
    kinds = communicator.allgather_object(device.type)
    if len(set(kinds)) > 1:
        who = "; ".join(
            f"{kind} on ranks {[r for r, k in enumerate(kinds) if k == kind]}"
            for kind in dict.fromkeys(kinds)
        )
        raise ValueError(
            f"ranks compute on different devices: {who}. The slowest sets the pace: leave it out."
        )

    def stage(words: str) -> None:
        for channel in (Channel.WORDS, Channel.UP):  # messages about missing ranks say it
            communicator.doing[channel] = f"calibrating {words}"
        begin(words)

    hosts = communicator.find_hosts()
    clock = Clock(communicator, device, seconds / SHARES)
    network = measure_network(clock, hosts, stage)
    measured = network.seconds | measure_codec(clock, stage) | {"fixed": 0.0}
    known = {name: measured[name] for name in FEATURES}
    made = _made(communicator, hosts, device, carrier)
    constants = Constants(
        known,
        source=f"measured by hvd-saef calibrate, {made['ranks']} ranks, {_hosts(hosts)}, {made['date']}",
        device=f"{made['device']}, kernels: {made['kernels']}",
        network=carrier + (" inside one host" if len(hosts) == 1 else " between hosts"),
        estimated=network.estimated,
        bandwidth=network.bandwidth,
        inside=network.inside,
        made=made,
    )
    a_node = len(hosts[0]) if len({len(ranks) for ranks in hosts}) == 1 else 1
    steps = measure_steps(clock, constants, a_node, stage)
    constants = replace(constants, seconds=known | {"fixed": steps.fixed}, hidden=steps.hidden)
    check = {
        "parameters": steps.job.parameters,
        "compute": steps.job.compute,
        "measured": steps.taken,
        "model": predict(METHOD, steps.job, constants),
    }
    return replace(constants, made=made | {"check": check})


def _made(
    communicator: Communicator, hosts: Sequence[Sequence[int]], device: torch.device, carrier: str
) -> dict[str, Any]:
    """Returns on what and when the constants are measured, the same on all ranks. Collective."""
    names = communicator.allgather_object(socket.gethostname())
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    packages = ("hvd_saef", "torch", "numpy", "horovod", "mpi4py", "triton")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    mine = {
        "date": now,
        "ranks": communicator.size,
        "hosts": [{"name": names[ranks[0]], "ranks": len(ranks)} for ranks in hosts],
        "device": gpu or f"{_processor()}, {torch.get_num_threads()} threads a rank",
        "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores a host",
        "kernels": kernels.version_for(device, torch.float32).describe(),
        "carrier": carrier,
        "versions": {"Python": platform.python_version()}
        | {name: installed[name] for name in packages if name in installed}
        | {"torch": torch.__version__},
    }
    return dict(communicator.allgather_object(mine)[0])


def _processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


# -- the command --------------------------------------------------------------------------------------


def join() -> tuple[Communicator, torch.device, str]:
    """Joins the job that this process was started in; returns its ranks, this rank's device, who carries.

    RANK in the environment, as torchrun sets it, means torch.distributed; otherwise it is Horovod with MPI.
    Raises RuntimeError or ValueError if the ranks cannot meet.
    """
    gpus = torch.cuda.is_available()
    if "RANK" in os.environ:
        local = int(os.environ.get("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo"
        abort = Patience.of_environment().abort
        patience = timedelta(seconds=abort if abort < math.inf else PATIENCE)
        dist.init_process_group(backend, timeout=patience)
        carrier = f"torch.distributed with {backend}"
    elif missing():
        raise RuntimeError(
            f"{ALONE}. For mpirun and srun, Horovod and mpi4py are needed: {'; '.join(missing())}"
        )
    else:
        hvd, library = horovod(), mpi4py().Get_library_version()
        hvd.init()
        local = hvd.local_rank()
        means = "Horovod with NCCL" if hvd.nccl_built() else "Horovod"
        carrier = f"{library.splitlines()[0].split(',')[0].strip()}, means by {means}"
    device = torch.device("cuda", local % torch.cuda.device_count()) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    return find_communicator()[0], device, carrier


def run(path: Path, seconds: float) -> int:
    """Measures on the ranks of this job and writes `path` on rank 0; returns the exit code, 1 if it failed.

    All ranks fail together: each says why on stderr. A rank that is lost ends the job, with its name.
    """
    os.environ.setdefault("HVD_SAEF_STALL_ABORT_S", f"{PATIENCE:g}")
    try:
        communicator, device, carrier = join()
    except (RuntimeError, ValueError) as error:
        return _fail(os.environ.get("RANK", "0"), error)
    first = communicator.rank == 0
    progress = Progress(STAGES + len(considered()), speaks=first)
    try:
        together(communicator, lambda: _check(path) if first else None)
        found = calibrate(communicator, device, seconds, progress.begin, carrier)
        progress.end(done=True)
        together(communicator, lambda: _write(found, path) if first else None)
    except StalledExchangeError:
        raise  # only this rank may know: its end ends the job
    except (SaefError, OSError, ValueError) as error:
        progress.end(done=False)
        return _fail(str(communicator.rank), error)
    if first:
        print(
            f"{report(found)}\nWritten: {path}. Ask with it: hvd-saef plan --constants {path} ...",
            flush=True,
        )
    communicator.finish()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _fail(rank: str, error: Exception) -> int:
    print(f"hvd-saef calibrate, rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
    return 1


def _check(path: Path) -> None:
    """Raises OSError if the file could not be written, before minutes have been spent."""
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder: the name of a file is allowed")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--out {path} cannot be written: a file in an existing folder is allowed")


def _write(constants: Constants, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    constants.save(unfinished)
    unfinished.replace(path)
