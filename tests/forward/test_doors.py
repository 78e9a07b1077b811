"""Bad arguments of problems, sensors and densities get an error of ours with a remedy; NumPy's numbers are good."""

from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from firedrake import (Cofunction, Constant, Function, FunctionSpace, IntervalMesh, SpatialCoordinate, TestFunction,
                       UnitSquareMesh, exp, grad)
from scipy.sparse import csr_matrix

from channel import grouped
from fem_diffusion.diffusion import GaussianNoise, variance_exploding
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.density_pde import GaussianMixture, forward_density, noise_times, reverse_density
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.forward.physics import Boundary, Physics, TimeSteps
from fem_diffusion.forward.transient import TransientAdvectionDiffusion

MESH, OTHER = UnitSquareMesh(3, 3), UnitSquareMesh(3, 3)
V = FunctionSpace(MESH, "CG", 1)
X = SpatialCoordinate(MESH)
ELSEWHERE = Function(FunctionSpace(OTHER, "CG", 1))
NAN = Function(V).assign(np.nan)
SIZE = V.dim()
SENSORS = point_sensors(V, [(0.2, 0.2), (0.5, 0.5), (0.7, 0.3), (0.4, 0.8)])


def steady(unknown="source", M=V, V=V, **given):
    return AdvectionDiffusion(V, M, unknown, **grouped(**{"dirichlet": {1: 0}} | given))


def transient(unknown="source", M=V, **given):
    default = {"dirichlet": {1: 0}, "times": [0.5, 1.0], "time_step": 0.5}
    return TransientAdvectionDiffusion(V, M, unknown, **grouped(**default | given))


def known_source(source):
    return steady("diffusivity", source=source)


# --- the problem classes

