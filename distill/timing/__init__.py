"""Forecast of the time of a training step: roofline estimates of the phases, and a simulation of generation."""
