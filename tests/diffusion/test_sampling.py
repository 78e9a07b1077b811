"""Samplers against known posteriors: moments to Monte Carlo error, orders, and broken samplers that must fail."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import (
    METHODS, Denoiser, Formulation, Sampler, Spectrum, churn, constant_moment, linear_base, sample_latents,
    straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.errors import InputError
from truths import GaussianTruth, Known, MixtureTruth, at_zero, draw, flat_base, gaussian_target, spectrum_of

FORMULATIONS = [variance_exploding(), variance_exploding(0.01, 15.0, "linear"), variance_preserving(),
                variance_preserving(schedule="cosine"), sub_variance_preserving(), straight_line(),
                constant_moment(0.5)]
N = 1000
MEAN, COVARIANCE = gaussian_target()
TRUTH = GaussianTruth(MEAN, COVARIANCE)
EVERY = [(coordinates, method) for coordinates in METHODS for method in METHODS[coordinates]]
RANDOM = [pair for pair in EVERY if not METHODS[pair[0]][pair[1]].deterministic]


def _rising(t):
    return 1 + t


def _sample(network, r, n=N, spectrum=None, seed=0, size=1, **settings):
    """Samples (n, r), of `size` measurements in turn that are all alike."""
    call = {name: settings.pop(name) for name in ("memory", "callback", "progress") if name in settings}
    conditioned = at_zero(network, r, size, spectrum)
    return sample_latents(conditioned, n // size, Sampler(**settings), seed=seed, **call).flatten(0, 1).numpy()


def _p_value(network=TRUTH, **settings):
    return min(moment_p_values(_sample(network, 5, **settings), MEAN, COVARIANCE))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, _rising, churn(variance_exploding(), 40.0)],
                         ids=lambda a: "function" if callable(a) else a)
@pytest.mark.parametrize("formulation", [None, *FORMULATIONS], ids=lambda f: f.name if f else "spectrum")
def test_one_step_is_exact_where_the_base_is_the_truth(formulation, alpha):
    g = torch.Generator().manual_seed(0)
    operator = torch.randn(3, 6, generator=g, dtype=torch.float64)
    y = torch.randn(3, generator=g, dtype=torch.float64)
    base = linear_base(operator, 0.01 * torch.eye(3, dtype=torch.float64))
    covariance = np.linalg.inv(np.eye(6) + 100 * operator.T.numpy() @ operator.numpy())
    mean = covariance @ (100 * operator.T @ y).numpy()
    sampler = Sampler(alpha, 1, formulation=formulation)
    z = sample_latents(Denoiser(base).at(torch.stack([torch.zeros_like(y), y])), N, sampler, seed=0)
    assert min(moment_p_values(z[1].numpy(), mean, covariance)) > 1e-4
    assert min(moment_p_values(z[0].numpy(), 0 * mean, covariance)) > 1e-4


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_every_formulation_and_alpha_in_both_coordinates(formulation, alpha):
    for coordinates in METHODS:
        # Equal steps of a linear noise level leave few for the small levels, where the posterior is.
        steps = 500 if formulation.name == "VE-linear" else 150
        settings = {"method": "heun", "alpha": alpha, "steps": steps, "coordinates": coordinates}
        assert _p_value(formulation=formulation, **settings) > 1e-4, coordinates


@pytest.mark.parametrize("coordinates, method", EVERY)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_every_method(coordinates, method, alpha):
    scheme = METHODS[coordinates][method]
    if scheme.deterministic and alpha:
        with pytest.raises(InputError, match="alpha = 0"):
            _p_value(method=method, coordinates=coordinates, alpha=alpha)
        return
    settings = {"formulation": straight_line(), "method": method, "coordinates": coordinates, "alpha": alpha}
    steps = 600 if scheme.order == 1 else 150
    assert _p_value(steps=steps, **settings) > 1e-4

    @Known
    def broken(v, angle):
        # 1.2 q = -v + cot N' with q = -v + cot N: the score scaled by a fifth.
        return 1.2 * TRUTH(v, angle) - 0.2 * torch.tan(angle) * v
    tame = {**settings, "formulation": variance_exploding(0.01, 20.0)}
    assert _p_value(steps=steps, **tame) > 1e-4
    assert _p_value(broken, steps=steps, **tame) < 1e-4


@pytest.mark.parametrize("coordinates, method", RANDOM)
def test_missing_noise_fails(coordinates, method, monkeypatch):
    true_normal, calls = torch.randn, []

    def silent(*size, **options):
        calls.append(1)
        return true_normal(*size, **options) if len(calls) == 1 else torch.zeros(*size, dtype=options["dtype"])
    monkeypatch.setattr(torch, "randn", silent)
    assert _p_value(formulation=straight_line(), method=method, coordinates=coordinates, alpha=1.0, steps=250) < 1e-4
    assert len(calls) > 100


@pytest.mark.parametrize("formulation", [None, variance_exploding(), variance_preserving()],
                         ids=lambda f: f.name if f else "spectrum")
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_bimodal_posterior(formulation, alpha):
    truth = MixtureTruth()
    z = _sample(truth, 1, formulation=formulation, alpha=alpha, steps=100)[:, 0]
    assert abs((z > -0.5).mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / N)
    grid = np.linspace(-3.5, 3.5, 200)
    cdf = sum(float(w) * norm.cdf(grid, float(m), float(s)) for w, m, s in zip(truth.weights, truth.means, truth.stds))
    # Kolmogorov-Smirnov distance at level 1e-4.
    assert np.abs((z[:, None] <= grid).mean(0) - cdf).max() < 2.23 / np.sqrt(N)


@lru_cache
def _fine(coordinates):
    """Ten samples by the flow in many steps."""
    return _sample(TRUTH, 5, n=10, method="heun", steps=1500, coordinates=coordinates,
                   formulation=variance_preserving(schedule="cosine"))


@pytest.mark.parametrize("coordinates, method",
                         [pair for pair in EVERY if pair[1] not in ("adaptive", "predictor_corrector")])
def test_error_of_the_flow_falls_with_the_order_of_the_method(coordinates, method):
    settings = {"formulation": variance_preserving(schedule="cosine"), "coordinates": coordinates, "n": 10}
    # The last step from a small noise level to none is the same for all plain methods.
    errors = [np.abs(_sample(TRUTH, 5, method=method, steps=steps, **settings) - _fine(coordinates)).max()
              for steps in (120, 240)]
    assert np.log2(errors[0] / errors[1]) > METHODS[coordinates][method].order - 0.25


@pytest.mark.parametrize("alpha", [1.0, _rising])
def test_stochastic_heun_beats_euler_maruyama(alpha):
    # In plain coordinates; errors of the standard deviation, with the Monte Carlo error of 20,000 samples below both.
    errors, truth = {}, GaussianTruth(np.zeros(1), np.array([[0.04]]))
    spectrum = Spectrum(torch.tensor([0.04]), torch.ones(1))
    for method in ("euler", "heun"):
        z = _sample(truth, 1, n=20000, spectrum=spectrum, alpha=alpha, method=method,
                    formulation=variance_preserving(), coordinates="plain", nodes="spectrum", steps=20)
        errors[method] = abs(z.std() / 0.2 - 1)
    assert errors["heun"] < 0.4 * errors["euler"]


@pytest.mark.parametrize("coordinates", METHODS)
def test_adaptive_is_the_limit_of_fixed_steps(coordinates):
    settings = {"formulation": variance_preserving(schedule="cosine"), "coordinates": coordinates, "n": 10}
    assert np.abs(_sample(TRUTH, 5, method="adaptive", **settings) - _fine(coordinates)).max() < 1e-3


@pytest.mark.parametrize("stds", [(0.02, 0.02), (0.1, 0.2), (1.4, 0.1)], ids=str)
def test_eight_evaluations_at_nodes_from_the_spectrum(stds):
    truth = MixtureTruth((0.4, 0.6), (-1.0, 0.8), stds).standardised()
    conditioned, n = at_zero(truth, spectrum=spectrum_of(truth, truth.draw(4000, 1))), 5000

    def quantiles(**settings):
        return draw(conditioned, n, Sampler(**settings))[:, 0].sort().values
    exact = quantiles(method="heun", steps=300)
    error = {name: float((quantiles(**settings) - exact).abs().mean()) for name, settings in {
        "spectrum": {"method": "multistep", "steps": 8},
        "even": {"method": "multistep", "steps": 8, "formulation": variance_preserving(schedule="cosine")},
        "Euler-Maruyama": {"method": "euler", "alpha": 1.0, "coordinates": "plain", "steps": 50,
                           "formulation": variance_preserving()}}.items()}
    # Wasserstein distances; 1 / sqrt(n) is about that between two exact sets.
    assert error["spectrum"] < 1.5 / np.sqrt(n)
    assert error["spectrum"] < 0.7 * error["even"] and error["spectrum"] < error["Euler-Maruyama"]


def test_churn_raises_the_noise_level_as_edm_does():
    formulation, steps, strength = variance_exploding(0.01, 100.0), 2000, 5.0
    alpha = churn(formulation, strength, sigma_min=0.1, sigma_max=10.0)
    t = torch.tensor([0.3, 0.5, 0.7, 0.1, 0.9], dtype=torch.float64)
    # The family adds the variance alpha d(sigma^2) in a step, the churn 2 gamma sigma^2 to first order.
    added = alpha(t) * formulation.g(t) / steps / (2 * formulation.sigma(t)**2)
    expected = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64) * strength / steps
    torch.testing.assert_close(added, expected)
    assert _p_value(formulation=formulation, alpha=churn(formulation, 10.0), steps=250) > 1e-4
    assert _p_value(formulation=straight_line(), alpha=churn(straight_line(), 2.0, 0.05, 50.0), steps=250) > 1e-4


@pytest.mark.parametrize("coordinates, method", EVERY)
def test_seed_reproduces_and_memory_does_not_matter(coordinates, method):
    alpha = 0.0 if METHODS[coordinates][method].deterministic else 1.0
    settings = {"n": 10, "method": method, "coordinates": coordinates, "alpha": alpha, "steps": 5}
    first = _sample(TRUTH, 5, **settings)
    np.testing.assert_array_equal(first, _sample(TRUTH, 5, **settings))
    for size, memory in ((1, 320), (2, 320), (2, 1000), (10, 320)):   # 160 bytes a row
        np.testing.assert_allclose(_sample(TRUTH, 5, size=size, memory=memory, **settings),
                                   _sample(TRUTH, 5, size=size, **settings), atol=1e-12)
    assert np.abs(first - _sample(TRUTH, 5, seed=1, **settings)).max() > 1e-3


@pytest.mark.parametrize("coordinates, method", EVERY)
def test_cost_is_what_is_announced_and_the_callback_sees_every_step(coordinates, method):
    calls, seen = [], []

    @Known
    def counted(v, angle):
        calls.append(float(angle.flatten()[0]))
        return TRUTH(v, angle)
    _sample(counted, 5, n=4, method=method, coordinates=coordinates, steps=6,
            callback=lambda step, sigma, z: seen.append((step, sigma, z.shape)))
    steps, sigmas, shapes = zip(*seen)
    assert sigmas[-1] == 0.0 and set(shapes) == {(1, 4, 5)} and list(sigmas) == sorted(sigmas, reverse=True)
    if method == "adaptive":
        with pytest.raises(InputError, match="chooses its own"):
            Sampler(steps=6, method=method, coordinates=coordinates).evaluations
    else:
        assert len(calls) == Sampler(steps=6, method=method, coordinates=coordinates).evaluations
        assert list(steps) == list(range(1, len(steps) + 1)) and len(steps) >= 6


@pytest.mark.parametrize("change, words", [
    ({"alpha": -1.0}, "alpha"), ({"alpha": lambda t: t - 0.5}, r"alpha must be >= 0.*on \[0, 1\]"),
    ({"alpha": float("nan")}, "alpha"), ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"),
    ({"method": "magic"}, "method in whitened coordinates is 'magic'"),
    ({"coordinates": "polar"}, "coordinates is 'polar'"),
    ({"method": "dpm_solver"}, "method in whitened"), ({"nodes": "even"}, "nodes is"), ({"alpha": None}, "alpha"),
    ({"alpha": lambda t: 1.0}, "elementwise"), ({"steps": float("nan")}, "steps"),
    ({"formulation": "VP"}, "a Formulation such as"),
    ({"formulation": Formulation("short", lambda t: t**2, torch.ones_like)}, "noise alone"),
    ({"formulation": variance_exploding(0.2), "coordinates": "plain"}, "noise alone"),
    ({"steps": 20.0}, "steps is 20.0"), ({"steps": True}, "steps is True"), ({"memory": None}, "memory is None"),
    ({"corrections": -1}, "corrections is -1"), ({"callback": 3}, "callback is 3"), ({"progress": "no"}, "progress"),
    ({"alpha": np.zeros(3)}, "alpha"), ({"alpha": lambda t: 1j * t}, "real tensor"), ({"method": 3}, "method"),
    ({"corrections": 3}, "density of an emulator"), ({"seed": None}, "seed is None"), ({"n": 0}, "n is 0"),
])
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        _sample(None, 2, **change)


def test_wrong_churn_is_refused():
    with pytest.raises(InputError, match="strength is -1.0"):
        churn(variance_exploding(), -1.0)


@pytest.mark.parametrize("call, words", [
    (lambda: churn("VE", 1.0), "formulation is of type str"), (lambda: churn(variance_exploding(), None), "strength"),
    (lambda: sample_latents(None, 3, seed=0), "conditioned is of type NoneType"),
    (lambda: sample_latents(Denoiser(flat_base(2)), 3, seed=0), "what Denoiser.at returns"),
    (lambda: sample_latents(at_zero(), 3, {"steps": 3}, seed=0), "sampler is of type dict"),
    (lambda: Denoiser(flat_base(2), 3), "network is of type int"), (lambda: Denoiser(None), "base is of type"),
    (lambda: Denoiser(flat_base(2), lambda v, angle: v), "network is of type function"),
    (lambda: Denoiser(flat_base(2), None, 3), "spectrum is of type"),
    (lambda: at_zero(support=3), "support is of type"),
    (lambda: Denoiser(flat_base(2), known=1), "known is 1"),
])
def test_what_is_no_argument_at_all_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


class Scribbler(Known):
    """A network of a user's own that writes into what it gets."""

    def __init__(self):
        super().__init__(lambda v, angle, one: one * TRUTH(v, angle))

    def context(self, *seen):
        return torch.ones(1, 1, dtype=torch.float64),

    def __call__(self, *inputs):
        value = self.function(*(x.clone() for x in inputs))
        for x in inputs:
            x.fill_(7.0)
        return value


