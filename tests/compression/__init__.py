"""Tests of hvd_saef.compression."""
