"""The order of things in a step and in a round: who does what when, and what all workers agree on."""
