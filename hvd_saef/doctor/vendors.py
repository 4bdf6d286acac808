"""The MPIs that are known: how they name themselves, and what their users set. Local; asking starts MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvd_saef.transport.libraries import mpi4py


@dataclass(frozen=True)
class Vendor:
    """One MPI. Cray's is untried."""

    name: str
    library: str
    """A pattern for what the library says of itself, with the version as its group."""
    launcher: str
    """The same for `mpirun --version`; "" if it has no mpirun."""
    srun: str
    """The `--mpi` by which SLURM's srun connects its ranks."""
    cuda: str
    """How to get a CUDA-aware one."""
    interfaces: Sequence[str]
    """The environment variables that choose network interfaces for TCP."""
    avoid: str
    """How to keep TCP off the interfaces {bad}, which leaves {good}."""


OPEN_MPI = Vendor(
    "Open MPI",
    library=r"Open MPI v(\d[\d.]*)",
    launcher=r"\(Open MPI\) (\d[\d.]*)",
    srun="pmix",
    cuda="use an MPI built --with-cuda",
    interfaces=("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"),
    avoid="OMPI_MCA_btl_tcp_if_exclude=lo,{bad}",
)
MPICH = Vendor(
    "MPICH",
    library=r"MPICH Version:\s+(\d[\d.]*)",
    launcher=r"HYDRA build details:\s+Version:\s+(\d[\d.]*)",
    srun="pmi2",
    cuda="use an MPI built --with-cuda",
    interfaces=("FI_TCP_IFACE", "UCX_NET_DEVICES"),
    avoid="FI_TCP_IFACE={good} UCX_NET_DEVICES={good}",
)
INTEL_MPI = replace(
    MPICH,
    name="Intel MPI",
    library=r"Intel\(R\) MPI Library (\d[\d.]*)",
    launcher=r"Intel\(R\) MPI Library.* Version (\d[\d.]*)",
    cuda="set I_MPI_OFFLOAD=1",
)
CRAY_MPICH = replace(
    MPICH,
    name="Cray MPICH",
    library=r"CRAY MPICH version (\d[\d.]*)",
    launcher="",
    srun="cray_shasta",
    cuda="set MPICH_GPU_SUPPORT_ENABLED=1",
)
VENDORS = (OPEN_MPI, MPICH, INTEL_MPI, CRAY_MPICH)


@dataclass(frozen=True)
class Product:
    """An MPI and its version, "5.0.11" say."""

    vendor: Vendor
    version: str

    def __str__(self) -> str:
        return f"{self.vendor.name} {self.version}"

    def fits(self, other: Product) -> bool:
        """Returns True if both are the same version of the same MPI; "4.1" is "4.1.0"."""
        shorter, longer = sorted((self.version.split("."), other.version.split(".")), key=len)
        rest = longer[len(shorter) :]
        return self.vendor is other.vendor and shorter == longer[: len(shorter)] and set(rest) <= {"0"}


def library() -> Product | None:
    """Returns the MPI library that this process runs with; None if there is none, or it is not known.

    The library itself is asked, since mpi4py may be built for another one with the same binary interface.
    """
    return find(mpi4py().Get_library_version(), "library") if mpi4py() else None


def find(said: str, part: str) -> Product | None:
    """Returns whose "library" or "launcher" says this of itself, or None if it is not known."""
    for vendor in VENDORS:
        pattern = getattr(vendor, part)
        match = re.search(pattern, said) if pattern else None
        if match:
            return Product(vendor, match[1].rstrip("."))
    return None


def vendor() -> Vendor:
    """Returns the vendor of the MPI library; Open MPI if it is not known."""
    known = library()
    return known.vendor if known else OPEN_MPI


def name() -> str:
    """Returns the MPI library and its version for the report; "none" if there is no MPI."""
    if mpi4py() is None:
        return "none"
    return str(library() or mpi4py().Get_library_version().splitlines()[0].split(",")[0].strip())
