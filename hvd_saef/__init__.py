"""Compressed training for PyTorch on Horovod and MPI, with step-ahead error feedback (SAEF).

>>> import horovod.torch as hvd
>>> import hvd_saef
>>> optimizer = hvd_saef.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
"""

from hvd_saef import diagnostics
from hvd_saef.bare import bare_model
from hvd_saef.batchnorm import recalibrate_batchnorm
from hvd_saef.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from hvd_saef.compression import Compression, Compressor
from hvd_saef.errors import (
    CheckpointError,
    ConfigurationMismatchError,
    ConsensusError,
    NonFiniteUpdateError,
    SaefError,
    StalledExchangeError,
    WorkerError,
)
from hvd_saef.older_torch import load_numpy
from hvd_saef.optimizer import DistributedOptimizer
from hvd_saef.preemption import GracefulStop
from hvd_saef.simulation import run_workers
from hvd_saef.transport.process_sets import process_sets
from hvd_saef.uneven_data import common_steps

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Compression",
    "Compressor",
    "ConfigurationMismatchError",
    "ConsensusError",
    "DistributedOptimizer",
    "GracefulStop",
    "NonFiniteUpdateError",
    "SaefError",
    "StalledExchangeError",
    "WorkerError",
    "bare_model",
    "common_steps",
    "diagnostics",
    "load_checkpoint",
    "process_sets",
    "recalibrate_batchnorm",
    "run_workers",
    "save_checkpoint",
]

load_numpy()
