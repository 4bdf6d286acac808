"""The order of a step and of a round: which code does what and when, and what all workers agree on."""
