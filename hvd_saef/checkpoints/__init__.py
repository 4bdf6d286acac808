"""What a run needs to go on later: checkpoints of all workers, and one state for other numbers of workers."""