@pytest.mark.parametrize("make", [steady, transient])
@pytest.mark.parametrize("given, words", [
    (dict(velocity=(1.0, np.nan)), "velocity is nan: give a number"),
    (dict(velocity=(True, 1.0)), "velocity is True"),
    (dict(velocity=(1j, 1.0)), "velocity is 1j"),
    (dict(velocity=[]), r"velocity must have shape \(2,\)"),
    (dict(velocity={1: 1.0, 2: 1.0}), r"velocity must have shape \(2,\)"),
    (dict(velocity={1.0, 2.0}), r"velocity must have shape \(2,\)"),
    (dict(velocity=np.array([np.nan, 1.0])), "velocity is nan"),
    (dict(velocity=SpatialCoordinate(OTHER)), "velocity lives on another mesh"),
    (dict(velocity=(ELSEWHERE, 0.0)), "velocity lives on another mesh"),
    (dict(diffusivity=None), "diffusivity must be a number or a UFL expression"),
    (dict(diffusivity=True), "diffusivity is True"),
    (dict(diffusivity=np.inf), "diffusivity is inf"),
    (dict(diffusivity=1j), "diffusivity is 1j"),
    (dict(diffusivity=Constant(-1.0)), "diffusivity is -1.0: give a number that is above 0"),
    (dict(diffusivity=Constant(np.diag([1.0, -1.0]))), "positive definite"),
    (dict(diffusivity=np.eye(2) * (1 + 1j)), "real and imaginary parts"),
    (dict(diffusivity=np.eye(2, dtype=bool)), "holds bool values"),
    (dict(diffusivity=[[1.0], [2.0, 3.0]]), r"of shape \(2, 2\)"),
    (dict(diffusivity=NAN), "diffusivity holds .* not finite"),
    (dict(reaction=int), "reaction is <class 'int'>"),
    (dict(reaction=lambda: 1.0), "reaction does not take 1 arguments"),
    (dict(reaction=lambda u, v: u), "reaction does not take 1 arguments"),
    (dict(reaction=lambda u: np.nan), r"reaction\(u\) is nan"),
    (dict(reaction=lambda u: True), r"reaction\(u\) is True"),
    (dict(reaction=lambda u: ELSEWHERE * u), r"reaction\(u\) lives on another mesh"),
    (dict(reaction=lambda u: grad(u)), r"reaction\(u\) must have shape \(\)"),
    (dict(source=lambda m: grad(m)), r"source\(m\) must have shape \(\)"),
    (dict(source=lambda: 1.0), "source does not take 1 arguments"),
    (dict(source=lambda m: None), r"source\(m\) must be a number or a UFL expression, got NoneType"),
    (dict(dirichlet={1: None}), r"dirichlet\[1\] must be a number or a UFL expression, got NoneType"),
    (dict(dirichlet={1: ELSEWHERE}), r"dirichlet\[1\] lives on another mesh"),
    (dict(dirichlet={1: Cofunction(V.dual())}), "assemble or interpolate it first"),
    (dict(dirichlet={1: TestFunction(V)}), "test or trial functions"),
    (dict(dirichlet={1.0: 0}), "dirichlet names the marker 1.0: give an integer"),
    (dict(dirichlet={True: 0}), "dirichlet names the marker True"),
    (dict(dirichlet={None: 0}), "dirichlet names the marker None"),
    (dict(dirichlet={(): 0}), r"dirichlet names the marker \(\)"),
    (dict(dirichlet={(1, "on_boundary"): 0}), "dirichlet names the marker"),
    (dict(dirichlet={99: 0}), "marker 99, but the markers of this mesh are 1, 2, 3, 4"),
    (dict(flux=[(2, 0.0)]), "flux must be a dict"),
    (dict(flux={2: np.nan}), r"flux\[2\] is nan"),
    (dict(flux={2: "in"}), r"flux\[2\] must be a number or a UFL expression"),
    (dict(robin={2: (1.0,)}), r"robin\[2\] must be a pair"),
    (dict(robin={2: (1.0, np.inf)}), r"robin\[2\] is inf"),
    (dict(robin={2: ("a", 1.0)}), r"robin\[2\] must be a number"),
    (dict(outflow=1.5), "outflow is 1.5: give a marker or a tuple"),
    (dict(outflow=(2.0,)), "outflow names the marker 2.0"),
    (dict(outflow={2: 0}), "outflow is {2: 0}"),
    (dict(supg=1), "supg, unless 'auto', is 1: give True or False"),
    (dict(supg="no"), "supg"),
    (dict(solver_parameters=None), "'direct', 'iterative' or a dict"),
    (dict(solver_parameters=np.zeros(2)), "'direct', 'iterative' or a dict"),
    (dict(solver_parameters={1: 2}), "has the key 1"),
    (dict(solver_parameters={"-ksp_type": "cg"}), "without a dash"),
    (dict(solver_parameters={"ksp_type": "cgg"}), "PETSc refuses solver_parameters.*cgg.*check the spelling"),
    (dict(solver_parameters={"ksp_rtol": "small"}), "PETSc refuses solver_parameters"),
    (dict(options_prefix=0), "options_prefix is 0"),
    (dict(options_prefix=True), "options_prefix is True"),
    (dict(options_prefix="-state_"), "options_prefix is '-state_'"),
    (dict(unknown=np.zeros(2)), "must be one of"),
    (dict(unknown=("flux", {})), "the unknown flux names the marker {}"),
    (dict(unknown=("flux", 1.5)), "the unknown flux names the marker 1.5"),
    (dict(unknown=("flux", True)), "the unknown flux names the marker True"),
    (dict(unknown=("flux", 99)), "marker 99, but the markers of this mesh are"),
    (dict(M=None), "M must be a FunctionSpace, got NoneType"),
    (dict(M=ELSEWHERE.function_space()), "M must live on V's mesh"),
])
def test_bad_arguments_of_problems(make, given, words):
    with pytest.raises(InputError, match=words):
        make(**given)


@pytest.mark.parametrize("source, words", [
    (np.nan, "source is nan"), (True, "source is True"), (np.True_, "got bool"), (1j, "source is 1j"),
    (10**400, "source is inf"), (ELSEWHERE, "lives on another mesh"), (TestFunction(V), "test or trial functions"),
    (Constant(np.nan), "source is nan"), (NAN, "not finite"), (X, r"shape \(\)"), (None, "got NoneType"),
])
def test_bad_known_sources(source, words):
    with pytest.raises(InputError, match=words):
        known_source(source)


