"""Tests of hvd_saef.kernels."""
