"""Communication between ranks: MPI and Horovod, torch.distributed, threads of a process; and the watch."""
