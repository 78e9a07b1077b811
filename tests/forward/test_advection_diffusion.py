"""AdvectionDiffusion: orders of convergence, known solutions, errors that name the remedy."""

import numpy as np
import pytest
from firedrake import (Constant, ExtrudedMesh, FacetNormal, Function, FunctionSpace, PeriodicUnitSquareMesh,
                       SpatialCoordinate, Submesh, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace,
                       as_vector, div, dot, errornorm, exp, grad)

from channel import channel, grouped, manufactured_error, owned, quadratic
from fem_diffusion.errors import InputError, InstallError, SolveError
from fem_diffusion.fields import coefficients as fields
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary, Physics


# --- accuracy

def observed_order(meshes, *args, **kwargs):
    coarse, fine = (manufactured_error(mesh, *args, **kwargs) for mesh in meshes)
    return np.log2(coarse / fine)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("kappa, loss", [(1.0, 0.1), (1e-4, 0.6)])
def test_order(degree, kappa, loss):
    meshes = [UnitSquareMesh(n, n) for n in (12, 24)]
    assert observed_order(meshes, degree, kappa) >= degree + 1 - loss


@pytest.mark.parametrize("reaction", [quadratic, pytest.param(lambda u: 2 * u, marks=pytest.mark.slow),
                                      pytest.param(lambda u: u / (3 + u), marks=pytest.mark.slow)],
                         ids=["quadratic", "linear", "saturating"])
def test_order_with_reaction(reaction):
    assert observed_order([UnitSquareMesh(n, n) for n in (8, 16)], 1, 1e-2, reaction) >= 1.9


TENSOR = [[1.0, 0.6], [0.6, 0.5]]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_order_with_tensor_diffusivity(scale):
    meshes = [UnitSquareMesh(n, n) for n in (16, 32)]
    assert observed_order(meshes, 1, scale * np.array(TENSOR)) >= 1.9


def test_tensor_that_is_a_multiple_of_the_identity_is_a_scalar():
    problems = [channel(diffusivity=kappa) for kappa in (0.3, 0.3 * np.eye(2), [[Constant(0.3), 0], [0, 0.3]])]
    states = [owned(problem(Function(problem.M))) for problem in problems]
    assert max(abs(state - states[0]).max() for state in states) < 1e-12


def test_order_on_quadrilaterals():
    assert observed_order([UnitSquareMesh(n, n, quadrilateral=True) for n in (8, 16)], 1, 1e-4) >= 1.4


@pytest.mark.slow
def test_order_on_extruded_mesh():
    meshes = [ExtrudedMesh(UnitIntervalMesh(n), n) for n in (8, 16)]
    assert observed_order(meshes, 1, 1e-2, markers=(1, 2, "bottom", "top")) >= 1.9


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("kappa", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("quadrilateral", [False, True])
def test_order_fine(degree, kappa, quadrilateral):
    meshes = [UnitSquareMesh(n, n, quadrilateral=quadrilateral) for n in (32, 64)]
    assert observed_order(meshes, degree, kappa) >= degree + 0.9


def test_supg_suppresses_oscillations():
    mesh = UnitSquareMesh(16, 16)
    V = FunctionSpace(mesh, "CG", 1)
    overshoot = {}
    for supg in (True, False):
        problem = AdvectionDiffusion(V, V, "source", Physics(velocity=(1.0, 0.0), diffusivity=1e-3),
                                     Boundary(dirichlet={1: 0, 2: 1, 3: 0, 4: 0}), supg=supg)
        overshoot[supg] = -problem(Function(V)).dat.data_ro.min()
    assert overshoot[True] < 0.15 * overshoot[False]


def test_one_dimension_exact():
    # v u' - κ u'' = 0 with u(0) = 0 and u(1) = 1 has the solution below.
    mesh = UnitIntervalMesh(64)
    V = FunctionSpace(mesh, "CG", 1)
    x, = SpatialCoordinate(mesh)
    problem = AdvectionDiffusion(V, V, "source", Physics(velocity=(1.0,), diffusivity=0.2),
                                 Boundary(dirichlet={1: 0, 2: 1}))
    assert errornorm((exp(5 * x) - 1) / (exp(5.0) - 1), problem(Function(V))) < 1e-3


def test_three_dimensions():
    mesh = UnitCubeMesh(4, 4, 4)
    V = FunctionSpace(mesh, "CG", 2)
    x, y, z = SpatialCoordinate(mesh)
    exact = x * y + z**2   # in the space, so that the solver must find it
    v = as_vector([1, z, 0.5])
    f = dot(v, grad(exact)) - div(0.1 * grad(exact))
    flux = {6: dot(FacetNormal(mesh), 0.1 * grad(exact))}
    for parameters in ("direct", "iterative"):
        problem = AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=0.1),
                                     Boundary(dirichlet={(1, 2, 3, 4, 5): exact}, flux=flux),
                                     solver_parameters=parameters)
        assert errornorm(exact, problem(Function(V))) < 1e-8


