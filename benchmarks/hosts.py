"""Several hosts on one machine: network namespaces with links of a set rate between them.

    with Hosts(4, "1gbit") as hosts:
        hosts.run(hosts.mpirun(["python", "train.py"]), timeout=600)

Host k is a namespace with the address 10.77.0.(k+1) on its eth0, a host name hk, by which the others find it,
and a TMPDIR of its own.
Each eth0 ends in a bridge in one more namespace, so nothing of this is seen in the machine's own network.
Both ends of each link hold the rate (tc-tbf). Needs root, iproute2 and util-linux; `why_not()` says what is
missing.

    python benchmarks/hosts.py 2 1gbit COMMAND...       # COMMAND on 2 hosts, started by mpirun
    python benchmarks/hosts.py --clean                  # removes what killed runs left behind
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import sessions

PREFIX = "saef"
"""Namespaces are named saef<pid of the owner>-<host>: what a dead owner left can be told and removed."""
NETWORK = "10.77.0"
INTERFACE = "eth0"
LATENCY = "50ms"
"""The longest that tbf lets a packet wait before it drops it."""
ETC = Path("/etc/netns")
"""Files in a folder of the namespace's name stand for those in /etc, inside."""
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MPIRUN = str(Path(__file__).resolve().parents[1] / "launch" / "mpirun.sh")
"""mpirun with what the MPI at hand needs: everything here and in the tests starts its ranks by it."""
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
}
"""What launchers need to start ranks on one machine, with the MPI and the packages of this Python."""


class HostsError(RuntimeError):
    """Namespaces cannot be had here, and why."""


def why_not() -> str | None:
    """Why hosts cannot be made here, or None if they can be."""
    if os.geteuid() != 0:
        return "network namespaces need root: run this as root (sudo, or docker run --privileged)."
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"no {tool} on the PATH: install {package}."
    name = f"{PREFIX}{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"network namespaces cannot be made here: {made.stderr.strip()}" if made.returncode else None


def bits_per_second(rate: str) -> float:
    """Of a rate as tc writes it, "1gbit" say; infinity for "unlimited"."""
    if rate == "unlimited":
        return float("inf")
    match = re.fullmatch(r"([0-9.]+)(kbit|mbit|gbit)", rate)
    if not match:
        raise ValueError(f"rate={rate!r}: a number with kbit, mbit or gbit, or 'unlimited', is allowed.")
    return float(match[1]) * UNITS[match[2]]


def clean() -> list[str]:
    """Remove namespaces whose owners are dead, and their folders; returns the namespaces' names."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split("\n")
    removed = []
    for name in (line.split(" ")[0] for line in names):
        match = re.fullmatch(rf"{PREFIX}([0-9]+)-\w+", name)
        if match and not Path("/proc", match[1]).exists():
            _remove(name)
            removed.append(name)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}[0-9]*-*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX).split("-")[0]).exists():
            sessions.share_cores_again(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return removed


def _end(name: str) -> None:
    """End the processes in a namespace."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 3
        while (pids := _processes(name)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, end)
            time.sleep(0.1)


def _remove(name: str) -> None:
    """End the processes in a namespace and delete it, with the links that end there."""
    _end(name)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    shutil.rmtree(ETC / name, ignore_errors=True)


