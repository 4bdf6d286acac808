"""`hvd-saef doctor` reports what is installed, whether it fits together, and how to fix what does not.

Each check, in `software`, `mpi`, `gloo` and `machine`, looks at one thing: it is ok, or the check returns a
warning or a failure with its fix. On several ranks, findings that all ranks have become one line, versions
are compared, and every link between two hosts is timed, over MPI or over torch.distributed (`jobs`).
Collective over the ranks of a job.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from hvd_saef.doctor import gloo, machine, mpi, software
from hvd_saef.doctor.findings import Finding, failure, ok, some, warning
from hvd_saef.doctor.jobs import MPI, TORCH, Job, find_job
from hvd_saef.doctor.links import Link, time_links
from hvd_saef.doctor.nodes import judge_spread
from hvd_saef.errors import StalledExchangeError

OF_CARRIER: Mapping[str, Sequence[Callable[[Job], Any]]] = {
    MPI: (
        software.check_horovod,
        mpi.check_mpi,
        mpi.check_same_library,
        mpi.check_launcher,
        machine.check_ranks,
        mpi.check_srun,
        mpi.check_cuda_aware,
        machine.check_bridges,
    ),
    TORCH: (
        software.check_not_needed,
        gloo.check_backends,
        gloo.check_master,
        machine.check_ranks,
        gloo.check_interfaces,
    ),
}
"""The checks of what carries the updates."""
SLOW = 0.5
"""A link with less than this share of the median rate gets a warning."""


@dataclass(frozen=True)
class Report:
    """The findings of the whole job."""

    ranks: int
    findings: Sequence[tuple[Finding, Sequence[int]]]
    """The findings, each with the ranks that found it."""
    links: Sequence[Link]

    @property
    def verdict(self) -> str:
        """The worst status of all findings: "failure", "warning" or "ok"."""
        found = {finding.status for finding, _ in self.findings}
        return next(status for status in ("failure", "warning", "ok") if status in found)

    def as_json(self) -> str:
        """Returns the report for programs: findings with their ranks; links in seconds and bits a second."""
        findings = [asdict(finding) | {"ranks": list(ranks)} for finding, ranks in self.findings]
        links = [asdict(link) for link in self.links]
        everything = {"verdict": self.verdict, "ranks": self.ranks, "findings": findings, "links": links}
        return json.dumps(everything, indent=1)

    def as_text(self) -> str:
        """Returns the report for readers: one line for each finding, with its fix in the line below."""
        lines = []
        for check, likewise in self._by_check():
            finding, ranks = likewise[0]
            if len(likewise) > 1 and all(other.status == "ok" for other, _ in likewise):
                more = f"and {len(likewise) - 1} more like it"
                lines.append(f"{'ok':<8}{check}: {finding.found} (rank {some(ranks)}), {more}")
                continue
            lines += self._lines(likewise)
        lines.append(f"verdict: {self.verdict}")
        return "\n".join(lines)

    def _by_check(self) -> list[tuple[str, list[tuple[Finding, Sequence[int]]]]]:
        checks = dict.fromkeys(finding.check for finding, _ in self.findings)
        return [(check, [item for item in self.findings if item[0].check == check]) for check in checks]

    def _lines(self, findings: Sequence[tuple[Finding, Sequence[int]]]) -> list[str]:
        lines = []
        for finding, ranks in findings:
            who = "" if len(ranks) == self.ranks else f" (rank {some(ranks)})"
            lines.append(f"{finding.status:<8}{finding.check}: {finding.found}{who}")
            if finding.fix:
                lines.append(f"{'':<8}  fix: {finding.fix}")
        return lines


def examine(job: Job) -> Report | None:
    """Inspects all ranks of a job. Collective.

    Returns the report on rank 0, and None on the other ranks. Raises StalledExchangeError if ranks that were
    there are gone, over torch.distributed.
    """
    everyone = job.gather((inspect(job), {**software.versions(), **job.versions()}))
    troubles = job.allgather(job.connect() if job.size > 1 else "")
    connected = not any(troubles)
    hosts, links = job.allgather(job.host), time_links(job) if connected else []
    if everyone is None:
        return None
    findings = merge([theirs for theirs, _ in everyone])
    if job.size > 1:
        everywhere = list(range(job.size))
        findings += [(finding, everywhere) for finding in compare([theirs for _, theirs in everyone])]
        findings += [(judge_spread(job.hosts, hosts), everywhere)]
        findings += [(judge(links), everywhere)] if connected else gloo.judge_connections(troubles)
    return Report(job.size, findings, links)


def run(as_json: bool = False) -> int:
    """Prints the report on rank 0; returns the exit code on all ranks, 1 for a failure. Collective."""
    job = find_job()
    try:
        report = examine(job)
        code: int = job.share(int(report is not None and report.verdict == "failure"))
        if report is not None and job.speaks:
            print(report.as_json() if as_json else report.as_text(), flush=True)
        elif job.trouble is not None:  # rank 0 cannot know, or has other words for it
            tell(f"{job.trouble.found}. {job.trouble.fix}")
        job.end()
    except StalledExchangeError as error:
        tell(str(error))
        return 1
    return code


def tell(trouble: str) -> None:
    """Prints what a rank has to say that cannot tell rank 0."""
    print(f"hvd-saef doctor, rank {os.environ['RANK']} on {socket.gethostname()}: {trouble}", file=sys.stderr)


def checks(job: Job) -> list[Callable[[], Any]]:
    """Returns the checks that are due in such a job."""
    of_job = [*OF_CARRIER[job.carrier], software.check_gpu, machine.check_cores]
    return [
        *(software.check_python, software.check_torch, software.check_kernels),
        *(partial(check, job) for check in of_job),
        machine.check_name,
    ]


def inspect(job: Job) -> list[Finding]:
    """Returns what all checks found on this rank. Local."""
    findings: list[Finding] = []
    for check in checks(job):
        try:
            found = check()
            several = [found] if isinstance(found, Finding) else list(found or ())
        except Exception as error:
            whole = check.func if isinstance(check, partial) else check
            name = whole.__name__.removeprefix("check_").replace("_", " ")
            text = f"could not be checked: {type(error).__name__}: {error}"
            several = [warning(name, text, "report this, please")]
        findings += several
    return findings


def merge(everyone: Sequence[Sequence[Finding]]) -> list[tuple[Finding, list[int]]]:
    """Returns each finding once, with the ranks that have it, in the order of the checks."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(everyone):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    order = list(dict.fromkeys(finding.check for findings in everyone for finding in findings))
    return sorted(ranks.items(), key=lambda item: order.index(item[0].check))


