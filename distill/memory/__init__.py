"""Forecast of the peak memory of each rank, from the recipe and the shapes of student and teacher."""
