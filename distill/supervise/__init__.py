"""Supervision of one rank: stop signals, detection of failed ranks, exit status and logs."""
