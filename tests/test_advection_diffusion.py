"""AdvectionDiffusion: orders of convergence, every unknown, blocks of samples, adjoints, ranks, errors."""

import numpy as np
import pytest
from firedrake import (COMM_SELF, COMM_WORLD, Constant, ExtrudedMesh, FacetNormal, Function, FunctionSpace,
                       IcosahedralSphereMesh, PeriodicUnitSquareMesh, SpatialCoordinate, Submesh,
                       TestFunction, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace,
                       as_vector, assemble, cos, div, dot, dx, errornorm, exp, grad, norm, sin)
from firedrake.adjoint import (Control, ReducedFunctional, continue_annotation, pause_annotation,
                               set_working_tape, taylor_test)
from scipy import sparse

from fem_diffusion.errors import InputError, InstallError, SolveError
from fem_diffusion import fields
from fem_diffusion.problem.advection_diffusion import AdvectionDiffusion


def quadratic(u):
    return 0.3 * u**2


def channel(n=8, unknown=("flux", 3), M=None, degree=1, **change):
    """A small problem with all four kinds of conditions; the parameter acts where `unknown` says."""
    mesh = change.pop("mesh", None) or UnitSquareMesh(n, n)
    V = FunctionSpace(mesh, "CG", degree)
    x, y = SpatialCoordinate(mesh)
    given = dict(velocity=as_vector([1 + y, 0.2 - 0.1 * x]), diffusivity=0.1 + 0.05 * x, source=sin(3 * x),
                 dirichlet={1: 0.5 + y}, robin={4: (1.0, 0.2)}, outflow=(2,))
    kind = unknown if isinstance(unknown, str) else unknown[0]
    if isinstance(unknown, str):
        given.pop(kind, None)
    elif kind == "dirichlet":
        given["dirichlet"] = {2: 0.3}
        del given["outflow"]
    return AdvectionDiffusion(V, M or V, unknown, **(given | change))


# A positive diffusivity, a velocity that never vanishes, and plain values elsewhere.
CASES = {
    "source": dict(unknown="source"),
    "source with offset": dict(unknown="source", source=lambda m: 1 + m),
    "flux": dict(unknown=("flux", 3)),
    "exponential flux": dict(unknown=("flux", 3), flux={3: exp}),
    "dirichlet": dict(unknown=("dirichlet", 1)),
    "squared dirichlet": dict(unknown=("dirichlet", 1), dirichlet={1: lambda m: m**2, 3: 0.1}, flux={}),
    "diffusivity": dict(unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m)),
    "velocity": dict(unknown="velocity", velocity=lambda m: as_vector([1, 0]) + m),
}


def case(name, reaction=None, **change):
    options = CASES[name] | {"reaction": reaction} | change
    if options["unknown"] == "velocity":
        options["mesh"] = UnitSquareMesh(8, 8)
        options["M"] = VectorFunctionSpace(options["mesh"], "CG", 1)
    return channel(**options)


# Every unknown with a linear equation, one of each kind with a nonlinear one.
PAIRS = [(name, None) for name in CASES] + [(name, quadratic) for name in (
    "source", "exponential flux", "squared dirichlet", "diffusivity")]
each_pair = pytest.mark.parametrize("name, reaction", PAIRS, ids=[
    f"{name}, {'nonlinear' if reaction else 'linear'}" for name, reaction in PAIRS])


def draws(problem, n, scale=0.5, seed=1):
    """Owned coefficients of n parameters, in serial."""
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, Function(problem.M).dat.data_ro.size))


def as_function(M, values):
    m = Function(M)
    with m.dat.vec_wo as x:
        x.array[:] = values
    return m


def owned(f):
    with f.dat.vec_ro as x:
        return x.array.copy()


# --- accuracy

