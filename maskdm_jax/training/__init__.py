"""Training: the step, the state that it updates, where a run starts, the loop, checkpoints and logs."""
