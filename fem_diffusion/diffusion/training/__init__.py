"""Training: the loop, its checkpoints, the task of every network, collapse."""