def compare(everyone: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Returns a failure for each version that differs between ranks, or one finding that is ok."""
    findings = []
    for what in everyone[0]:
        who: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            who.setdefault(theirs[what], []).append(rank)
        if len(who) > 1:
            found = ", ".join(f"{version} on rank {some(ranks)}" for version, ranks in who.items())
            fix = "use one environment on all hosts: the same VENV, on a file system that all see"
            findings.append(failure("versions", f"{what} differs: {found}", fix))
    return findings or [ok("versions", f"the same on all {len(everyone)} ranks")]


def judge(links: Sequence[Link]) -> Finding:
    """Returns a finding that names the slowest link between two hosts."""
    if not links:
        return ok("links", "all ranks are on one host")
    slowest = min(links, key=lambda link: link.bits_per_second)
    median = statistics.median(link.bits_per_second for link in links)
    found = f"{len(links)} pairs of hosts timed; the slowest is {slowest}"
    if slowest.bits_per_second < SLOW * median:
        usual = Link(slowest.hosts, 0.0, median)
        rate = str(usual).split(" ", 1)[1].split(",")[0]
        fix = "look at this link's cable, port and interface, or leave the host out; all wait for the slowest"
        return warning("links", f"{found}, where the median is {rate}", fix)
    return ok("links", found)
