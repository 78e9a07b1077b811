"""The diffusion models are the PDEs they are said to be: exact densities, particles, rates; wrong ones fail."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from firedrake import (
    COMM_SELF, COMM_WORLD, Constant, Function, FunctionSpace, IntervalMesh, RectangleMesh, SpatialCoordinate,
    TestFunction, UnitDiskMesh, UnitIcosahedralSphereMesh, VectorFunctionSpace, as_vector, assemble, dx, exp, sqrt,
    tanh,
)
from scipy.stats import chi2

from fem_diffusion.diffusion import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.density_pde import GaussianMixture, forward_density, noise_times, reverse_density

MINE = Formulation(
    "mine",
    variance=lambda t: 2500 * t**2,
    scaling=lambda t: (1 + (50 * t)**3)**(1 / 3),
)
COSINE, VE, STRAIGHT = variance_preserving(schedule="cosine"), variance_exploding(), straight_line()
ALL = [VE, variance_exploding(schedule="linear"), variance_preserving(), COSINE, sub_variance_preserving(), STRAIGHT,
       constant_moment(0.3), MINE]
every_formulation = pytest.mark.parametrize("formulation", ALL, ids=lambda f: f.name)
ALPHAS = [0, 0.5, 1, 2]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)

# Three unequal modes on the line; an open ring of six in the plane.
ANGLES = np.linspace(-0.5, 3.6, 6)
MIXTURES = {1: GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.3], [2.0]], [0.45, 0.3, 0.4]),
            2: GaussianMixture(np.array([1, 2, 3, 3, 2, 1]) / 12,
                               1.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), [0.45] * 6)}
SIGMA = {1: 2.0, 2: 1.0}  # noise level at the final time


class Wrong:
    """A formulation with one coefficient multiplied by a factor."""

    def __init__(self, formulation, name, factor):
        self.formulation, self.name, self.factor = formulation, name, factor

    def __getattr__(self, name):
        method = getattr(self.formulation, name)
        return (lambda t: self.factor * method(t)) if name == self.name else method


class Case:
    """A mixture under a formulation on a mesh that its densities do not reach the end of, and the exact solution."""

    def __init__(self, formulation, dim=1, cells=150, steps=80, degree=2, comm=COMM_WORLD):
        self.mixture, self.formulation = MIXTURES[dim], formulation
        self.times = noise_times(formulation, SIGMA[dim], steps)
        a, s = (factor(torch.as_tensor(self.times)).numpy() for factor in (formulation.a, formulation.s))
        self.start, self.end = (a[0], s[0]), (a[-1], s[-1])
        width = float((a * 2 + (6 if dim == 1 else 5) * np.sqrt(a**2 * 0.45**2 + s**2)).max())
        self.V = FunctionSpace(box(dim, cells, width, comm), "CG", degree)
        self.xi = SpatialCoordinate(self.V.mesh())

    def exact(self, a, s):
        return self.mixture.density(self.xi, Constant(a), Constant(s))

    def error(self, p, a, s):
        """Relative L2 error."""
        exact, measure = self.exact(a, s), dx(degree=10)
        return sqrt(assemble((p - exact)**2 * measure) / assemble(exact**2 * measure))

    def forward(self, formulation=None):
        p = Function(self.V).interpolate(self.exact(*self.start))
        return forward_density(p, formulation or self.formulation, self.times)

    def forward_error(self, formulation=None):
        return self.error(self.forward(formulation), *self.end)

    def reverse(self, alpha, factor=1.0):
        p = Function(self.V).interpolate(self.exact(*self.end))
        return reverse_density(p, self.formulation, self.times[::-1],
                               lambda xi, a, s: factor * self.mixture.score(xi, a, s), alpha)

    def reverse_error(self, alpha, factor=1.0):
        return self.error(self.reverse(alpha, factor), *self.start)


def box(dim, cells, width, comm=COMM_WORLD, **kwargs):
    """The interval or square of half the given width around the origin."""
    if dim == 1:
        return IntervalMesh(cells, -width, width, comm=comm)
    return RectangleMesh(cells, cells, width, width, -width, -width, comm=comm, **kwargs)


# --- against the exact solution

@every_formulation
def test_forward_density_is_the_law_of_the_noisy_data(formulation):
    case = Case(formulation)
    assert case.forward_error() < 2e-4
    assert case.forward_error(Wrong(formulation, "g", 1.1)) > 1e-2
    if not formulation.name.startswith("VE"):
        assert case.forward_error(Wrong(formulation, "b", -1)) > 1e-1


@every_formulation
@every_alpha
def test_reverse_density_returns_the_initial_one(formulation, alpha):
    case = Case(formulation)
    assert case.reverse_error(alpha) < 5e-3


@every_formulation
def test_reverse_density_needs_the_right_score_and_diffusion(formulation):
    case = Case(formulation)
    for alpha in (0, 1):
        assert case.reverse_error(alpha, factor=1.2) > 5e-2
    # alpha = 0 with twice the score is the drift of alpha = 1 without its diffusion.
    assert case.reverse_error(0, factor=2.0) > 1e-1


@pytest.mark.parametrize("formulation", [f if f is COSINE else pytest.param(f, marks=pytest.mark.slow) for f in ALL],
                         ids=lambda f: f.name)
def test_plane(formulation):
    # Variance exploding densities spread over a wider box, so their cells are larger.
    case = Case(formulation, dim=2, cells=28 if formulation is COSINE else 40, steps=24)
    assert case.forward_error() < 2e-3
    assert case.forward_error(Wrong(formulation, "g", 1.1)) > 1e-2
    for alpha in ALPHAS:
        assert case.reverse_error(alpha) < 1.5e-2, alpha
    assert case.reverse_error(1, factor=1.2) > 5e-2


# --- rates

# Continuous elements of even degree lose an order where there is no diffusion: known of Galerkin's method.
SPACE_ORDER = {("forward", 1): 2, ("forward", 2): 3, (0, 1): 2, (0, 2): 2, (1, 1): 2, (1, 2): 3}


def _rates(errors):
    return np.log2(np.array(errors[:-1]) / errors[1:])


def _error(way, *args, **kwargs):
    case = Case(*args, **kwargs)
    return case.forward_error() if way == "forward" else case.reverse_error(way)


@pytest.mark.parametrize("way, degree", SPACE_ORDER)
def test_order_in_space(way, degree):
    errors = [_error(way, COSINE, cells=cells, steps=240, degree=degree) for cells in (60, 120)]
    assert _rates(errors) == pytest.approx(SPACE_ORDER[way, degree], abs=0.2)


@pytest.mark.parametrize("way", ["forward", 0, 1])
def test_order_in_time(way):
    errors = [_error(way, COSINE, cells=150, steps=steps, degree=3) for steps in (10, 20, 40)]
    assert _rates(errors) == pytest.approx(2, abs=0.2)


@pytest.mark.slow
@every_formulation
def test_orders_of_every_formulation(formulation):
    for way in ["forward", *ALPHAS]:
        errors = [_error(way, formulation, cells=cells, steps=1200) for cells in (100, 200)]
        assert _rates(errors)[-1] > (1.85 if way == 0 else 2.5), (way, errors)
        errors = [_error(way, formulation, cells=300, steps=steps, degree=3) for steps in (80, 160)]
        assert _rates(errors)[-1] == pytest.approx(2, abs=0.2), (way, errors)


@pytest.mark.slow
@pytest.mark.parametrize("formulation", [COSINE, STRAIGHT, VE], ids=lambda f: f.name)
def test_orders_in_the_plane(formulation):
    for way in ["forward", *ALPHAS]:
        errors = [_error(way, formulation, dim=2, cells=cells, steps=2 * cells, degree=1) for cells in (24, 48, 96)]
        assert _rates(errors)[-1] == pytest.approx(2, abs=0.25), (way, errors)


# --- against particles

def smooth_box():
    """Density and sampler of a uniform variable on [-1.5, 1.5] plus a logistic one: no mixture of Gaussians."""
    def draw(n, rng):
        return (rng.uniform(-1.5, 1.5, n) + rng.logistic(0, 0.1, n))[:, None]
    return lambda xi: (tanh((xi[0] + 1.5) / 0.2) - tanh((xi[0] - 1.5) / 0.2)) / 6, draw


def banana():
    """Density and sampler of a bent Gaussian in the plane."""
    def draw(n, rng):
        first = 0.8 * rng.standard_normal(n)
        return np.stack([first, 0.6 * (first**2 - 0.64) + 0.4 * rng.standard_normal(n)], axis=1)

    def density(xi):
        bent = xi[1] - 0.6 * (xi[0]**2 - 0.64)
        return exp(-xi[0]**2 / (2 * 0.64) - bent**2 / (2 * 0.16)) / (2 * np.pi * 0.8 * 0.4)
    return density, draw


def particles(formulation, times, xi, rng):
    """Forward SDE dξ = -b ξ dt + sqrt(g) dW by Euler-Maruyama steps, coefficients at the middle of each step."""
    middle, steps = torch.as_tensor((times[1:] + times[:-1]) / 2), np.diff(times)
    for b, g, dt in zip(formulation.b(middle).numpy(), formulation.g(middle).numpy(), steps):
        xi = xi - b * dt * xi + np.sqrt(g * dt) * rng.standard_normal(xi.shape)
    return xi


def chi_square(p, xi, edges):
    """p-value of the hypothesis that particles xi (n, d) are draws from p, over a grid of bins that unite cells.

    Under the hypothesis the counts are multinomial; bins that expect fewer than 10 particles are united with the
    outside.
    """
    mesh = p.function_space().mesh()
    masses = assemble(p * TestFunction(FunctionSpace(mesh, "DG", 0)) * dx).dat.data_ro
    centres = Function(VectorFunctionSpace(mesh, "DG", 0)).interpolate(SpatialCoordinate(mesh)).dat.data_ro
    edges = [edges] * xi.shape[1]
    expected = np.histogramdd(centres.reshape(len(masses), -1), edges, weights=masses)[0].ravel() * len(xi)
    counts = np.histogramdd(xi, edges)[0].ravel()
    kept = expected >= 10
    expected, counts = (np.append(v[kept], len(xi) - v[kept].sum()) for v in (expected, counts))
    return chi2.sf(((counts - expected)**2 / np.maximum(expected, 1)).sum(), kept.sum())


def mixture(dim):
    return MIXTURES[dim].density, lambda n, rng: MIXTURES[dim].sample(n, seed=7)


DATA = {"modes": (1, mixture(1)), "box": (1, smooth_box()), "ring": (2, mixture(2)), "banana": (2, banana())}
QUICK = {1: (VE, COSINE, STRAIGHT, MINE), 2: (VE, STRAIGHT)}
PARTICLES = [pytest.param(f, name, marks=[] if f in QUICK[dim] else pytest.mark.slow)
             for name, (dim, _) in DATA.items() for f in ALL]


@pytest.mark.parametrize("formulation, name", PARTICLES, ids=lambda value: getattr(value, "name", value))
def test_forward_density_is_the_histogram_of_particles(formulation, name):
    dim, (density, draw) = DATA[name]
    n, rng = 100_000, np.random.default_rng(11)
    cells, width = {1: (240, 12.0), 2: (32, 7.0)}[dim]
    mesh = box(dim, cells, width, **({"quadrilateral": True} if dim == 2 else {}))
    p = Function(FunctionSpace(mesh, "CG" if dim == 1 else "Q", 2)).interpolate(density(SpatialCoordinate(mesh)))
    times = noise_times(formulation, SIGMA[dim], 20)
    xi = particles(formulation, noise_times(formulation, SIGMA[dim], 160), draw(n, rng), rng)
    edges = np.linspace(-width, width, {1: 80, 2: 32}[dim] + 1)
    assert chi_square(forward_density(p, formulation, times), xi, edges) > 1e-3
    assert chi_square(forward_density(p, Wrong(formulation, "g", 1.1), times), xi, edges) < 1e-9


# --- what holds on any mesh, and what is refused

@every_alpha
def test_mass_is_conserved_even_where_the_density_reaches_the_boundary(alpha):
    V = FunctionSpace(UnitDiskMesh(2), "CG", 2)
    x = SpatialCoordinate(V.mesh())
    p = Function(V).interpolate(1 + x[0] + exp(-x[1]))
    times = noise_times(STRAIGHT, 1.0, 20)
    q = forward_density(p, STRAIGHT, times)
    r = reverse_density(q, STRAIGHT, times[::-1], MIXTURES[2].score, alpha)
    mass = assemble(p * dx)
    assert assemble(q * dx) == pytest.approx(mass, rel=1e-10)
    assert assemble(r * dx) == pytest.approx(mass, rel=1e-10)


def test_monitor_sees_every_step_and_the_initial_density_stays():
    case, seen = Case(COSINE, cells=20, steps=5), []
    p = Function(case.V).interpolate(case.exact(*case.start))
    before = p.copy(deepcopy=True)

    def monitor(t, p):
        seen.append((t, assemble(p**2 * dx)))
    q = forward_density(p, COSINE, case.times, monitor=monitor, progress=True)
    assert [t for t, _ in seen] == list(case.times)
    assert seen[0][1] == assemble(p**2 * dx) and seen[-1][1] == assemble(q**2 * dx)
    assert (p.dat.data_ro == before.dat.data_ro).all()


def test_theta_and_solver_parameters_are_used():
    case = Case(COSINE, cells=60, steps=20)
    p = Function(case.V).interpolate(case.exact(*case.start))
    implicit = forward_density(p, COSINE, case.times, theta=1.0)
    assert 10 * case.forward_error() < case.error(implicit, *case.end) < 0.1
    iterative = forward_density(p, COSINE, case.times, solver_parameters="iterative")
    assert case.error(iterative, *case.end) == pytest.approx(case.forward_error(), rel=1e-6)
    with pytest.raises(SolveError, match="smaller steps"):
        forward_density(p, COSINE, case.times, solver_parameters={"ksp_type": "richardson", "pc_type": "none",
                                                                  "ksp_max_it": 2})


def test_mixture_means_the_same_to_numpy_and_ufl():
    for dim, mix in MIXTURES.items():
        mesh = box(dim, 6, 2.5)
        xi = Function(VectorFunctionSpace(mesh, "CG", 1)).interpolate(SpatialCoordinate(mesh)).dat.data_ro
        xi = xi.reshape(-1, dim)
        density = Function(FunctionSpace(mesh, "CG", 1)).interpolate(mix.density(SpatialCoordinate(mesh), 0.7, 0.4))
        score = Function(VectorFunctionSpace(mesh, "CG", 1)).interpolate(mix.score(SpatialCoordinate(mesh), 0.7, 0.4))
        np.testing.assert_allclose(mix.density(xi, 0.7, 0.4), density.dat.data_ro, rtol=1e-12)
        np.testing.assert_allclose(mix.score(xi, 0.7, 0.4), score.dat.data_ro.reshape(-1, dim), rtol=1e-10, atol=1e-12)
        # The score is the slope of the logarithm, also where every component underflows.
        step = 1e-6 * np.eye(dim)
        slope = [np.log(mix.density(xi + h, 0.7, 0.4) / mix.density(xi - h, 0.7, 0.4)) / 2e-6 for h in step]
        np.testing.assert_allclose(mix.score(xi, 0.7, 0.4), np.stack(slope, axis=1), atol=1e-6)
        assert np.isfinite(mix.score(1000 * xi)).all()


LINE = FunctionSpace(IntervalMesh(4, -1, 1), "CG", 1)
P, UP, DOWN = Function(LINE), [0.0, 0.5], [0.5, 0.0]


@pytest.mark.parametrize("call, words", [
    (lambda: forward_density(1.0, VE, UP), "scalar Function"),
    (lambda: forward_density(Function(FunctionSpace(LINE.mesh(), "DG", 1)), VE, UP), "continuous space"),
    (lambda: forward_density(Function(FunctionSpace(UnitIcosahedralSphereMesh(0), "CG", 1)), VE, UP), "fills its"),
    (lambda: forward_density(P, VE, DOWN), "increasing"), (lambda: forward_density(P, VE, [0.5]), "at least two"),
    (lambda: forward_density(P, VE, [0.0, 1.5]), r"\[0, 1\]"), (lambda: forward_density(P, VE, UP, theta=0.4), "theta"),
    (lambda: forward_density(P, VE, UP, solver_parameters="fast"), "solver_parameters"),
    (lambda: reverse_density(P, VE, UP, MIXTURES[1].score, 1), "decreasing"),
    (lambda: reverse_density(P, VE, DOWN, MIXTURES[1].score, -1), "alpha"),
    (lambda: reverse_density(P, VE, DOWN, MIXTURES[2].score, 1), "2 dimensions"),
    (lambda: reverse_density(P, VE, DOWN, lambda xi, a, s: as_vector([xi[0], s]), 1), "shape"),
    (lambda: reverse_density(P, VE, DOWN, lambda xi, a, s: 0.0, 1), "as_vector"),
    (lambda: noise_times(VE, 200.0, 10), "sigma is 200.0: .*at most"), (lambda: noise_times(VE, 1.0, 0), "steps is 0"),
    (lambda: GaussianMixture([1.0], [0.0], [1.0]), r"means .*\(k, d\)"),
    (lambda: GaussianMixture([0.5], [[0.0]], [1.0]), "sum to 1"),
])
def test_wrong_input_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parallel(2)
def test_two_ranks():
    assert COMM_WORLD.size == 2
    for dim, cells, ways in ((1, 60, ("forward", 0)), (2, 12, (1,))):
        spread, alone = (Case(COSINE, dim, cells, steps=2, comm=comm) for comm in (COMM_WORLD, COMM_SELF))
        for way in ways:
            values = [[assemble(f * dx) for f in (p, p**2, p * exp(case.xi[0]))]
                      for case in (spread, alone) for p in [case.forward() if way == "forward" else case.reverse(way)]]
            np.testing.assert_allclose(*values, rtol=1e-9)


# --- the demo

def test_demo_leaves_its_pictures_and_table(tmp_path):
    file = Path(__file__).parent.parent / "demos" / "diffusion_as_pde" / "diffusion_as_pde.py"
    specification = importlib.util.spec_from_file_location("diffusion_as_pde", file)
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    table = demo.run(tmp_path, progress=False, coarse=True)
    assert len(table) == len(demo.FORMULATIONS)
    for name, forward, *returned in table:
        assert forward < 0.01 and len(returned) == len(demo.ALPHAS) and max(returned) < 0.1, name
    for picture in ("forward", "reverse", "plane", "refinement"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10000
