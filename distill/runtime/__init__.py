"""What a rank is and how ranks act together: world, plan, metrics, checkpoints, Slurm."""
