"""Bad arguments of references and reports get an error of ours with a remedy; NumPy's numbers are good."""

import re

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, exp

from fem_diffusion.comparison import convergence, plot_costs, plot_overview, summarise, write_csv, write_markdown
from fem_diffusion.reference.finite_element import exact_posterior, hmc_posterior
from fem_diffusion.diffusion import CallableNoise, GaussianNoise
from fem_diffusion.errors import FileError, InputError
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.prior.product import ProductPrior
from test_doors import MESH, SENSORS, SIZE, V, steady, transient

PRIOR = GaussianPrior(V, 1.0, 0.5)
READINGS = np.array([0.1, 0.0, -0.1, 0.2])


@pytest.fixture(scope="module")
def problems():
    return steady(), transient()


@pytest.fixture(scope="module")
def basis():
    return karhunen_loeve(PRIOR, 4)


@pytest.fixture(scope="module")
def exact(problems):
    return lambda **given: exact_posterior(**dict(prior=PRIOR, forward=problems[0], observation=SENSORS, noise_std=0.1)
                                           | given)


@pytest.fixture(scope="module")
def chains(problems, basis):
    return lambda **given: hmc_posterior(**dict(
        basis=basis, forward=problems[0], observation=SENSORS, y=READINGS, noise_std=0.1, seed=0, chains=4, draws=2,
        leaps=2) | given)


NOISE = [
    (None, "noise_std holds object"), ("0.1", "noise_std holds <U3"), (True, "noise_std holds bool"),
    ([0.1, np.nan, 0.1, np.inf], f"noise_std holds values of {SENSORS.names[1]}, {SENSORS.names[3]} that"),
    ([0.1, 0.0, 0.1, -0.1], f"not positive for {SENSORS.names[1]}, {SENSORS.names[3]}: give every sensor noise"),
    (0.0, "not positive"), ([0.1] * 3, "noise_std has the shape (3,)"), (np.eye(4), "noise_std has the shape"),
    (GaussianNoise(std=np.full(3, 0.1)), "3"), (GaussianNoise(std=0.1, relative=0.1), "relative or correlated"),
    (GaussianNoise(covariance=np.eye(4) + 0.5), "relative or correlated"),
    (CallableNoise(lambda y, generator: y), "is a CallableNoise"),
]


@pytest.mark.parametrize("noise, words", NOISE)
def test_bad_noise_of_references(exact, chains, noise, words):
    for reference in (exact, chains):
        with pytest.raises(InputError, match=re.escape(words)):
            reference(noise_std=noise)


@pytest.mark.parametrize("y, words", [
    ([0, np.nan, 0, np.inf], f"y holds values of {SENSORS.names[1]}, {SENSORS.names[3]} that are not finite"),
    ([0.0] * 3, "y has the shape (3,): give (4,)"), (np.zeros((1, 4)), "y has the shape (1, 4)"),
    (0.0, "y has the shape ()"), (READINGS * 1j, "y holds complex128 values"), (["a"] * 4, "y holds <U1"),
    (None, "y holds object"), ([True] * 4, "y holds bool"),
])
def test_bad_measurements_of_references(exact, chains, y, words):
    posterior = exact()
    for call in (posterior.mean, lambda y: posterior.sample(2, y, 0), lambda y: chains(y=y)):
        with pytest.raises(InputError, match=re.escape(words)):
            call(y)


def test_other_bad_arguments_of_references(exact, chains, basis, problems):
    sensors2 = point_sensors(FunctionSpace(MESH, "CG", 2), [(0.2, 0.2)])
    for call, words in [
            (lambda: exact(prior=None), "give a GaussianPrior"), (lambda: exact(prior=basis), "give a GaussianPrior"),
            (lambda: exact(prior=TransformedPrior(PRIOR, exp)), "give a GaussianPrior"),
            (lambda: exact(forward=lambda m: m), "without sensitivity"),
            (lambda: exact(observation=SENSORS.rows), "observation is of type csr_matrix"),
            (lambda: exact(observation=sensors2), "build it on forward.U"),
            (lambda: chains(observation=sensors2), "build it on forward.U"),
            (lambda: chains(basis=PRIOR), "give karhunen_loeve"), (lambda: chains(forward=None), "NoneType"),
            (lambda: chains(slope=None), "slope is None"), (lambda: chains(slope=lambda m: m[:, :3]), "slope returned"),
            (lambda: chains(seed=None), "seed is None"), (lambda: chains(seed=True), "seed is True"),
            (lambda: chains(chains=1), "chains is 1: give an integer of at least 2"),
            (lambda: chains(draws=2.0), "draws is 2.0"), (lambda: chains(leaps=True), "leaps is True"),
            (lambda: chains(step=0), "step is 0"), (lambda: chains(progress="no"), "progress is 'no'"),
            (lambda: exact().sample(0, READINGS, 0), "n is 0"), (lambda: exact().sample(2, READINGS, 1.5), "seed is")]:
        with pytest.raises(InputError, match=words):
            call()


def test_noise_models_and_numbers_of_numpy_mean_the_same_to_references(exact, chains):
    right, moments = exact().mean(READINGS), chains().mean
    for noise in (np.float32(0.1), np.array(0.1), [0.1] * 4, GaussianNoise(std=0.1), GaussianNoise(std=[0.1] * 4)):
        posterior = exact(noise_std=noise)
        np.testing.assert_allclose(posterior.mean(READINGS.tolist()), right, rtol=1e-6)
        np.testing.assert_allclose(chains(noise_std=noise).mean, moments, atol=1e-6)
    np.testing.assert_array_equal(posterior.sample(np.int64(2), READINGS, np.int64(1)),
                                  posterior.sample(2, READINGS, 1))


