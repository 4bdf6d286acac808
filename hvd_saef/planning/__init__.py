"""A model of a step's time, to say beforehand which method would pay."""
