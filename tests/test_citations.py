"""What a run has used is what PETSc asks to cite."""

import subprocess
import sys

import petsctools
import pytest
from firedrake import FunctionSpace, UnitIntervalMesh

from fem_diffusion import AdvectionDiffusion, Boundary, GaussianPrior, InputError, InverseProblem, Physics, citations
from fem_diffusion import GaussianNoise, hmc, point_sensors, simulate

PRINTING = """
from firedrake import *
from fem_diffusion import GaussianPrior
GaussianPrior(FunctionSpace(UnitIntervalMesh(4), "CG", 1), std=1.0, correlation_length=0.3)
"""


def _space():
    return FunctionSpace(UnitIntervalMesh(10), "CG", 1)


def test_petsc_prints_what_a_prior_rests_on_and_nothing_else_of_ours():
    run = subprocess.run([sys.executable, "-c", PRINTING, "-citations"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "@article{Lindgren2011" in run.stdout and "Neal2011" not in run.stdout and "Dasgupta2025" not in run.stdout


def test_references_cite_their_methods(monkeypatch):
    keys = []
    V = _space()
    problem = InverseProblem(
        GaussianPrior(V, std=1.0, correlation_length=0.3),
        AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0, 2: 0.0})),
        point_sensors(V, [[0.5]]), GaussianNoise(std=0.05))
    monkeypatch.setattr(petsctools, "cite", keys.append)
    with pytest.warns(Warning, match="R-hat|draws"):
        hmc(problem, [0.1], seed=1, chains=2, draws=4, progress=False)
    # Firedrake cites through the same function.
    assert {key for key in keys if key.startswith("fem_diffusion:")} == {
        "fem_diffusion:Neal2011", "fem_diffusion:Vehtari2021"}


def test_every_entry_is_under_its_key_and_unknown_keys_are_refused():
    for key, entry in citations._ENTRIES.items():
        assert f"{{{key}," in entry and entry.count("{") == entry.count("}")
        citations.cite(key)
    with pytest.raises(KeyError):
        citations.cite("Nobody1900")


def test_where_petsc_lacks_hypre_the_error_names_gamg():
    V, options = _space(), {"ksp_type": "cg", "pc_type": "hypre"}
    if _has_hypre():
        pytest.skip("This PETSc has hypre.")
    with pytest.raises(InputError, match="without hypre.*gamg"):
        AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0}),
                           solver_parameters=options)
    from firedrake import DirichletBC, Function, TestFunction, dx, grad, inner, solve
    from fem_diffusion import SolveError

    u, m, v = Function(V), Function(V), TestFunction(V)

    def own(source):
        m.assign(source)
        solve(inner(grad(u), grad(v)) * dx - m * v * dx == 0, u, DirichletBC(V, 0, 1), solver_parameters=options)
        return u
    problem = InverseProblem(GaussianPrior(V, std=1.0, correlation_length=0.3), own, point_sensors(V, [[0.5]]), 0.1)
    with pytest.raises(SolveError, match="without hypre.*gamg"):
        simulate(problem, 2, seed=1, progress=False)


def _has_hypre():
    from firedrake.petsc import PETSc

    return PETSc.Sys.hasExternalPackage("hypre")
