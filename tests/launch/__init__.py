"""Tests of the files in launch/."""
