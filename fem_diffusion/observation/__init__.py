"""What sensors read of a state: linear observations, instruments, families."""
