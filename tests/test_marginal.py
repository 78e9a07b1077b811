"""Laws of one number as images of a standard normal one: tails, slopes and doors."""

import warnings

import numpy as np
import pytest
from scipy import stats
from scipy.stats._distr_params import distcont

from fem_diffusion.errors import InputError
from fem_diffusion.marginal import Marginal

Z = np.linspace(-12, 12, 97)
# Those of which SciPy itself takes minutes, or raises.
SLOW = {"studentized_range", "levy_stable", "kstwo", "ksone", "kstwobign", "gausshyper", "genhyperbolic",
        "norminvgauss", "rel_breitwigner", "dpareto_lognorm", "geninvgauss", "ncf", "vonmises", "vonmises_line"}


@pytest.mark.parametrize("law, exact", [
    (stats.norm(1, 2), lambda z: 1 + 2 * z), (stats.Normal(mu=1.0, sigma=2.0), lambda z: 1 + 2 * z),
    (stats.lognorm(0.5, scale=3), lambda z: 3 * np.exp(0.5 * z)),
    (stats.expon(scale=2), lambda z: -2 * stats.norm.logsf(z)),
    (stats.weibull_min(2), lambda z: (-stats.norm.logsf(z))**0.5),
    (stats.uniform(1, 2), lambda z: 1 + 2 * stats.norm.cdf(z)),
    (stats.loguniform(1e-3, 10), lambda z: 1e-3 * 1e4**stats.norm.cdf(z))])
def test_quantiles_are_exact_in_both_tails(law, exact):
    marginal = Marginal(law)
    x = marginal.of_normal(Z)
    np.testing.assert_allclose(x, exact(Z), rtol=1e-12, atol=1e-14)
    assert np.isfinite(marginal.of_normal(np.array([-40.0, 40.0]))).all()
    inside = np.abs(Z) < 5
    np.testing.assert_allclose(marginal.to_normal(x[inside]), Z[inside], rtol=1e-8, atol=1e-10)
    numbers, h = Z[np.abs(Z) < 5], 1e-4
    difference = (exact(numbers + h) - exact(numbers - h)) / (2 * h)
    np.testing.assert_allclose(marginal.slope(numbers), difference, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", sorted({name for name, _ in distcont} - SLOW))
def test_any_law_of_scipy_will_do(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        law = getattr(stats, name)(*dict(distcont)[name])
        marginal = Marginal(law)
        x = marginal.of_normal(np.random.default_rng(0).standard_normal(1000))
        assert stats.kstest(x, law.cdf).pvalue > 1e-4
        ends = marginal.of_normal(np.array([-40.0, -7.0, 7.0, 40.0]))
        assert (np.diff(ends) >= 0).all() and np.isfinite(ends).all()
        assert marginal.bounds[0] <= ends[0] and ends[-1] <= marginal.bounds[1]
        assert np.isfinite(marginal.slope(Z)).all() and (marginal.slope(Z) >= 0).all()


def test_a_tail_that_quantiles_lose_ends_there():
    law = stats.triang(0.3)     # SciPy takes 1 - q in the upper tail
    assert law.isf(1e-20) == 1 and Marginal(law).of_normal(np.array([6.0]))[0] < 1
    law = stats.crystalball(2, 3)
    x = Marginal(law).of_normal(np.array([8.0, 30.0]))
    assert np.isfinite(x).all() and x[0] == x[1] and np.isinf(law.isf(1e-20))


class Shifted:
    """A law with quantiles of another one."""

    def __getattr__(self, name):
        return getattr(stats.norm(0.01) if name in ("ppf", "isf") else stats.norm(0), name)


@pytest.mark.parametrize("law", [
    stats.binom(3, 0.2), stats.Binomial(n=3, p=0.2), stats.multivariate_normal(), stats.lognorm, stats.norm([0, 1], 1),
    stats.norm(0, -1), stats.norm(np.nan), stats.gaussian_kde([1.0, 2.0]), "normal", 3, None, Shifted()])
def test_what_is_no_law_of_one_number_is_refused(law):
    with pytest.raises(InputError, match="CallablePrior|give another distribution"):
        Marginal(law)
