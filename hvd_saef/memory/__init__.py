"""Algorithm 1 and what it works on: x, e and s of each bucket, and how parameters are laid out in it."""
