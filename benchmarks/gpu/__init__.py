"""What a GPU has to be measured for, by one command: `make bench-gpu`. See `__main__.py`."""
