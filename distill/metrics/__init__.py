"""Metrics of a step, and the files that they are written to."""