@pytest.mark.parametrize("given, words", [
    (dict(times=["0.5"]), "times holds <U3 values: give real numbers"),
    (dict(times=[True]), "times holds bool values"),
    (dict(times=[0.5 + 0j]), "times holds complex"),
    (dict(times=[0.5, np.nan]), "not finite"),
    (dict(times=1.0), r"times has the shape \(\)"),
    (dict(times=[1e12]), "more than 10,000,000 steps"),
    (dict(time_step=1e-12), "more than 10,000,000 steps"),
    (dict(time_step=True), "time_step is True"),
    (dict(time_step=np.complex128(0.5)), "time_step is"),
    (dict(theta=True), "theta is True"),
    (dict(theta="0.5"), "theta is '0.5'"),
    (dict(initial=np.nan), "initial is nan"),
    (dict(initial=ELSEWHERE), "initial lives on another mesh"),
    (dict(unknown="initial", initial=lambda m: None), r"initial\(m\) must be a number"),
    (dict(unknown="initial", initial=lambda m: 1.0), "makes no use of the parameter"),
    (dict(parameter_times=["0", "1"]), "parameter_times holds"),
    (dict(parameter_times=[-1.0, 1.0]), "from 0"),
    (dict(parameter_times=[0.0, np.inf]), "not finite"),
    (dict(unknown=("source", np.nan)), "the shape of the source is nan"),
    (dict(unknown=("source", ELSEWHERE)), "the shape of the source lives on another mesh"),
    *((dict(M=FunctionSpace(IntervalMesh(2, 1.0), family, 0)), "take FunctionSpace.IntervalMesh")
      for family in ("R", "DG")),
])
def test_bad_arguments_of_transient_problems(given, words):
    with pytest.raises(InputError, match=words):
        transient(**given)


def test_groups_of_arguments_are_no_dicts_and_all_print_in_a_line():
    for make, words in ((lambda: AdvectionDiffusion(V, V, "source", bcs={"dirichlet": {1: 0}}), "pass Boundary"),
                        (lambda: AdvectionDiffusion(V, V, "source", {"velocity": (1, 0)}), "pass Physics"),
                        (lambda: TransientAdvectionDiffusion(V, V, "initial", [0.5]), "steps is of type list")):
        with pytest.raises(InputError, match=words):
            make()
    physics, bcs = Physics(velocity=(1.0, 0.0), source=X[0]), Boundary(dirichlet={1: 0})
    steps = TimeSteps(times=np.arange(1, 99), time_step=1.0)
    for what in (physics, bcs, steps, AdvectionDiffusion(V, V, "source", physics=Physics(), bcs=bcs),
                 TransientAdvectionDiffusion(V, V, "initial", steps, physics, bcs), MIX):
        assert repr(what).startswith(type(what).__name__) and "\n" not in repr(what) and len(repr(what)) < 160


@pytest.fixture(scope="module")
def problems():
    return steady(), transient()


@pytest.mark.parametrize("which", [0, 1])
def test_bad_arguments_of_solves(problems, which):
    problem = problems[which]
    m, k = Function(V), problem.U.dim()
    sensors = point_sensors(problem.U, [(0.5, 0.5)])
    for ms in (None, 3, "no", Constant(1.0), TestFunction(V), {0: m, 1: m}):
        with pytest.raises(InputError, match="every parameter must be a Function in"):
            problem.solve_many(ms)
    for dtype in (complex, bool, "U1", object):
        with pytest.raises(InputError, match="real numbers.*owned coefficients"):
            problem.solve_many(np.zeros((2, SIZE), dtype))
    for block in (True, 2.0, "no", None, np.array([2])):
        with pytest.raises(InputError, match="block is .*: give a positive integer"):
            problem.solve_many(np.zeros((2, SIZE)), block)
    for rows, words in ((None, "object values"), ("no", "<U2 values"), ({"a": 1}, "object values"), (m, "object"),
                        (np.full((1, k), np.nan), "not finite"), (np.zeros((1, k), complex), "real and imaginary"),
                        (csr_matrix(np.full((1, k), np.nan)), "not finite"), (TestFunction(V), "object values"),
                        (sensors, "pass its rows, observation.rows")):
        with pytest.raises(InputError, match=words):
            problem.sensitivity(m, rows)
    for state in (1.0, "no", ELSEWHERE):
        with pytest.raises(InputError, match="state must be a Function in .*pass problem"):
            problem.sensitivity(m, np.zeros((1, k)), state)
    with pytest.raises(InputError, match="state is not finite"):
        problem.sensitivity(m, np.zeros((1, k)), Function(problem.U).assign(np.nan))
    with pytest.raises(InputError, match="the parameter is not finite"):
        problem.sensitivity(NAN, np.zeros((1, k)))


def test_a_matrix_solver_that_is_not_there_is_a_solve_error():
    absent = {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "absent"}
    for problem in (steady(solver_parameters=absent), transient(solver_parameters=absent)):
        with pytest.raises(SolveError, match="PETSc stops .*check solver_parameters"):
            problem(Function(V))


