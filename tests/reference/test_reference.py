"""References in latents: units do not matter, functions of the user may write into what they get."""

import numpy as np
import pytest

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.reference import HMCResult, gauss_newton, hmc, linear_gaussian_posterior
from fem_diffusion.errors import InputError

R, K = 4, 3


def _linear():
    """Operator, prior covariance, noise covariance and innovation."""
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((2, R, R))
    return (rng.standard_normal((K, R)), roots[0] @ roots[0].T, (roots[1] @ roots[1].T)[:K, :K] / 10,
            rng.standard_normal(K))


def test_the_exact_posterior_knows_no_units():
    B, C, noise, innovation = _linear()
    # The precision form of Bayes' formula.
    precision = np.linalg.inv(C) + B.T @ np.linalg.solve(noise, B)
    exact = np.linalg.solve(precision, B.T @ np.linalg.solve(noise, innovation))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        latents, sensors = (10**rng.permutation(np.linspace(-8, 8, n)) for n in (R, K))
        mean, covariance = linear_gaussian_posterior(
            sensors[:, None] * B / latents, C * np.outer(latents, latents), noise * np.outer(sensors, sensors),
            sensors * innovation)
        np.testing.assert_allclose(mean / latents, exact, rtol=1e-8)
        np.testing.assert_allclose(covariance / np.outer(latents, latents), np.linalg.inv(precision), rtol=1e-7)


def test_moments_and_chains_know_no_units():
    C = _linear()[1]
    unit, precision = np.array([1e8, 1e-8, 1e3, 1e-4]), np.linalg.inv(C)
    draws = np.random.default_rng(1).multivariate_normal(np.zeros(R), C, 300)
    np.testing.assert_allclose(moment_p_values(draws * unit, np.zeros(R), C * np.outer(unit, unit)),
                               moment_p_values(draws, np.zeros(R), C), rtol=1e-6)

    def chains(unit):
        return hmc(lambda z: ((z / unit) @ precision * (z / unit)).sum(1) / 2, lambda z: (z / unit) @ precision / unit,
                   np.zeros(R), precision / np.outer(unit, unit), chains=50, draws=20, warmup=5).samples / unit
    np.testing.assert_allclose(chains(unit), chains(np.ones(R)), rtol=1e-6, atol=1e-8)
    assert min(moment_p_values(chains(unit)[:, -1], np.zeros(R), C)) > 1e-4


def test_functions_may_write_into_what_they_get_and_return_one_array_every_time():
    answers = {}

    def rude(function):
        def result(z):
            value = function(z.copy())
            z[...] = 7.0
            parts = value if isinstance(value, tuple) else (value,)
            kept = answers.setdefault(function, [np.empty_like(part) for part in parts])
            for array, part in zip(kept, parts):
                array[...] = part
            return tuple(kept) if isinstance(value, tuple) else kept[0]
        return result

    def linearise(z):
        return np.exp(z[:2]) + z[2] - 2, np.array([[np.exp(z[0]), 0, 1], [0, np.exp(z[1]), 1]])

    def potential(z):
        # A steep wall: the energies of the first draw decide.
        return 20 * (z**2).sum(axis=1)**2

    def gradient(z):
        return 80 * z * (z**2).sum(axis=1, keepdims=True)
    for one, other in zip(gauss_newton(rude(linearise), 3), gauss_newton(linearise, 3)):
        np.testing.assert_array_equal(one, other)
    settings = {"centre": np.zeros(2), "hessian": 9 * np.eye(2), "chains": 40, "draws": 3, "warmup": 0}
    one, other = hmc(rude(potential), rude(gradient), **settings), hmc(potential, gradient, **settings)
    np.testing.assert_array_equal(one.samples, other.samples)
    assert 0.2 < one.acceptance == other.acceptance < 1
    result = HMCResult(other.samples.copy(), 1.0)
    for one, other in zip(result.moments(rude(np.exp)), result.moments(np.exp)):
        np.testing.assert_array_equal(one, other)


def _energy(z):
    return (z**2).sum(axis=1) / 2


@pytest.mark.parametrize("call, words", [
    (lambda: linear_gaussian_posterior(np.ones((K, R)), np.eye(R), np.eye(R), np.ones(K)), r"give \(3, 3\)"),
    (lambda: linear_gaussian_posterior(np.ones((K, R)), np.eye(R), np.zeros((K, K)), np.ones(K)), "positive definite"),
    (lambda: linear_gaussian_posterior(np.ones((K, R)), np.eye(R), np.eye(K), 1j * np.ones(K)), "real and imaginary"),
    (lambda: gauss_newton(None, 3), "linearise is None"), (lambda: gauss_newton(lambda z: z, 3), "return misfit"),
    (lambda: gauss_newton(lambda z: (z, z), 3), r"\(3, 3\)"), (lambda: gauss_newton(lambda z: (z, z), 3.0), "r is 3.0"),
    (lambda: gauss_newton(lambda z: (z + np.nan, np.eye(3)), 3), "not finite"),
    (lambda: gauss_newton(lambda z: (z, np.eye(3)), 3, iterations=0), "iterations is 0"),
    (lambda: hmc(_energy, lambda z: z, np.zeros(2), np.eye(3)), r"hessian .*give \(2, 2\)"),
    (lambda: hmc(_energy, lambda z: z, np.zeros(2), -np.eye(2)), "not positive definite"),
    (lambda: hmc(_energy, lambda z: z, np.zeros(2), [[1, 0.9], [0, 1]]), "not symmetric"),
    (lambda: hmc(_energy, lambda z: z[0], np.zeros(2), np.eye(2)), "The gradient"),
    (lambda: hmc(lambda z: 1.0, lambda z: z, np.zeros(2), np.eye(2)), "The potential"),
    (lambda: hmc(lambda z: 1j * _energy(z), lambda z: z, np.zeros(2), np.eye(2)), "real numbers"),
    (lambda: hmc(None, lambda z: z, np.zeros(2), np.eye(2)), "potential is None"),
    *[(lambda change=change: hmc(_energy, lambda z: z, np.zeros(2), np.eye(2), **change), f"{next(iter(change))} is")
      for change in ({"chains": 0}, {"draws": 2.0}, {"leaps": None}, {"warmup": -1}, {"step": 0}, {"seed": -1})],
])
def test_wrong_input_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
