"""Forecast of each rank's peak memory, computed from the recipe and the layer sizes of both models."""
