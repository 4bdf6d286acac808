"""A state machine over threads: programs of everything users do, held against a model in plain numpy.

`programs` draws them, `actions` and those beside it say what each action does in the library and in the
model (`reference`), `running` runs both and compares. `python -m tests.machine` does so for hours.
"""
