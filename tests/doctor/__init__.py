"""Tests of hvd_saef.doctor, under mpirun."""
