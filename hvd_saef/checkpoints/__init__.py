"""Checkpoints, from which a run goes on later, with as many workers or with another number of them."""