def test_numbers_of_numpy_and_other_sequences_are_good():
    velocity = np.array([1.0, 2.0], dtype=np.float32)
    kinds = ({1: 0}, {np.int64(1): np.float32(0)}, MappingProxyType({1: np.array(0.0)}))
    m = Function(V).assign(1.0)
    states = [steady(dirichlet=table, velocity=v, diffusivity=kappa, robin={2: pair}, outflow=outflow, supg=supg)(m)
              for table, v, kappa, pair, outflow, supg in zip(
                  kinds, ((1, 2), velocity, (c for c in velocity)), (0.5, np.float32(0.5), np.array(0.5)),
                  ((1, 2), [np.int64(1), np.float64(2)], np.array([1.0, 2.0])), (3, np.int64(3), {3}),
                  ("auto", True, np.True_))]
    for state in states[1:]:
        np.testing.assert_array_equal(state.dat.data_ro, states[0].dat.data_ro)
    flux = [steady(("flux", marker), outflow=None)(m).dat.data_ro for marker in ((2, 3), [2, np.int64(3)])]
    np.testing.assert_array_equal(*flux)
    runs = [transient(times=times, time_step=step, theta=theta, initial=initial)(m).dat.data_ro
            for times, step, theta, initial in (
                ([0.5, 1.0], 0.5, 1, 2), (iter([0.5, 1.0]), Fraction(1, 2), np.float32(1), np.int64(2)),
                (np.array([0.5, 1.0], np.float32), np.float32(0.5), np.int64(1), np.array(2.0)))]
    np.testing.assert_array_equal(runs[1], runs[0])
    np.testing.assert_array_equal(runs[2], runs[0])
    problem = steady()
    for ms in (np.ones((3, SIZE), int), np.ones((3, SIZE), np.float32), (m for _ in range(3))):
        found = problem.solve_many(ms, np.int64(2))
        np.testing.assert_allclose(found, np.tile(problem(m).dat.data_ro, (3, 1)), rtol=1e-12)
    rows = SENSORS.rows.toarray()
    for same in (rows.tolist(), SENSORS.rows.tocoo(), SENSORS.rows):
        np.testing.assert_array_equal(problem.sensitivity(m, same), problem.sensitivity(m, rows))


def test_what_a_problem_returns_is_new(problems):
    m = Function(V).assign(1.0)
    for problem in problems:
        first = problem(m)
        kept = first.dat.data_ro.copy()
        second = problem(Function(V).assign(2.0))
        assert second is not first and (first.dat.data_ro == kept).all()
        first.assign(np.nan)
        np.testing.assert_array_equal(problem(m).dat.data_ro, kept)


# --- families of sensors

@pytest.mark.parametrize("given, words", [
    (dict(std=True), "std holds bool values"), (dict(std="0.1"), "std holds <U3 values"),
    (dict(std={"a": 1}), "std holds object values"), (dict(std=GaussianNoise(std=0.1)), "std holds object values"),
    (dict(std=np.nan), "not finite"), (dict(std=-1), "must be positive"), (dict(std=[1, 2, 3.0]), "std has the shape"),
    (dict(count={1, 2}), "fewest and the most"), (dict(count={1: 1, 2: 2}), "fewest and the most"),
    (dict(count=(True, 2)), r"count\[0\] is True"), (dict(count=(1.0, 2)), r"count\[0\] is 1.0"),
    (dict(count=(2, 1)), "candidates"), (dict(series=True), "series is True"), (dict(series=2.0), "series is 2.0"),
])
def test_bad_kinds_of_sensors(given, words):
    with pytest.raises(InputError, match=words):
        SensorKind(**dict(observation=SENSORS, std=0.1, count=(1, 2)) | given)


@pytest.mark.parametrize("kinds", [None, 3, "no", SENSORS, [SENSORS], {}, Constant(1.0)])
def test_bad_families(kinds):
    with pytest.raises(InputError, match="made of SensorKinds: give at least one"):
        SensorFamily(kinds)


def test_a_kind_of_sensor_keeps_its_own_numbers():
    std = np.full(4, 0.1)
    kind = SensorKind(SENSORS, std, np.array([1, 2]), np.int64(2))
    std[:] = 7.0
    assert (kind.std_range == 0.1).all() and kind.count == (1, 2) and kind.series == 2


# --- densities

