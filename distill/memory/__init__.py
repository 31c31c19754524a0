"""Memory forecast of a run."""
