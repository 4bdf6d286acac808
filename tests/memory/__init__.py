"""Tests of hvd_saef.memory."""