FORM = variance_exploding()
MIX = GaussianMixture([0.5, 0.5], [[0.2, 0.2], [0.8, 0.8]], [0.1, 0.1])
DENSITY = Function(V).interpolate(exp(-X[0]))


def carry(**given):
    return forward_density(**dict(p=DENSITY, formulation=FORM, times=[0.0, 0.1, 0.2]) | given)


def back(**given):
    return reverse_density(**dict(p=DENSITY, formulation=FORM, times=[0.2, 0.0], score=MIX.score, alpha=1) | given)


@pytest.mark.parametrize("call, words", [
    (lambda: carry(p=NAN), "the density is not finite"),
    (lambda: carry(formulation="variance_exploding"), "give a Formulation"),
    (lambda: carry(formulation=variance_exploding), "give a Formulation"),
    (lambda: carry(times=["0", "0.5"]), "times holds <U3"), (lambda: carry(times=[0.0, np.nan]), "not finite"),
    (lambda: carry(theta=True), "theta is True"), (lambda: carry(theta="0.5"), "theta is '0.5'"),
    (lambda: carry(solver_parameters={"ksp_type": "cgg"}), "PETSc refuses"),
    (lambda: carry(options_prefix=0), "options_prefix"), (lambda: carry(monitor=0), "monitor is 0"),
    (lambda: carry(monitor=lambda: 1), "monitor does not take 2 arguments"),
    (lambda: carry(progress="no"), "progress is 'no': give True or False"),
    (lambda: back(score=None), "score is None"), (lambda: back(score=DENSITY), "score is"),
    (lambda: back(score=lambda xi: xi), "score does not take 3 arguments"), (lambda: back(alpha=None), "alpha is None"),
    (lambda: back(alpha=np.nan), "alpha is nan"), (lambda: back(alpha="1"), "alpha is '1'"),
    (lambda: noise_times(FORM, True, 2), "sigma is True"), (lambda: noise_times(FORM, 0.5, 2.0), "steps is 2.0"),
    (lambda: noise_times(None, 0.5, 2), "give a Formulation"),
    (lambda: GaussianMixture([0.5, 0.5], [[0.0], [np.nan]], [1, 1]), "means holds .*not finite"),
    (lambda: GaussianMixture([1.0], [[0.0]], ["1"]), "stds holds <U1 values"),
    (lambda: GaussianMixture([1.0], [[0.0]], [np.inf]), "stds holds .*not finite"),
    (lambda: GaussianMixture([1.0], np.zeros((1, 0)), [1.0]), r"the shapes \(k,\), \(k, d\)"),
    (lambda: MIX.density(np.zeros((2, 3))), r"xi has the shape \(2, 3\)"), (lambda: MIX.density(None), "xi holds"),
    (lambda: MIX.score(DENSITY), "2 dimensions"), (lambda: MIX.score(np.zeros((1, 2)), "a"), "a is 'a'"),
    (lambda: MIX.score(np.zeros((1, 2)), 1.0, -1.0), "s is -1.0"),
    (lambda: MIX.score(np.zeros((1, 2)), 0.0, 0.0), "both zero"),
    (lambda: MIX.sample(0, 0), "n is 0"), (lambda: MIX.sample(2, None), "seed is None"),
    (lambda: MIX.sample(2, 1.5), "seed is 1.5"), (lambda: MIX.sample(2, -1), "seed is -1"),
])
def test_bad_arguments_of_densities(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_monitor_may_write_into_what_it_gets_and_a_mixture_keeps_its_numbers():
    right = carry().dat.data_ro
    seen = []

    def monitor(t, p):
        seen.append(p)
        p.assign(0)
    assert (carry(monitor=monitor, theta=np.float64(0.5), progress=np.False_).dat.data_ro == right).all()
    assert len({id(p) for p in seen}) == 3 and right.max() > 0
    means = np.array([[0.2, 0.2], [0.8, 0.8]])
    mix = GaussianMixture([0.5, 0.5], means, [0.1, 0.1])
    means[:] = 9.0
    place = np.array([[0.2, 0.3]])
    assert mix.density(place) == MIX.density(place.tolist()) and mix != MIX
    np.testing.assert_array_equal(mix.sample(np.int64(3), np.int64(1)), MIX.sample(3, 1))
    np.testing.assert_array_equal(noise_times(FORM, np.float32(0.5), np.int64(2)), noise_times(FORM, 0.5, 2))
