"""Can I trust it? The conductivity of a heated block: a posterior that is checked, and mended by the user's own solver.

A block of refractory concrete, 1 m x 1 m, is heated by a pipe through its middle, 500 W per square metre of the pipe's
wall, and held at T = 0 (above the air) outside. It conducts better where it is hotter, and unevenly where it is wet or
cracked: k = exp(m(x)) (1 + β T) with an unknown field,

    -∇·(k ∇T) = 0,   k ∂T/∂n = 500 W/m² on the pipe,   T = 0 outside.

20 thermometers read T, with an error of 1 % of a typical reading. The solver below is any Firedrake user's. The lines
marked "added" are all that turns it into a sampler of the conductivity at T = 0. With 4,000 pairs the trained posterior
is right on average and far too wide at this measurement: `check` says so, `correct` mends it by 2,000 solves, and
Hamiltonian Monte Carlo, by many times as many, confirms that.

    python demos/heat_conduction/heat_conduction.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD, Constant, DirichletBC, Function, FunctionSpace, Mesh, NonlinearVariationalProblem,
    NonlinearVariationalSolver, RelabeledMesh, SpatialCoordinate, TestFunction, conditional, ds, dx, exp, grad, inner,
    max_value,
)
from firedrake.mesh import plex_from_cell_list
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, TransformedPrior  # added
from fem_diffusion import fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, coefficients, hmc
from fem_diffusion.checks import read_arguments
from fem_diffusion.plot import plot_predictive

PIPE, OUTSIDE = 1, 2
RADIUS, HEATING = 0.2, 500.0  # m, W/m²
GROWTH = 0.005  # β in 1/K
NOISE = 0.3  # K
THERMOMETERS = [(0.5 + r * np.cos(a), 0.5 + r * np.sin(a)) for r, count in ((0.27, 8), (0.42, 12))
                for a in 2 * np.pi * (np.arange(count) + 0.5) / count]  # m
REGION = (0.65, 0.95)  # m, of x and of y: what the conductivity is asked for

# ## The problem, as in any Firedrake script


def block(n):
    """Square with a hole: 8n rays from the pipe to the outside, 2n rings of cells around it."""
    angle = 2 * np.pi * np.arange(8 * n) / (8 * n)
    ray, step = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.linspace(0, 1, 2 * n + 1)[:, None, None]
    outside = 0.5 * ray / np.abs(ray).max(axis=1, keepdims=True)
    nodes = 0.5 + RADIUS * ray + step**1.2 * (outside - RADIUS * ray)
    number = np.arange(8 * n * (2 * n + 1)).reshape(2 * n + 1, 8 * n)
    a, b, c, d = (x.ravel() for ring in (number, np.roll(number, -1, axis=1)) for x in (ring[:-1], ring[1:]))
    cells = np.concatenate([np.stack([a, b, d], axis=1), np.stack([a, d, c], axis=1)])
    plain = Mesh(plex_from_cell_list(2, cells, nodes.reshape(-1, 2), COMM_WORLD))
    x, y = SpatialCoordinate(plain)
    on_pipe = conditional((x - 0.5)**2 + (y - 0.5)**2 < (RADIUS + 1e-8)**2, 1, 0)
    on_edge = conditional(max_value(abs(x - 0.5), abs(y - 0.5)) > 0.5 - 1e-8, 1, 0)
    facets = FunctionSpace(plain, "HDiv Trace", 0)
    return RelabeledMesh(plain, [Function(facets).interpolate(part) for part in (on_pipe, on_edge)], [PIPE, OUTSIDE])


def conduction(n):
    """Space of conductivity and temperature, and the solver: conductivity at T = 0 to temperature."""
    V = FunctionSpace(block(n), "CG", 1)
    k, T, v = Function(V), Function(V, name="temperature"), TestFunction(V)
    equation = k * (1 + GROWTH * T) * inner(grad(T), grad(v)) * dx - HEATING * v * ds(PIPE)
    problem = NonlinearVariationalProblem(equation, T, DirichletBC(V, 0, OUTSIDE))
    solver = NonlinearVariationalSolver(problem, solver_parameters={
        "snes_rtol": 1e-10, "ksp_type": "preonly", "pc_type": "lu"})

    def heat(conductivity):
        k.assign(conductivity)
        T.assign(Constant(0.0))
        solver.solve()
        return T.copy(deepcopy=True)
    return V, heat
