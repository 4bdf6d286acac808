"""Tests of hvd_saef.checkpoints."""
