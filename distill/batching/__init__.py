"""Rollouts to micro-batches: pure functions."""
