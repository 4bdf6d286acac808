"""Tests of hvd_saef.transport."""