def manufactured_error(mesh, degree, kappa, reaction=None, supg="auto", markers=(1, 2, 3, 4)):
    """L2 error for a smooth solution with Dirichlet, Robin and flux conditions."""
    V = FunctionSpace(mesh, "CG", degree)
    x, y = SpatialCoordinate(mesh)
    exact = sin(2 * x + y) + cos(3 * y - x * x)
    v, kappa = as_vector([1 + 0.3 * y, 0.5 - 0.2 * x]), Constant(kappa) * (1 + 0.5 * x * y)
    q = dot(FacetNormal(mesh), kappa * grad(exact))
    f = dot(v, grad(exact)) - div(kappa * grad(exact)) + (reaction(exact) if reaction else 0)
    left, right, bottom, top = markers
    problem = AdvectionDiffusion(V, V, "source", source=lambda m: m + f, velocity=v, diffusivity=kappa,
                                 reaction=reaction, dirichlet={left: exact, bottom: exact}, flux={top: q},
                                 robin={right: (0.7, exact + q / 0.7)}, supg=supg)
    return errornorm(exact, problem(Function(V)), degree_rise=3)


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
        problem = AdvectionDiffusion(V, V, "source", velocity=(1.0, 0.0), diffusivity=1e-3, supg=supg,
                                     dirichlet={1: 0, 2: 1, 3: 0, 4: 0})
        overshoot[supg] = -problem(Function(V)).dat.data_ro.min()
    assert overshoot[True] < 0.15 * overshoot[False]


def test_one_dimension_exact():
    # v u' - κ u'' = 0 with u(0) = 0 and u(1) = 1 has the solution below.
    mesh = UnitIntervalMesh(64)
    V = FunctionSpace(mesh, "CG", 1)
    x, = SpatialCoordinate(mesh)
    problem = AdvectionDiffusion(V, V, "source", velocity=(1.0,), diffusivity=0.2, dirichlet={1: 0, 2: 1})
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
        problem = AdvectionDiffusion(V, V, "source", source=lambda m: m + f, velocity=v, diffusivity=0.1,
                                     dirichlet={(1, 2, 3, 4, 5): exact}, flux=flux,
                                     solver_parameters=parameters)
        assert errornorm(exact, problem(Function(V))) < 1e-8


def test_periodic_mesh():
    mesh = PeriodicUnitSquareMesh(8, 8)
    V = FunctionSpace(mesh, "CG", 1)
    problem = AdvectionDiffusion(V, V, "source", velocity=(1.0, 0.5), reaction=lambda u: 2 * u)
    assert abs(owned(problem(Function(V).assign(3.0))) - 1.5).max() < 1e-12


# --- unknowns and blocks

@each_pair
def test_solve_many_equals_single_solves(name, reaction):
    problem = case(name, reaction)
    assert problem.linear == (reaction is None)
    assert problem.operator_depends_on_parameter == (name in ("diffusivity", "velocity"))
    ms = draws(problem, 5)
    states = problem.solve_many(ms, block=3)
    single = np.array([owned(problem(as_function(problem.M, m))) for m in ms])
    assert states.shape == single.shape
    assert (np.linalg.norm(states - single, axis=1) <= 1e-8 * np.linalg.norm(single, axis=1)).all()
    assert np.linalg.norm(single[0] - single[1]) > 1e-3 * np.linalg.norm(single[0])   # the unknown acts


@each_pair
def test_sensitivity_is_the_derivative(name, reaction):
    problem = case(name, reaction)
    (m, direction), eps = draws(problem, 2), 1e-4
    rows = sparse.random(3, problem.V.dim(), density=0.3, random_state=3, format="csr")
    sides = [rows @ owned(problem(as_function(problem.M, m + s * eps * direction))) for s in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * eps)
    there = as_function(problem.M, m)
    for state in (None, problem(there)):
        found = problem.sensitivity(there, rows, state=state) @ direction
        assert abs(found - expected).max() <= 1e-6 * abs(expected).max()
    # Elsewhere it must not return what it has factorised before.
    other = problem.sensitivity(as_function(problem.M, m + direction), rows) @ direction
    constant = problem.linear and name in ("source", "source with offset", "flux", "dirichlet")
    assert (abs(other - expected).max() <= 1e-6 * abs(expected).max()) == constant


