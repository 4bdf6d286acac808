"""Tests of hvd_saef.planning."""
