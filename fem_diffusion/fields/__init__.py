"""Firedrake numerics under everything else: coefficients, modes, bases, keys, geometry."""