@pytest.mark.parametrize("name, reaction", [
    ("flux", None), ("exponential flux", quadratic), ("squared dirichlet", quadratic), ("diffusivity", None),
    ("velocity", None)])
def test_taylor(name, reaction):
    problem = case(name, reaction)
    m, h = (as_function(problem.M, values) for values in draws(problem, 2))
    with set_working_tape():
        continue_annotation()
        u = problem(m)
        J = assemble(u**4 * dx + dot(grad(u), grad(u)) * dx)
        pause_annotation()
        functional = ReducedFunctional(J, Control(m))
        assert abs(functional(h) - J) > 1e-6 * abs(J)   # replays with the new parameter
        assert taylor_test(functional, m, h) > 1.95


def test_functions_and_arrays_are_the_same_samples():
    problem = channel()
    ms = draws(problem, 3)
    functions = [as_function(problem.M, m) for m in ms]
    assert np.array_equal(problem.solve_many(functions), problem.solve_many(ms))
    assert problem.solve_many([]).shape == (0, problem.V.dim())


def test_flux_on_submesh_equals_flux_on_mesh():
    mesh = UnitSquareMesh(8, 8)
    M = FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    on_mesh, on_boundary = (channel(mesh=mesh, M=space, reaction=quadratic) for space in (None, M))
    states = [problem(Function(problem.M).interpolate(sin(5 * SpatialCoordinate(problem.M.mesh())[0])))
              for problem in (on_mesh, on_boundary)]
    assert errornorm(*states) < 1e-10
    ms = draws(on_boundary, 3)
    single = owned(on_boundary(as_function(M, ms[2])))
    assert np.linalg.norm(on_boundary.solve_many(ms)[2] - single) <= 1e-8 * np.linalg.norm(single)
    rows = np.eye(2, on_boundary.V.dim(), 40)
    assert on_boundary.sensitivity(as_function(M, ms[0]), rows).shape == (2, M.dim())


def meshes():
    """Meshes, parameter spaces (None: the state's) and unknowns that are less common."""
    extruded, interval = ExtrudedMesh(UnitIntervalMesh(6), 6), UnitIntervalMesh(20)
    quadrilaterals, triangles = UnitSquareMesh(6, 6, quadrilateral=True), UnitSquareMesh(6, 6)
    cube = UnitCubeMesh(3, 3, 3)
    sphere = IcosahedralSphereMesh(1.0, 1)
    sphere.init_cell_orientations(SpatialCoordinate(sphere))
    left = {"dirichlet": {1: 0.3}}
    return {"extruded, flux through the top": (extruded, None, ("flux", "top"), left),
            "extruded, value at the top": (extruded, None, ("dirichlet", "top"), left),
            "interval": (interval, None, ("flux", 2), left),
            "submesh of quadrilaterals": (quadrilaterals, Submesh(quadrilaterals, 1, 3), ("flux", 3), left),
            "submesh in 3D": (cube, Submesh(cube, 2, 5), ("flux", 5), left),
            "two markers": (triangles, None, ("flux", (2, 3)), left),
            "whole boundary": (triangles, None, ("dirichlet", "on_boundary"), {}),
            "sphere": (sphere, None, "source", {"velocity": None})}


@pytest.mark.parametrize("parameters", ["direct", "iterative"])
@pytest.mark.parametrize("name", [
    "interval",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (   # each compiles a dozen kernels of its own
        "extruded, flux through the top", "extruded, value at the top", "submesh of quadrilaterals",
        "submesh in 3D", "two markers", "whole boundary", "sphere"))])
