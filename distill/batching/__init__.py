"""Pack rollouts into micro-batches and assign them to ranks: pure functions."""
