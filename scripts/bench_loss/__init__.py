"""Benchmark of the loss head; ``__main__`` describes it."""
