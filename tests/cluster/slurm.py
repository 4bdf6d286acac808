"""A real SLURM of two nodes: namespace hosts, munged, slurmctld on the first, a slurmd on each.

Installs SLURM from the system's packages if they are not here. Nothing else of it remains: the daemons run
in the hosts' namespaces, with which they end, and keep their files in a folder that goes with them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks import hosts as namespaces
from benchmarks.hosts import Hosts
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT

PACKAGES = ("slurm-wlm", "munge", "libpmix-dev")
"""Debian's. Without what they recommend: Debian's own MPI would take the place of the environment's."""
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CORES = 2
"""A node has so many, whatever the machine has."""


def why_not() -> str | None:
    """Why there can be no SLURM here, or None; installs it where that is all that is missing."""
    reason = namespaces.why_not()
    if reason:
        return reason
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing and shutil.which("apt-get"):
        variables = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
        for step in (["apt-get", "update", "-q"], command):
            done = subprocess.run(step, env=variables, capture_output=True, text=True)
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            return f"apt-get install {' '.join(PACKAGES)} failed: {done.stderr.strip()[-300:]}"
    return f"no {missing[0]} on the PATH, and no apt-get to install SLURM by" if missing else None


CONFIGURATION = """
ClusterName=test
SlurmctldHost=h0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=3
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
NodeName=h[0-1] CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Two nodes, h0 and h1, of two cores each, while the `with` block lasts.

    Raises RuntimeError, with what the daemons said, if the nodes do not come up.
    """

    def __init__(self) -> None:
        self.hosts = Hosts(2)
        self.folder = Path()
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        self.hosts.__enter__()
        try:
            self.folder = self.hosts.folder / "slurm"
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons and whatever jobs are left, and remove all files."""
        self.hosts.close()
        for daemon in self._daemons:
            daemon.wait(LIMIT)

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)  # munged is particular about its socket's folder
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        prolog = self.folder / "prolog.sh"
        prolog.write_text(f'#!/bin/sh\necho "export TMPDIR={self.hosts.folder}/$SLURMD_NODENAME"\n')
        prolog.chmod(0o755)
        for host in self.hosts.names:
            (self.folder / f"spool.{host}").mkdir()
        for host in self.hosts.names:  # PMIx's folders must differ, since the nodes share /tmp
            (self.folder / host / "pmix").mkdir(parents=True)
            (self.folder / host / "slurm.conf").write_text(
                CONFIGURATION.format(folder=self.folder, cores=CORES)
            )
            # Nothing here uses cgroups, and this plugin starts where none are mounted, as in a namespace.
            (self.folder / host / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            (self.folder / host / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.folder}/{host}/pmix\n")

    def _start(self) -> None:
        folder = self.folder
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
        munged += [f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid"]
        munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
        self._daemon("h0", munged)
        self._daemon("h0", ["slurmctld", "-D", "-f", f"{folder}/h0/slurm.conf"])
        for host in self.hosts.names:
            self._daemon(host, ["slurmd", "-D", "-N", host, "-f", f"{folder}/{host}/slurm.conf"])
        deadline = time.monotonic() + LIMIT
        while (states := self.ask("sinfo", "-h", "-N", "-o", "%T").split()) != ["idle", "idle"]:
            if time.monotonic() > deadline:
                logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
                raise RuntimeError(f"the nodes are {states} after {LIMIT:.0f} s:\n{logs}")
            time.sleep(0.2)

    def _daemon(self, host: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{host}.{command[0]}.out", "wb") as output:
            inside = self._inside(host, command)
            self._daemons.append(
                subprocess.Popen(inside, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            )

    def _inside(self, host: str, command: Sequence[str]) -> list[str]:
        enter = ["ip", "netns", "exec", self.hosts.namespace(host), "unshare", "--uts"]
        return [*enter, "sh", "-c", f'hostname {host} && exec "$@"', "sh", *command]

    # -- what a user at the login node does: h0 is that too -------------------------------------------

    def ask(self, *command: str, check: bool = False) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(
            self._inside("h0", command), env=self._variables(), capture_output=True, text=True, timeout=LIMIT
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def _variables(self) -> dict[str, str]:
        return {
            **{name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": f"{self.folder}/h0/slurm.conf",
            "TMPDIR": f"{self.hosts.folder}/h0",
        }

    def submit(
        self, template: str, log: Path, *arguments: str, options: Sequence[str] = (), **settings: str
    ) -> int:
        """Hand one of launch/slurm's templates to sbatch, from the checkout, and return the job's number.

        Arguments are the template's, `options` sbatch's, settings environment variables.
        """
        set_them = [f"{name}={value}" for name, value in settings.items()]
        script = str(ROOT / "launch" / "slurm" / template)
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *options, script, *arguments]
        return int(self.ask("env", *set_them, *command, check=True))

    def job(self, number: int) -> Mapping[str, str]:
        """What scontrol says about a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", str(number), check=True)))

    def let_run(self, number: int) -> None:
        """Start a job that was queued again within seconds; SLURM by itself makes it wait for two minutes.

        Part of that wait is needed: a node takes no job that it was told to end in the same second.
        """
        deadline = time.monotonic() + LIMIT
        while self.job(number)["JobState"] != "PENDING" and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2.5)
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now", check=True)

    def wait(self, number: int, timeout: float = LIMIT) -> Mapping[str, str]:
        """The same, once the job has ended. Raises TimeoutError, after cancelling it."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            if time.monotonic() > deadline:
                self.ask("scancel", str(number))
                raise TimeoutError(f"job {number} is {job['JobState']} after {timeout} s")
            time.sleep(0.2)
        return job
