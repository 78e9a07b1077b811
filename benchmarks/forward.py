"""How much faster a block of samples is than one solve after another.

Ways through the same steady advection-diffusion problem, in one run: `AdvectionDiffusion.solve_many`; a loop over
one reused variational solver with Firedrake's default parameters, and the same with ``constant_jacobian=True``, which
keeps the factorisation; and the loop a script starts with, ``solve(a == L)`` or ``solve(F == 0)``. The unknown is a
flux on the wall, with few coefficients, or a source, with as many as the state.
Times are CPU time a sample, so that other work on the machine hardly matters, after one run that compiles, factorises
and, for few coefficients, builds the responses; the ratios matter most.

    OMP_NUM_THREADS=1 python benchmarks/forward.py --cells 36 100 --degree 1
"""

import argparse
import time
from functools import partial

import numpy as np
from firedrake import (Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver,
                       NonlinearVariationalProblem, NonlinearVariationalSolver, SpatialCoordinate, Submesh,
                       TrialFunction, UnitSquareMesh, as_vector, derivative, replace, solve)

from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary, Physics


def quadratic(u):
    return 0.3 * u**2


def channel(cells, degree, reaction, unknown="flux"):
    """A channel with an unknown flux through its bottom, on a submesh of the boundary, or an unknown source."""
    mesh = UnitSquareMesh(cells, cells)
    V, y = FunctionSpace(mesh, "CG", degree), SpatialCoordinate(mesh)[1]
    M = FunctionSpace(Submesh(mesh, 1, 3), "CG", degree) if unknown == "flux" else V
    velocity = as_vector([6 * y * (1 - y), 0.0])
    return AdvectionDiffusion(V, M, ("flux", 3) if unknown == "flux" else unknown,
                              Physics(reaction=reaction, velocity=velocity, diffusivity=0.05),
                              Boundary(dirichlet={1: 0.5}))


def samples(M, n):
    """Smooth random fluxes into the channel, as Functions."""
    rng, x = np.random.default_rng(0), SpatialCoordinate(M.mesh())[0]
    waves = (x, x * x, 4 * x * (1 - x), 1 - x)
    modes = np.array([Function(M).interpolate(wave).dat.data_ro for wave in waves])
    result = [Function(M) for _ in range(n)]
    for m, weights in zip(result, 0.5 * rng.exponential(size=(n, len(modes)))):
        m.dat.data[:] = weights @ modes
    return result


def reused(problem, keep):
    """The usual Firedrake way: one solver, built once; keep: also its factorisation, where that may be kept."""
    m, u = Function(problem.M), Function(problem.V)
    F = replace(problem.F, {problem.m: m, problem.u: u})
    if problem.linear:
        equation = LinearVariationalProblem(derivative(F, u), -replace(F, {u: Function(problem.V)}), u,
                                            bcs=problem.bcs, constant_jacobian=keep)
        solver = LinearVariationalSolver(equation)
    else:
        solver = NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, bcs=problem.bcs))
    return partial(_loop, m, u, solver.solve)


def naive(problem):
    """One call of solve a sample."""
    m, u = Function(problem.M), Function(problem.V)
    F = replace(problem.F, {problem.m: m, problem.u: u})
    if not problem.linear:
        return partial(_loop, m, u, lambda: solve(F == 0, u, bcs=problem.bcs))
    a = derivative(F, u, TrialFunction(problem.V))
    L = -replace(F, {u: Function(problem.V)})
    return partial(_loop, m, u, lambda: solve(a == L, u, bcs=problem.bcs))


def _loop(m, u, step, ms):
    result = []
    for sample in ms:
        m.assign(sample)
        u.assign(0)
        step()
        result.append(u.dat.data_ro.copy())
    return np.array(result)


def timed(method, ms, warm=1):
    """CPU milliseconds a sample and the states, after one run with the first samples."""
    method(ms[:warm])
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
    print("| problem | unknowns | block, ms | reused solver, ms | factorisation kept, ms | solve(), ms | "
          "reused / block | kept / block | solve() / block | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, unknown, reaction in (("linear, flux", "flux", None), ("linear, source", "source", None),
                                    ("r(u) = 0.3 u², flux", "flux", quadratic)):
        for cells in options.cells:
            problem = channel(cells, options.degree, reaction, unknown)
            ms = samples(problem.M, options.samples)
            few = ms[:max(2, options.samples // 16)]   # the loops are slow
            mean = Function(problem.M)
            mean.dat.data[:] = np.mean([m.dat.data_ro for m in ms], axis=0)
            problem.linearise_at(mean)
            block, states = timed(partial(problem.solve_many, block=options.block), ms, len(ms))
            one, reference = timed(reused(problem, False), few)
            kept = timed(reused(problem, True), few)[0] if problem.linear else np.nan
            plain, _ = timed(naive(problem), few[:4])
            gap = np.linalg.norm(states[:len(few)] - reference) / np.linalg.norm(reference)
            print(f"| {name} | {problem.V.dim()} | {block:.2f} | {one:.2f} | {kept:.2f} | {plain:.1f} | "
                  f"{one / block:.0f} | {kept / block:.0f} | {plain / block:.0f} | {gap:.0e} |", flush=True)


if __name__ == "__main__":
    main()
