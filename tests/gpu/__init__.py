"""What a GPU must show, by one command: `make test-gpu`. On the CPU, `make test` runs the same code, tiny."""
