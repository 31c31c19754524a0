"""Pack rollouts into micro-batches and assign the micro-batches to ranks, in pure functions."""