class Careless:
    """A solver of the user's own, which writes into what it gets and returns the same objects each time."""

    def __init__(self, problem):
        self.problem, self.state = problem, Function(problem.V)
        self.rows = np.empty((len(SENSORS), SIZE))

    def __call__(self, m):
        self.state.assign(self.problem(m))
        m.assign(9.0)
        return self.state

    def sensitivity(self, m, rows):
        self.rows[:] = self.problem.sensitivity(m, rows)
        m.assign(9.0)
        return self.rows

    def solve_many(self, ms):
        states = self.problem.solve_many(ms)
        ms[:] = 9.0
        return states


def test_a_careless_solver_spoils_no_reference(exact, chains, problems):
    def slope(m):
        factor = np.ones_like(m)
        m[:] = 9.0
        return factor
    careless, mean = Careless(problems[0]), PRIOR.mean.dat.data_ro.copy()
    np.testing.assert_allclose(exact(forward=careless).mean(READINGS), exact().mean(READINGS), rtol=1e-12)
    assert (PRIOR.mean.dat.data_ro == mean).all()
    np.testing.assert_allclose(chains(forward=careless, slope=slope).mean, chains().mean, rtol=1e-12)


def test_a_product_of_priors_has_an_exact_posterior_too(problems):
    """Its own source and a flux: the mean is that of the Kalman formula with dense matrices."""
    prior = ProductPrior([PRIOR, GaussianPrior(V, 0.5, 0.3)])
    forward = AdvectionDiffusion(V, prior.V, ["source", ("flux", 2)], bcs=Boundary(dirichlet={1: 0}))
    posterior = exact_posterior(prior, forward, SENSORS, 0.1)
    A, C = forward.sensitivity(prior.mean, SENSORS.rows), prior.apply_covariance(np.eye(2 * SIZE))
    gain = C @ A.T @ np.linalg.inv(A @ C @ A.T + 0.01 * np.eye(4))
    np.testing.assert_allclose(posterior.mean(READINGS), gain @ READINGS, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(posterior.std**2, np.diag(C - gain @ A @ C), rtol=1e-6)


def row(sampler="a", budget=8, seed=0, **more):
    return dict(problem="p", base="gaussian", formulation="VP", sampler=sampler, budget=budget, alpha=0.0,
                coordinates="plain", nodes="n", evaluations=8, seed=seed, seconds=1.0, c2st=1.0, c2st_floor=0.5) | more


ROWS = [row(), row(seed=1), row("adaptive", 0), row("adaptive", 0, 1)]


@pytest.mark.parametrize("call", [
    lambda rows, path: summarise(rows), lambda rows, path: convergence(rows, "c2st"),
    lambda rows, path: write_markdown(rows, path, "c2st"),
    lambda rows, path: plot_costs(rows, "c2st", path, formulation="VP"),
    lambda rows, path: plot_overview(rows, "c2st", path)])
def test_bad_rows_of_reports(call, tmp_path):
    for rows, words in [(None, "of type NoneType"), ([], "There are no rows"), ([None], "they are no dicts"),
                        (ROWS[0], "of type dict"), ([{"problem": "p"}], "Row 0 lacks base"),
                        ([*ROWS, row(extra=1.0)], "Row 4 has other columns"),
                        ([row(c2st="x")], "Row 0 has 'x' for c2st"), ([row(budget=None)], "Row 0 has None for budget")]:
        with pytest.raises(InputError, match=words):
            call(rows, tmp_path / "file.png")


def test_other_bad_arguments_of_reports(tmp_path):
    path = tmp_path / "file.png"
    for call, words in [
            (lambda: convergence(ROWS, "mmd"), "score is 'mmd': choose one of 'c2st'"),
            (lambda: convergence(ROWS, None), "score is None"),
            (lambda: convergence(ROWS, "c2st", reference="adaptiv"), "sampler is 'adaptiv'"),
            (lambda: convergence(ROWS, "c2st", tolerance="small"), "tolerance"),
            (lambda: write_markdown(ROWS, path, "c2st", budget=9), "budget is 9: the rows have 0, 8"),
            (lambda: write_markdown(ROWS, path, "c2st", budget=8.0), "budget is 8.0"),
            (lambda: write_csv([], path), "no rows"), (lambda: write_csv([{}], path), "no rows"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VE"), "formulation is 'VE': choose one of 'VP'"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VP", base="plain"), "base is 'plain'"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VP", title=3), "title is of type int"),
            (lambda: plot_overview(ROWS, "c2st_floor", path), "no c2st_floor_floor"),
            (lambda: write_csv(ROWS, None), "path is None"), (lambda: write_csv(ROWS, "a\0b"), "path is")]:
        with pytest.raises(InputError, match=words):
            call()
    path.write_text("")
    for bad, words in [(tmp_path / "none" / "a.png", "none is no folder: make it first"), (tmp_path, "is a folder"),
                       (path / "a.png", "is no folder")]:
        for call in (lambda: write_csv(ROWS, bad), lambda: write_markdown(ROWS, bad, "c2st"),
                     lambda: plot_costs(ROWS, "c2st", bad, formulation="VP"),
                     lambda: plot_overview(ROWS, "c2st", bad)):
            with pytest.raises(FileError, match=words):
                call()
    assert path.read_text() == "" and list(tmp_path.iterdir()) == [path]
