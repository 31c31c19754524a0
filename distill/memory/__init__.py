"""Forecast of a run's memory per rank, from the recipe and the shapes of the models."""
