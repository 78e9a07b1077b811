"""The town of the demo: its streets, the wind in them, the clouds that may come down, and the meters.

Nothing here is about inference: it is a problem as in any Firedrake script.
"""

from functools import cache
from pathlib import Path

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, Mesh, SpatialCoordinate, TestFunction, TestFunctions,
    TrialFunctions, assemble, div, dot, dx, solve,
)

from fem_diffusion import (
    Boundary, GaussianNoise, Physics, TimeSteps, TransientAdvectionDiffusion, coefficients, field,
)

HERE = Path(__file__).parent
INFLOW, OUTFLOW, WALLS, OBSTACLES = 1, 2, 3, 4  # markers in streets.geo
WIND = 1.0          # m/s, at the inflow
TURBULENCE = 1.0    # κ in m²/s
TIMES = np.arange(20.0, 241.0, 20.0)  # s, when sensors report
TIME_STEP = 4.0     # s
SENSORS = [(128, 42), (128, 92), (124, 170), (188, 128), (192, 40), (196, 186), (284, 74), (284, 150)]  # m
HOSPITAL = (246, 70)  # m, the sensor left out
FLOOR, RELATIVE = 0.25, 0.05  # noise of the sensors: mg/m³, and a share of the reading
METER = GaussianNoise(std=FLOOR, relative=RELATIVE)
THRESHOLD = 5.0     # mg/m³, what may not be exceeded

mesh = Mesh(str(HERE / "streets.msh"), name="streets")
V = FunctionSpace(mesh, "CG", 1)
nodes = np.stack([coefficients(Function(V).interpolate(c)) for c in SpatialCoordinate(mesh)], axis=1)
# Integrals over the streets are sums over nodes with these weights.
weights = coefficients(assemble(TestFunction(V) * dx).riesz_representation("l2"))
corners = mesh.coordinates.dat.data_ro[mesh.coordinates.cell_node_map().values]  # (cells, 3, 2)
cell_share = np.abs(np.linalg.det(corners[:, 1:] - corners[:, :1]))
cell_share /= cell_share.sum()


@cache
def wind():
    """Potential flow around the buildings: the mixed method makes its divergence vanish in every cell."""
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (v, p), (w, q) = TrialFunctions(W), TestFunctions(W)
    flow = Function(W)
    bcs = [DirichletBC(W.sub(0), Constant((WIND, 0)), INFLOW),
           DirichletBC(W.sub(0), Constant((0, 0)), (WALLS, OBSTACLES))]
    solve((dot(v, w) - p * div(w) - div(v) * q) * dx == Constant(0) * q * dx, flow, bcs=bcs,
          solver_parameters={"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu",
                             "pc_factor_mat_solver_type": "mumps",
                             "mat_mumps_icntl_14": 300})  # room for the pivots of a saddle point
    return flow.subfunctions[0]


def transport(times=TIMES):
    """The map from the released cloud to the concentration at `times`."""
    return TransientAdvectionDiffusion(V, V, "initial", TimeSteps(times=times, time_step=TIME_STEP),
                                       Physics(velocity=wind(), diffusivity=TURBULENCE),
                                       Boundary(dirichlet={INFLOW: 0.0}, outflow=(OUTFLOW,)))


def clouds(seed):
    """sqrt(m) for one to three clouds, anywhere in the streets; 10 to 40 mg/m³ at the centre, 18 to 32 m wide."""
    rng = np.random.default_rng(seed)
    m = np.zeros(len(nodes))
    for _ in range(rng.integers(1, 4)):
        centre = rng.dirichlet((1, 1, 1)) @ corners[rng.choice(len(corners), p=cell_share)]
        peak, width = rng.uniform(10, 40), rng.uniform(18, 32)
        m += peak * np.exp(-((nodes - centre)**2).sum(axis=1) / (2 * width**2))
    return field(V, np.sqrt(m))