def test_less_common_meshes(name, parameters):
    mesh, where, unknown, options = meshes()[name]
    V = FunctionSpace(mesh, "CG", 1)
    velocity = (1.0, 0.2, 0.1)[:mesh.geometric_dimension]
    problem = AdvectionDiffusion(V, V if where is None else FunctionSpace(where, "CG", 1), unknown,
                                 **(dict(velocity=velocity, diffusivity=0.1, solver_parameters=parameters,
                                         reaction=lambda u: u + quadratic(u)) | options))
    m, direction = draws(problem, 2)
    above, below, state = problem.solve_many(np.array([m + 1e-4 * direction, m - 1e-4 * direction, m]))
    assert np.linalg.norm(state - owned(problem(as_function(problem.M, m)))) <= 1e-8 * np.linalg.norm(state)
    row = np.ones((1, V.dim()))
    slope = row @ (above - below) / 2e-4
    assert abs(problem.sensitivity(as_function(problem.M, m), row) @ direction - slope) <= 1e-5 * abs(slope)


@pytest.mark.parametrize("unknown", ["source", ("dirichlet", 1), ("flux", 3)])
def test_parameter_of_another_degree(unknown):
    mesh = UnitSquareMesh(6, 6)
    problem = channel(mesh=mesh, unknown=unknown, M=FunctionSpace(mesh, "CG", 2), reaction=quadratic)
    same = channel(mesh=mesh, unknown=unknown, reaction=quadratic)
    x = SpatialCoordinate(mesh)
    states = [p.solve_many([Function(p.M).interpolate(x[0] - 2 * x[1])])[0] for p in (problem, same)]
    assert abs(states[0] - states[1]).max() < 1e-9


def test_constant_parameter():
    mesh = UnitSquareMesh(6, 6)
    problem = channel(mesh=mesh, unknown="source", M=FunctionSpace(mesh, "R", 0), reaction=quadratic)
    m = Function(problem.M).assign(0.7)
    state = owned(problem(m))
    assert abs(problem.solve_many([m, m])[1] - state).max() < 1e-8 * abs(state).max()
    slope = (owned(problem(Function(problem.M).assign(0.7 + 1e-5))) - state)[30] / 1e-5
    assert abs(problem.sensitivity(m, np.eye(1, problem.V.dim(), 30))[0, 0] - slope) < 1e-4 * abs(slope)


def test_members_that_the_chord_loses_go_to_newton():
    # The slope of the reaction grows a hundredfold between the reference and the samples.
    problem = channel(reaction=lambda u: u + u**5, dirichlet={1: 0}, source=0)
    ms = np.abs(draws(problem, 4, scale=20.0))
    states = problem.solve_many(ms)
    for m, state in zip(ms, states):
        single = owned(problem(as_function(problem.M, m)))
        assert np.linalg.norm(state - single) <= 1e-8 * np.linalg.norm(single)


def test_reference_moves_start_and_keeps_results():
    problem = channel(flux={3: exp}, reaction=quadratic)
    ms = draws(problem, 3)
    before = problem.solve_many(ms)
    problem.linearise_at(as_function(problem.M, ms[0]))
    assert np.linalg.norm(problem.solve_many(ms) - before) <= 1e-8 * np.linalg.norm(before)


def test_result_is_new_and_has_no_memory():
    problem = channel(reaction=quadratic)
    a, b = (as_function(problem.M, m) for m in draws(problem, 2))
    first = problem(a)
    kept = owned(first)
    problem(b)
    assert np.array_equal(owned(first), kept)
    assert np.array_equal(owned(problem(a)), kept)
    assert first is not problem.u


def test_options_reach_petsc():
    problem = channel(reaction=quadratic, solver_parameters={"ksp_type": "gmres", "pc_type": "ilu",
                                                             "ksp_rtol": 1e-12}, options_prefix="mine_")
    direct = channel(reaction=quadratic)
    m = draws(problem, 2)
    assert problem._solver.snes.ksp.getType() == "gmres"
    assert problem._solver.snes.getOptionsPrefix() == "mine_"
    assert np.allclose(problem.solve_many(m), direct.solve_many(m), rtol=1e-8)


# --- parallel

