"""Samplers between ODE and SDE, densities, moves, bounds."""
