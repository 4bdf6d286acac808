"""A model of a step's time, which says beforehand which method would save time."""
