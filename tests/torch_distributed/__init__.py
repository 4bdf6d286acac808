"""Tests of the transport over torch.distributed, in real jobs of several processes."""