def _processes(name: str) -> list[int]:
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    return [int(pid) for pid in pids.split()]


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Hosts:
    """`number` hosts whose links carry `rate` each way, while the `with` block lasts.

    Raises:
        HostsError: they cannot be made here, and why.
        ValueError: a rate that is none.

    """

    def __init__(self, number: int, rate: str = "unlimited") -> None:
        self.number, self.rate = number, rate
        self.bits_per_second = bits_per_second(rate)
        self.owner = f"{PREFIX}{os.getpid()}"
        self.names = [f"h{k}" for k in range(number)]
        self.addresses = [f"{NETWORK}.{k + 1}" for k in range(number)]
        self.folder = Path()
        """A folder for what the hosts need: TMPDIRs, the script that enters them."""

    def namespace(self, host: str) -> str:
        """The network namespace of a host, for `ip netns`."""
        return f"{self.owner}-{host}"

    def __enter__(self) -> Hosts:
        reason = why_not()
        if reason:
            raise HostsError(reason)
        clean()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.owner}-"))
        try:
            sessions.share_no_cores(self.folder)
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def end(self, host: str) -> None:
        """End everything that runs on a host."""
        _end(self.namespace(host))

    def close(self) -> None:
        """End everything that runs in the hosts and remove them."""
        for host in [*self.names, "switch"]:
            _remove(self.namespace(host))
        sessions.share_cores_again(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _build(self) -> None:
        switch = self.namespace("switch")
        _do("ip", "netns", "add", switch)
        _do("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, address in zip(self.names, self.addresses, strict=True):
            inside, port = self.namespace(host), f"to-{host}"
            _do("ip", "netns", "add", inside)
            link = ("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", inside)
            _do("ip", "-n", switch, *link)
            _do("ip", "-n", inside, "address", "add", f"{address}/24", "dev", INTERFACE)
            _do("ip", "-n", switch, "link", "set", port, "master", "bridge")
            for namespace, name in ((inside, "lo"), (inside, INTERFACE), (switch, port)):
                _do("ip", "-n", namespace, "link", "set", name, "up")
            self._limit(inside, INTERFACE)
            self._limit(switch, port)
            (ETC / inside).mkdir(parents=True)
            (ETC / inside / "hosts").write_text(self._known_hosts())
            (self.folder / host).mkdir()
        self.agent.parent.mkdir()
        self.agent.write_text(self._agent_script())
        self.agent.chmod(0o755)

    def _known_hosts(self) -> str:
        pairs = zip(self.addresses, self.names, strict=True)
        return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in pairs)

    def _limit(self, namespace: str, interface: str) -> None:
        if self.rate == "unlimited":
            return
        burst = max(256 * 1024, int(self.bits_per_second / 8 * 0.001))
        shape = ("rate", self.rate, "burst", str(burst), "latency", LATENCY)
        _do("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *shape)

    @property
    def agent(self) -> Path:
        """A script called as ssh is: options, an address, options, and a command to run there."""
        return self.folder / "bin" / "ssh"

    def _agent_script(self) -> str:
        cases = "\n".join(
            f"  {host}|{address}) host={host} ;;"
            for host, address in zip(self.names, self.addresses, strict=True)
        )
        return f"""#!/bin/sh
address=
while :; do
  case $1 in
    -[oipl]) shift 2 ;;
    -*) shift ;;
    *) if [ -n "$address" ]; then break; fi; address=${{1#*@}}; shift ;;
  esac
done
case $address in
{cases}
  *) echo "no such host: $address" >&2; exit 255 ;;
esac
export TMPDIR="{self.folder}/$host"
exec ip netns exec "{self.owner}-$host" unshare --uts sh -c "hostname $host && $*"
"""

    def mpirun(self, command: Sequence[str], ranks: int = 1) -> list[str]:
        """How mpirun starts `command` with `ranks` ranks on each host; to be given to :meth:`run`.

        It is the mpirun beside this Python or on the PATH. Raises HostsError if there is none.
        """
        path = ENVIRONMENT["PATH"]
        if shutil.which("mpirun", path=path) is None:
            raise HostsError("no mpirun beside this Python or on the PATH: load its module.")
        slots = ",".join(f"{address}:{ranks}" for address in self.addresses)
        settings = [f"PATH={self.agent.parent}:{path}", f"HOSTS={slots}", f"INTERFACE={INTERFACE}"]
        return ["env", *settings, MPIRUN, "-np", str(ranks * self.number), *command]

    def torch_ranks(self, command: Sequence[str], host: str, ranks: int = 1) -> list[str]:
        """How one host starts its `ranks` ranks of a torch.distributed job of all hosts; for :meth:`run`."""
        first = ranks * self.names.index(host)
        job = f"MASTER_ADDR={self.addresses[0]} MASTER_PORT=29500 WORLD_SIZE={ranks * self.number}"
        script = f"""
for local in {" ".join(map(str, range(ranks)))}; do
  env {job} RANK=$(({first} + local)) LOCAL_RANK=$local "$@" & started="$started $!"
done
code=0
for rank in $started; do wait $rank || code=$?; done
exit $code
"""
        return ["sh", "-c", script, "sh", *command]

    def run(
        self,
        command: Sequence[str],
        timeout: float,
        host: str = "h0",
        output: TextIO | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Run `command` on a host (mpirun on the first) and return its exit code.

        Raises subprocess.TimeoutExpired; what it started on the hosts ends with them, at the latest.
        """
        variables = {"GLOO_SOCKET_IFNAME": INTERFACE, "TMPDIR": str(self.folder / host)}
        inside = ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts"]
        inside += ["sh", "-c", f'hostname {host} && exec "$@"', "sh", *command]
        process = subprocess.Popen(
            inside,
            env={**os.environ, **ENVIRONMENT, **variables, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            stdin=subprocess.DEVNULL,
        )
        with process:
            try:
                return process.wait(timeout)
            except BaseException:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                raise


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as Ctrl-C does: with its `with` blocks left in order."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main() -> None:
    """The command line."""
    if sys.argv[1:] == ["--clean"]:
        print("removed:", *(clean() or ["nothing"]))
        return
    if len(sys.argv) < 4 or not sys.argv[1].isdigit():
        sys.exit(__doc__)
    try:
        with stopping_cleanly(), Hosts(int(sys.argv[1]), sys.argv[2]) as hosts:
            code = hosts.run(hosts.mpirun(sys.argv[3:]), timeout=24 * 3600)
    except (HostsError, ValueError) as error:
        sys.exit(f"hosts.py: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