def test_periodic_mesh():
    mesh = PeriodicUnitSquareMesh(8, 8)
    V = FunctionSpace(mesh, "CG", 1)
    problem = AdvectionDiffusion(V, V, "source", Physics(velocity=(1.0, 0.5), reaction=lambda u: 2 * u))
    assert abs(owned(problem(Function(V).assign(3.0))) - 1.5).max() < 1e-12


# --- errors

@pytest.mark.parametrize("change, words", [
    (dict(unknown="sorce"), "must be one of"),
    (dict(unknown=("robin", 4)), "must be one of"),
    (dict(unknown="source", source=1.0), "is the unknown"),
    (dict(unknown=("flux", 3), flux={3: 1.0}), "is the unknown"),
    (dict(unknown="velocity"), "value shape"),
    (dict(dirichlet={7: 0.0}), "names marker 7, but the markers of this mesh are 1, 2, 3, 4"),
    (dict(dirichlet={"top": 0.0}), "the markers of this mesh are 1, 2, 3, 4"),
    (dict(outflow=(4,)), "marker 4 is named by both robin and outflow.* 1, 2, 3, 4"),
    (dict(dirichlet={"on_boundary": 0.0}), "marker 3 is named by both dirichlet and flux"),
    (dict(dirichlet={(1, 3): 0.0}), "marker 3 is named by both"),
    (dict(unknown=("dirichlet", 4)), "marker 4 is named by both"),
    (dict(robin={4: 1.0}), "must be a pair"),
    (dict(diffusivity=0.0), "above 0"),
    (dict(diffusivity="large"), "must be a number"),
    (dict(diffusivity=np.diag([1.0, 0.0])), "positive definite"),
    (dict(diffusivity=[[1.0, 0.1], [0.2, 1.0]]), "symmetric"),
    (dict(diffusivity=np.eye(3)), r"\(2, 2\)"),
    (dict(diffusivity=as_vector([1, 2])), "must have shape"),
    (dict(unknown=["source", "source"]), "each coefficient once"),
    (dict(unknown=["source", "diffusivity"]), "MixedFunctionSpace"),
    (dict(unknown="initial"), "must be one of"),
    (dict(velocity=(1.0, 0.0, 0.0)), "must have shape"),
    (dict(velocity=1.0), "must have shape"),
    (dict(reaction=3.0), "must be a callable"),
    (dict(dirichlet={}, robin={}), "only up to a constant"),
    (dict(dirichlet={}, robin={}, reaction=lambda u: Constant(1.0)), "only up to a constant"),
    (dict(flux={3: lambda m: Constant(1.0)}), "makes no use of the parameter"),
    (dict(supg="yes"), "supg"),
    (dict(velocity=None, supg=True), "supg"),
    (dict(solver_parameters="multigrid"), "'direct', 'iterative' or a dict"),
])
def test_wrong_arguments(change, words):
    with pytest.raises(InputError, match=words):
        channel(n=3, **change)


def test_wrong_spaces():
    mesh = UnitSquareMesh(3, 3)
    V, submesh = FunctionSpace(mesh, "CG", 1), Submesh(mesh, 1, 2)
    other = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    on_boundary = FunctionSpace(submesh, "CG", 1)
    for args, words in [((FunctionSpace(mesh, "CR", 1), V, "source"), "continuous"),
                        ((VectorFunctionSpace(mesh, "CG", 1), V, "source"), "scalar"),
                        ((mesh, V, "source"), "FunctionSpace, got"),
                        ((V, VectorFunctionSpace(mesh, "CG", 1), "source"), "value shape"),
                        ((V, other, "source"), "M must live on V's mesh"),
                        ((V, on_boundary, ("dirichlet", 2)), "M must live on V's mesh"),
                        ((V, on_boundary, ("flux", 3)), "is not the boundary with marker 3")]:
        with pytest.raises(InputError, match=words):
            AdvectionDiffusion(*args, bcs=Boundary(dirichlet={1: 0}))


def test_extruded_markers_are_listed():
    V = FunctionSpace(ExtrudedMesh(UnitIntervalMesh(3), 3), "CG", 1)
    with pytest.raises(InputError, match="1, 2, 'bottom', 'top'"):
        AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={3: 0}))


