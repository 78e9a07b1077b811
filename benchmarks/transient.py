"""How much faster samples of a transient problem are when they march together than one after another.

As `forward.py`, for Crank-Nicolson steps of a linear problem: `solve_many` of `TransientAdvectionDiffusion`, or of
`March` with the form of the loop; a loop over samples and steps with one reused ``LinearVariationalSolver`` with
Firedrake's default parameters, and the same with ``constant_jacobian=True``, which keeps the factorisation; and
``solve(a == L)`` for every step. The unknown is the initial state, with as many coefficients as the state, or the
strength of a source in time, with few.

    OMP_NUM_THREADS=1 python benchmarks/transient.py --cells 36 72 --steps 40
"""

import argparse

import numpy as np
from firedrake import (Constant, DirichletBC, Function, FunctionSpace, IntervalMesh, LinearVariationalProblem,
                       LinearVariationalSolver, SpatialCoordinate, TestFunction, TrialFunction, UnitSquareMesh,
                       as_vector, dot, dx, exp, grad, lhs, rhs, solve)

from fem_diffusion import Boundary, March, Physics, TimeSteps, TransientAdvectionDiffusion
from forward import timed

END, SAVED = 1.0, 10


def channel(cells, unknown, steps):
    """Space, time step, the problem, and what the reference needs of it: velocity and shape of the source."""
    mesh = UnitSquareMesh(cells, cells)
    V, (x, y) = FunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    velocity, shape = as_vector([6 * y * (1 - y), 0.0]), exp(-20 * (x - 0.3)**2 - 20 * (y - 0.5)**2)
    M = V if unknown == "initial" else FunctionSpace(IntervalMesh(20, END), "CG", 1)
    problem = TransientAdvectionDiffusion(V, M, unknown if unknown == "initial" else ("source", shape),
                                          TimeSteps(time_step=END / steps, times=np.arange(1, SAVED + 1) * END / SAVED),
                                          Physics(velocity=velocity, diffusivity=0.05), Boundary(dirichlet={1: 0.0}),
                                          supg=False)
    return problem, velocity, shape


def one_step(u, old, w, velocity, source, dt):
    """Crank-Nicolson."""
    middle = (u + old) / 2
    return ((u - old) / Constant(dt) * w + dot(velocity, grad(middle)) * w + 0.05 * dot(grad(middle), grad(w))
            - source * w) * dx


def marching(problem, velocity, shape):
    """The same problem with an unknown initial state as a `March`."""
    V, dt = problem.V, problem.steps.time_step
    u, old, m = (Function(V) for _ in range(3))
    return March(one_step(u, old, TestFunction(V), velocity, Constant(0.0) * shape, dt), u, old, m, dt, END,
                 DirichletBC(V, 0, 1), initial=m, times=problem.steps.times)


def loop(problem, velocity, shape, way):
    """The usual Firedrake way, its own form: one sample and one step after another; way: a name from `main`."""
    V, dt = problem.V, problem.steps.time_step
    old, new, strength = Function(V), Function(V), Constant(0.0)
    F = one_step(TrialFunction(V), old, TestFunction(V), velocity, strength * shape, dt)
    bcs = [DirichletBC(V, 0, 1)]
    if way == "solve":
        def step():
            solve(lhs(F) == rhs(F), new, bcs=bcs)
    else:
        step = LinearVariationalSolver(LinearVariationalProblem(
            lhs(F), rhs(F), new, bcs=bcs, constant_jacobian=way == "kept")).solve
    steps = round(END / dt)
    nodes = np.linspace(0, END, problem.M.dim())

    def run(ms):
        result = []
        for m in ms:
            old.assign(0)
            if problem.M == V:
                old.assign(m)
                if isinstance(problem, TransientAdvectionDiffusion):   # whose initial state takes the conditions
                    bcs[0].apply(old)
            states = []
            for k in range(steps):
                if problem.M != V:
                    strength.assign(np.interp((k + 0.5) * dt, nodes, np.sort(m.dat.data_ro)))
                step()
                old.assign(new)
                if (k + 1) % (steps // SAVED) == 0:
                    states.append(new.dat.data_ro.copy())
            result.append(np.stack(states, axis=1).ravel())
        return np.array(result)
    return run


def samples(M, n):
    """Smooth random fields or, in time, increasing strengths, as Functions."""
    rng, x = np.random.default_rng(0), list(SpatialCoordinate(M.mesh()))
    result = []
    for a, b, c in rng.exponential(size=(n, 3)):
        wave = a + b * x[0] + c * x[-1]**2
        result.append(Function(M).interpolate(wave))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[36, 72])
    parser.add_argument("--steps", type=int, default=40, help=f"a multiple of {SAVED}")
    parser.add_argument("--samples", type=int, default=128)
    options, _ = parser.parse_known_args()   # PETSc reads the rest
    print("| problem | unknowns | block, ms | reused solver, ms | factorisation kept, ms | solve(), ms | "
          "reused / block | kept / block | solve() / block | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for unknown in ("initial", "initial, by a residual", "strength"):
        for cells in options.cells:
            problem, *given = channel(cells, unknown.split(",")[0], options.steps)
            if unknown.endswith("residual"):
                problem = marching(problem, *given)
            ms = samples(problem.M, options.samples)
            block, states = timed(problem.solve_many, ms, len(ms))
            one, reference = timed(loop(problem, *given, "reused"), ms[:2])
            kept, _ = timed(loop(problem, *given, "kept"), ms[:2])
            plain, _ = timed(loop(problem, *given, "solve"), ms[:1])
            gap = np.linalg.norm(states[:2] - reference) / np.linalg.norm(reference)
            print(f"| {unknown} | {problem.V.dim()} | {block:.2f} | {one:.1f} | {kept:.1f} | {plain:.0f} | "
                  f"{one / block:.0f} | {kept / block:.0f} | {plain / block:.0f} | {gap:.0e} |", flush=True)


if __name__ == "__main__":
    main()
