"""Generation of rollouts: engines, weight syncs, and the gathering of rollouts from all ranks."""
