"""Training: what a run's state is, one step of it, many devices, checkpoints, and the loop around them."""