def test_the_whole_boundary_of_an_extruded_mesh_has_a_top_and_a_bottom():
    mesh = ExtrudedMesh(UnitIntervalMesh(4), 4)
    x, y = SpatialCoordinate(mesh)
    markers = (1, 2, "bottom", "top")
    value, robin, flux = (lambda keys: {"dirichlet": dict.fromkeys(keys, x**2 - y**2)},
                          lambda keys: {"robin": dict.fromkeys(keys, (2.0, x))},
                          lambda keys: {"flux": dict.fromkeys(keys, y), "reaction": lambda u: u})
    # Values alone enter a discontinuous space in another way.
    for family, conditions in (("CG", (value, robin, flux)), ("DQ", (value,))):
        V = FunctionSpace(mesh, family, 1)
        m = Function(V).interpolate(x * y)
        for make in conditions:
            whole, named = (owned(AdvectionDiffusion(V, V, "source", **grouped(**make(keys)))(m))
                            for keys in (["on_boundary"], markers))
            assert abs(whole - named).max() < 1e-12 * abs(named).max()
    with pytest.raises(InputError, match="name one of 1, 2, 'bottom', 'top'"):
        AdvectionDiffusion(FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "CG", 1), ("dirichlet", "on_boundary"))


def test_one_right_hand_side_that_fails_in_a_block_is_an_error():
    problem = channel(n=6, dirichlet={1: 0}, source=0, robin={4: (1.0, 0)}, solver_parameters={
        "mat_type": "aij", "ksp_type": "gmres", "pc_type": "none", "ksp_max_it": 5, "ksp_rtol": 1e-10})
    one, zero = np.ones(problem.M.dim()), np.zeros(problem.M.dim())
    for ms in ([zero, one], [one, zero]):   # zero is solved at once
        with pytest.raises(SolveError):
            problem.solve_many(np.array(ms))
    rows = np.random.default_rng(0).standard_normal((2, problem.V.dim())) * [[1.0], [0.0]]
    with pytest.raises(SolveError):
        problem.sensitivity(Function(problem.M), rows, state=Function(problem.V))


def test_conditions_that_are_no_dict_are_refused():
    for name in ("flux", "dirichlet", "robin"):
        with pytest.raises(InputError, match=f"{name} must be a dict"):
            channel(n=3, unknown="source", **{name: 3.0})
    with pytest.raises(InputError, match="flux must be a dict"):
        channel(n=3, flux=3.0)


def test_wrong_parameters():
    problem = channel(n=3)
    wrong = Function(FunctionSpace(problem.V.mesh(), "CG", 2))
    for call in (problem, problem.linearise_at, lambda m: problem.solve_many([m]),
                 lambda m: problem.sensitivity(m, np.zeros((1, problem.V.dim())))):
        for m in (wrong, 1.0):
            with pytest.raises(InputError, match="must be a Function in"):
                call(m)
    for ms in (np.zeros((2, 3)), np.zeros(problem.M.dim())):
        with pytest.raises(InputError, match="owned coefficients"):
            problem.solve_many(ms)
    with pytest.raises(InputError, match="in a list"):
        problem.solve_many(Function(problem.M))
    with pytest.raises(InputError, match="block"):
        problem.solve_many([Function(problem.M)], block=0)
    with pytest.raises(InputError, match="rows .* has the shape"):
        problem.sensitivity(Function(problem.M), np.zeros((1, 3)))
    with pytest.raises(InputError, match="state must be"):
        problem.sensitivity(Function(problem.M), np.zeros((1, problem.V.dim())), state=wrong)


def test_no_solution_names_the_sample():
    # -u'' + u² = -m has no real solution for large m.
    mesh = UnitIntervalMesh(16)
    V = FunctionSpace(mesh, "CG", 1)
    problem = AdvectionDiffusion(V, V, "source", Physics(reaction=lambda u: u**2), Boundary(dirichlet={1: 0, 2: 0}))
    ms = [Function(V).assign(value) for value in (1.0, -1.0, -1e3)]
    with pytest.raises(SolveError, match="sample 2: .*linearise_at"):
        problem.solve_many(ms)
    assert len(problem.solve_many(ms[:2])) == 2   # and the problem is still fit for use


@pytest.mark.parametrize("unknown", ["source", "diffusivity"])
def test_nan_is_a_solve_error(unknown):
    problem = channel(n=3, unknown=unknown)
    good = Function(problem.M).assign(1.0)
    bad = Function(problem.M).assign(np.nan)
    with pytest.raises(SolveError):
        problem(bad)
    with pytest.raises(SolveError, match="sample 1"):
        problem.solve_many([good, bad])
    assert np.isfinite(problem.solve_many([good])).all()


def test_complex_build_is_refused(monkeypatch):
    monkeypatch.setattr(fields, "complex_mode", True)
    with pytest.raises(InstallError, match="real"):
        channel(n=3)
