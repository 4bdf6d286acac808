"""Communication between ranks: MPI and Horovod, torch.distributed, threads of one process, and the watch over waits."""