def summary(name, reaction, comm):
    """Norms of states and a directional derivative of their mean: the same however the mesh is spread."""
    options = CASES[name] | {"reaction": reaction, "mesh": UnitSquareMesh(8, 8, comm=comm)}
    if name == "velocity":
        options["M"] = VectorFunctionSpace(options["mesh"], "CG", 1)
    elif name == "flux":
        options["M"] = FunctionSpace(Submesh(options["mesh"], 1, 3), "CG", 1)
    problem = channel(**options)
    x = SpatialCoordinate(problem.M.mesh())
    ms = [Function(problem.M) for _ in range(3)]
    for k, m in enumerate(ms):
        wave = sin((k + 2) * x[0] + x[1])
        m.interpolate(as_vector([wave, 0.3 * wave]) if problem.M.value_shape else wave)
    states = [as_function(problem.V, row) for row in problem.solve_many(ms, block=2)]
    for m, state in zip(ms, states):
        assert errornorm(problem(m), state) <= 1e-9 * norm(state)
    row = owned(assemble(TestFunction(problem.V) * dx))
    change = problem.sensitivity(ms[0], row[None]) @ owned(ms[1])
    return np.array([norm(u) for u in states] + [comm.allreduce(change[0])])


@pytest.mark.parallel(2)
def test_two_ranks():
    """Two ranks find what one finds, and an error on one rank is an error on both (one mpiexec for all)."""
    assert COMM_WORLD.size == 2
    for name, reaction in [("flux", None), ("flux", quadratic), ("exponential flux", quadratic),
                           ("dirichlet", None), ("squared dirichlet", quadratic), ("source", quadratic),
                           ("velocity", None), ("diffusivity", quadratic)]:
        spread, alone = (summary(name, reaction, comm) for comm in (COMM_WORLD, COMM_SELF))
        assert np.allclose(spread, alone, rtol=1e-9, atol=0), name
    problem = channel()
    ms = np.zeros((2, owned(Function(problem.M)).size + COMM_WORLD.rank))
    with pytest.raises(InputError, match="owned coefficients"):
        problem.solve_many(ms)
    with pytest.raises(InputError, match="owned coefficients"):
        problem.sensitivity(Function(problem.M), ms)


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
    (dict(diffusivity=0.0), "must be positive"),
    (dict(diffusivity="large"), "must be a number"),
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
    for args, words in [((FunctionSpace(mesh, "DG", 1), V, "source"), "continuous"),
                        ((VectorFunctionSpace(mesh, "CG", 1), V, "source"), "scalar"),
                        ((mesh, V, "source"), "FunctionSpace, got"),
                        ((V, VectorFunctionSpace(mesh, "CG", 1), "source"), "value shape"),
                        ((V, other, "source"), "M must live on V's mesh"),
                        ((V, on_boundary, ("dirichlet", 2)), "M must live on V's mesh"),
                        ((V, on_boundary, ("flux", 3)), "is not the boundary with marker 3")]:
        with pytest.raises(InputError, match=words):
            AdvectionDiffusion(*args, dirichlet={1: 0})


def test_extruded_markers_are_listed():
    V = FunctionSpace(ExtrudedMesh(UnitIntervalMesh(3), 3), "CG", 1)
    with pytest.raises(InputError, match="1, 2, 'bottom', 'top'"):
        AdvectionDiffusion(V, V, "source", dirichlet={3: 0})


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
    with pytest.raises(InputError, match="rows must have shape"):
        problem.sensitivity(Function(problem.M), np.zeros((1, 3)))
    with pytest.raises(InputError, match="state must be"):
        problem.sensitivity(Function(problem.M), np.zeros((1, problem.V.dim())), state=wrong)


def test_no_solution_names_the_sample():
    # -u'' + u² = -m has no real solution for large m.
    mesh = UnitIntervalMesh(16)
    V = FunctionSpace(mesh, "CG", 1)
    problem = AdvectionDiffusion(V, V, "source", reaction=lambda u: u**2, dirichlet={1: 0, 2: 0})
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
