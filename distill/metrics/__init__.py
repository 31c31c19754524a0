"""Metrics of a step, reduced over ranks, and the files and services that record them."""
