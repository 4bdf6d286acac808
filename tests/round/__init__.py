"""Tests of hvd_saef.round."""
