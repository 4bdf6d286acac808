"""Packaging lives in pyproject.toml; this file is where the C++ extension will be named."""

from setuptools import setup

setup()
