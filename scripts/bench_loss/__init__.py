"""Benchmark of the loss head: see ``__main__``."""
