"""Communication between ranks: MPI and Horovod, threads of one process, and the watch over long waits."""
