"""Posteriors without training: exact, and by Monte Carlo with the model itself."""
