"""How much faster blocks are than a loop, for residuals of users.

`Steady(F, u, m, bcs).solve_many` against a loop over one variational solver of the same residual with Firedrake's
default parameters, in one run: a linear problem whose operator does not depend on the parameter, Stokes flow, linear
elasticity under an unknown load, a nonlinear state, and operators that depend on the parameter. CPU milliseconds a
sample, after one run that compiles and factorises; the difference is relative.

    OMP_NUM_THREADS=1 python benchmarks/residuals.py [--cells 40 126]
"""

import argparse
import time

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, NonlinearVariationalProblem, NonlinearVariationalSolver,
    SpatialCoordinate, TestFunction, TestFunctions, UnitSquareMesh, VectorFunctionSpace, as_vector, div, dx, exp, grad,
    inner, split, sym,
)

from fem_diffusion import GaussianPrior, Steady, coefficients, field


def poisson(mesh):
    """Diffusion with an unknown source."""
    V = FunctionSpace(mesh, "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    return inner(grad(u), grad(v)) * dx - m * v * dx, u, m, DirichletBC(V, 0, "on_boundary")


def logistic(mesh):
    """Logistic growth with an unknown source: the Jacobian depends on the state."""
    V = FunctionSpace(mesh, "CG", 1)
    u, m, v = Function(V).assign(2.0), Function(V), TestFunction(V)
    F = (0.01 * inner(grad(u), grad(v)) - u * (1 - u) * v - exp(0.3 * m) * v) * dx
    return F, u, m, DirichletBC(V, 0, "on_boundary")


def diffusivity(mesh):
    """An unknown log-diffusivity: the operator depends on the parameter."""
    V = FunctionSpace(mesh, "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    return exp(m) * inner(grad(u), grad(v)) * dx - v * dx, u, m, DirichletBC(V, 0, "on_boundary")


def stokes(mesh):
    """Taylor-Hood elements with an unknown force."""
    Z = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    z, m = Function(Z), Function(FunctionSpace(mesh, "CG", 1))
    (u, p), (v, q) = split(z), TestFunctions(Z)
    y = SpatialCoordinate(mesh)[1]
    F = (inner(grad(u), grad(v)) - p * div(v) - q * div(u) - m * v[1]) * dx
    return F, z, m, [DirichletBC(Z.sub(0), as_vector([y * (1 - y), 0]), 1), DirichletBC(Z.sub(0), 0, (3, 4))]


def load(mesh):
    """Elasticity under an unknown load."""
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, m, v = Function(V), Function(FunctionSpace(mesh, "CG", 1)), TestFunction(V)
    F = (inner(2 * sym(grad(u)), sym(grad(v))) + div(u) * div(v) - m * v[1]) * dx
    return F, u, m, DirichletBC(V, Constant((0, 0)), 3)


PROBLEMS = {"diffusion, unknown source": poisson, "Stokes, unknown force": stokes, "elasticity, unknown load": load,
            "logistic growth, unknown source": logistic, "diffusion, unknown log-diffusivity": diffusivity}


def loop(F, u, m, bcs, rows):
    """States by one reused solver with its default parameters."""
    start, solver = u.copy(deepcopy=True), NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, bcs))
    solver.solve()
    states, begun = [], time.process_time()
    for row in rows:
        m.assign(field(m.function_space(), row))
        u.assign(start)
        solver.solve()
        states.append(coefficients(u))
    return np.array(states), 1e3 * (time.process_time() - begun) / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[40, 126])
    parser.add_argument("--samples", type=int, default=128)
    options, _ = parser.parse_known_args()   # PETSc reads the rest
    print("| problem | unknowns | block, ms | loop, ms | loop / block | difference |\n|---|---|---|---|---|---|")
    for name, make in PROBLEMS.items():
        for cells in options.cells:
            F, u, m, bcs = make(UnitSquareMesh(cells, cells))
            problem = Steady(F, u, m, bcs)
            rows = GaussianPrior(problem.M, 0.5, 0.3).sample_many(options.samples, seed=0)
            problem.solve_many(rows)
            begun = time.process_time()
            states = problem.solve_many(rows)
            block = 1e3 * (time.process_time() - begun) / len(rows)
            right, one = loop(F, u, m, bcs, rows[:max(2, options.samples // 8)])
            gap = np.linalg.norm(states[:len(right)] - right) / np.linalg.norm(right)
            print(f"| {name} | {problem.V.dim()} | {block:.2f} | {one:.2f} | {one / block:.1f} | {gap:.0e} |",
                  flush=True)


if __name__ == "__main__":
    main()
