"""Things to measure with: the quick start."""
