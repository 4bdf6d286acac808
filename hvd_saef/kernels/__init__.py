"""Loops over flat memory: no algorithm, no workers, no MPI."""

from hvd_saef.kernels.twins import l1_norms, pack_signs, top_k, unpack_signs

__all__ = ["l1_norms", "pack_signs", "top_k", "unpack_signs"]
