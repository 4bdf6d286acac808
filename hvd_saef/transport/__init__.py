"""Who carries the bytes: MPI and Horovod, threads of one process, and the watch over those who wait."""
