"""Training: the loop, checkpoints, metrics, sharding, and the jobs that string phases together."""
