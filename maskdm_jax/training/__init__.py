"""Training: step, state, start or resumption of a run, loop, checkpoints, logs."""
