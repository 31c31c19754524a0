"""Supervision of one rank: stop signals, peer-failure watchdog, exit status, logs."""
