"""How much faster two ensemble members simulate than one, with a plain Firedrake solver.

    OMP_NUM_THREADS=1 mpiexec -n 2 python benchmarks/ensemble.py [--pairs 400] [--cells 24]

One run times both: rank 0 alone first, then an ensemble with one rank a member. With as many idle cores as ranks the
ratio is the number of ranks but for the files through which members share their samples.
"""

import argparse
import tempfile
import time

from firedrake import (
    COMM_SELF, COMM_WORLD, Ensemble, Function, FunctionSpace, NonlinearVariationalProblem, NonlinearVariationalSolver,
    SpatialCoordinate, TestFunction, UnitSquareMesh, dx, grad, inner,
)

from mpi4py.MPI import Comm

from fem_diffusion import GaussianPrior, InverseProblem, point_sensors, simulate


def problem(cells: int, comm: Comm) -> InverseProblem:
    """A nonlinear reaction-diffusion problem."""
    V = FunctionSpace(UnitSquareMesh(cells, cells, comm=comm), "CG", 1)
    m, u, v = Function(V), Function(V), TestFunction(V)
    equation = (inner(grad(u), grad(v)) + (u + u**3 - m * (1 + SpatialCoordinate(V.mesh())[0])) * v) * dx
    solver = NonlinearVariationalSolver(NonlinearVariationalProblem(equation, u), solver_parameters={
        "ksp_type": "preonly", "pc_type": "lu"})

    def solve(parameter: Function) -> Function:
        m.assign(parameter)
        u.assign(0.0)
        solver.solve()
        return u
    return InverseProblem(GaussianPrior(V, std=1.0, correlation_length=0.3), solve,
                          point_sensors(V, [[0.3, 0.3], [0.7, 0.6]]))


def rate(cells: int, pairs: int, comm: Comm, ensemble: Ensemble | None, folder: str) -> float:
    """Pairs a second; compilation and factorisation of the prior are left out."""
    given = problem(cells, comm)
    simulate(given, 2, seed=0, progress=False)
    start = time.perf_counter()
    simulate(given, pairs, seed=1, path=folder, block=20, ensemble=ensemble, progress=False)
    return pairs / (time.perf_counter() - start)


def run(cells: int, pairs: int) -> tuple[float, float]:
    """Pairs a second of rank 0 alone and of the ensemble, on every rank."""
    folder = COMM_WORLD.bcast(tempfile.mkdtemp())
    alone = rate(cells, pairs, COMM_SELF, None, f"{folder}/alone") if COMM_WORLD.rank == 0 else None
    alone = COMM_WORLD.bcast(alone)
    ensemble = Ensemble(COMM_WORLD, 1)
    return alone, COMM_WORLD.allreduce(rate(cells, pairs, ensemble.comm, ensemble, f"{folder}/together")
                                       / ensemble.ensemble_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--cells", type=int, default=24)
    arguments, _ = parser.parse_known_args()
    one, all_members = run(arguments.cells, arguments.pairs)
    if COMM_WORLD.rank == 0:
        print("| members | pairs a second |\n|---|---|")
        print(f"| 1 | {one:.0f} |\n| {COMM_WORLD.size} | {all_members:.0f} |\n\nratio {all_members / one:.2f}")
