"""How much faster a block of samples is than one solve after another.

Three ways through the same steady advection-diffusion problem, in one run: `AdvectionDiffusion.solve_many`, a
loop over one reused variational solver, and the loop a script starts with, ``solve(a == L)`` or
``solve(F == 0)``.
Times are CPU time a sample, so that other work on the machine hardly matters; the ratios matter most.

    OMP_NUM_THREADS=1 python benchmarks/forward.py --cells 36 100 --degree 1
"""

import argparse
import time
from functools import partial

import numpy as np
from firedrake import (Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver,
                       NonlinearVariationalProblem, NonlinearVariationalSolver, SpatialCoordinate, Submesh,
                       TrialFunction, UnitSquareMesh, as_vector, derivative, replace, solve)

from fem_diffusion.problem.advection_diffusion import AdvectionDiffusion

DIRECT = {"ksp_type": "preonly", "pc_type": "lu"}   # what Firedrake chooses: MUMPS


def quadratic(u):
    return 0.3 * u**2


def channel(cells, degree, reaction):
    """A channel with an unknown flux through its bottom, on a submesh of the boundary."""
    mesh = UnitSquareMesh(cells, cells)
    y = SpatialCoordinate(mesh)[1]
    M = FunctionSpace(Submesh(mesh, 1, 3), "CG", degree)
    velocity = as_vector([6 * y * (1 - y), 0.0])
    return AdvectionDiffusion(FunctionSpace(mesh, "CG", degree), M, ("flux", 3), reaction=reaction,
                              velocity=velocity, diffusivity=0.05, dirichlet={1: 0.5})


def samples(M, n):
    """Smooth random fluxes into the channel, as Functions."""
    rng, x = np.random.default_rng(0), SpatialCoordinate(M.mesh())[0]
    waves = (x, x * x, 4 * x * (1 - x), 1 - x)
    modes = np.array([Function(M).interpolate(wave).dat.data_ro for wave in waves])
    result = [Function(M) for _ in range(n)]
    for m, weights in zip(result, 0.5 * rng.exponential(size=(n, len(modes)))):
        m.dat.data[:] = weights @ modes
    return result


def reused(problem):
    """The usual Firedrake way: one solver, built once."""
    m, u = Function(problem.M), Function(problem.V)
    F = replace(problem.F, {problem.m: m, problem.u: u})
    if problem.linear:
        equation = LinearVariationalProblem(derivative(F, u), -replace(F, {u: Function(problem.V)}), u,
                                            bcs=problem.bcs, constant_jacobian=True)
        solver = LinearVariationalSolver(equation, solver_parameters=DIRECT)
    else:
        solver = NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, bcs=problem.bcs),
                                            solver_parameters=DIRECT | {"snes_rtol": 1e-10})
    return partial(_loop, m, u, solver.solve)


def naive(problem):
    """One call of solve a sample."""
    m, u = Function(problem.M), Function(problem.V)
    F = replace(problem.F, {problem.m: m, problem.u: u})
    if not problem.linear:
        parameters = DIRECT | {"snes_rtol": 1e-10}
        return partial(_loop, m, u, lambda: solve(F == 0, u, bcs=problem.bcs, solver_parameters=parameters))
    a = derivative(F, u, TrialFunction(problem.V))
    L = -replace(F, {u: Function(problem.V)})
    return partial(_loop, m, u, lambda: solve(a == L, u, bcs=problem.bcs, solver_parameters=DIRECT))


def _loop(m, u, step, ms):
    result = []
    for sample in ms:
        m.assign(sample)
        u.assign(0)
        step()
        result.append(u.dat.data_ro.copy())
    return np.array(result)


def timed(method, ms):
    """CPU milliseconds a sample and the states, after one run that compiles and factorises."""
    method(ms[:1])
    start = time.process_time()
    states = method(ms)
    return 1e3 * (time.process_time() - start) / len(ms), states


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[36, 72, 144])
    parser.add_argument("--degree", type=int, default=1)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--block", type=int, default=64)
    options, _ = parser.parse_known_args()   # PETSc reads the rest
    print("| problem | unknowns | block, ms | reused solver, ms | solve(), ms | reused / block | "
          "solve() / block | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, reaction in (("linear", None), ("r(u) = 0.3 u²", quadratic)):
        for cells in options.cells:
            problem = channel(cells, options.degree, reaction)
            ms = samples(problem.M, options.samples)
            few = ms[:max(2, options.samples // 8)]   # the loops are slow
            mean = Function(problem.M)
            mean.dat.data[:] = np.mean([m.dat.data_ro for m in ms], axis=0)
            problem.linearise_at(mean)
            block, states = timed(partial(problem.solve_many, block=options.block), ms)
            one, reference = timed(reused(problem), few)
            plain, _ = timed(naive(problem), few[:8])
            gap = np.linalg.norm(states[:len(few)] - reference) / np.linalg.norm(reference)
            print(f"| {name} | {problem.V.dim()} | {block:.2f} | {one:.2f} | {plain:.1f} | "
                  f"{one / block:.0f} | {plain / block:.0f} | {gap:.0e} |", flush=True)


if __name__ == "__main__":
    main()
