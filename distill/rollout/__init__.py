"""Generation: engines, their state machine, syncs of the weights, and the gathering of rollouts."""