def test_functions_of_the_user_may_write_into_what_they_get():
    def scribble(function):
        def result(*inputs):
            value = function(*(x.clone() if torch.is_tensor(x) else x for x in inputs))
            for x in inputs:
                if torch.is_tensor(x):
                    x.fill_(7.0)
            return value
        return result
    mine = Formulation("mine", lambda t: 2500 * t**2, lambda t: (1 + (50 * t)**3)**(1 / 3))
    rude = Formulation("rude", scribble(mine.variance), scribble(mine.scaling))
    t = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for name in ("sigma", "a", "s", "b", "g", "spread", "time"):
        torch.testing.assert_close(getattr(rude, name)(t), getattr(mine, name)(t), rtol=0, atol=0)
    for coordinates, method in EVERY:
        settings = {"coordinates": coordinates, "method": method, "n": 4, "steps": 4}
        fixed = METHODS[coordinates][method].deterministic
        np.testing.assert_allclose(
            _sample(Scribbler(), 5, formulation=rude, callback=scribble(lambda *_: None),
                    alpha=0.0 if fixed else scribble(_rising), **settings),
            _sample(TRUTH, 5, formulation=mine, alpha=0.0 if fixed else _rising, **settings), rtol=1e-10)


def test_numbers_of_numpy_are_numbers():
    settings = {"n": 3, "method": "heun"}
    np.testing.assert_allclose(_sample(TRUTH, 5, steps=np.int64(4), alpha=np.float32(1), **settings),
                               _sample(TRUTH, 5, steps=4, alpha=1, **settings), rtol=1e-10)


def test_measurements_in_single_precision_are_taken():
    denoiser, y = Denoiser(flat_base(5), TRUTH), torch.zeros(4, 2)
    single, double = (sample_latents(denoiser.at(x), 2, seed=0) for x in (y, y.double()))
    torch.testing.assert_close(single, double, rtol=1e-10, atol=1e-12)
    assert single.dtype == torch.float64 and single.shape == (4, 2, 5)


@pytest.mark.parametrize("y, words", [
    (torch.zeros(3, 4), r"give \(B, 2\)"), (torch.zeros(2), r"give \(B, 2\)"),
    (torch.tensor([[0.0, torch.nan]]), r"not finite.* sensors \[1\]"),
    (torch.tensor([[1e200, 0.0]], dtype=torch.float64), r"beyond 1e\+100, at sensors \[0\]"),
    (torch.tensor([[0.0, 1e30]], dtype=torch.float64), r"sensors \[1\] are more than 1e\+12 standard deviations"),
    (torch.zeros(3, 2, dtype=torch.complex128), "real and imaginary"), (np.zeros((3, 2)), "torch.as_tensor"),
])
def test_wrong_measurements_are_refused(y, words):
    with pytest.raises(InputError, match=words):
        Denoiser(flat_base(2)).at(y)
