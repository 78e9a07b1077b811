"""Monotone maps: they invert, grow, go on soundly, know their slopes, and are the same from a file."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from fem_diffusion import files
from fem_diffusion.diffusion import (
    Denoiser, GaussianNoise, History, MonotoneMap, StudentNoise, join_noise, linear_base, log_density, sample_latents,
)
from fem_diffusion.diffusion.maps.fitted import fit_scales, gaussianised
from fem_diffusion.diffusion.maps.laws import marginals
from fem_diffusion.diffusion.maps.noise import MappedNoise
from fem_diffusion.diffusion.packing import pack_denoiser, unpack_denoiser
from fem_diffusion.errors import FileError, InputError
from truths import random

N = 4000


def _numbers():
    """Of six laws: normal, lognormal, over six decades, heavy tails, uniform, two modes far apart."""
    z = torch.randn(N, 6, generator=random(0), dtype=torch.float64)
    u = torch.rand(N, generator=random(1), dtype=torch.float64)
    return torch.stack([3 + z[:, 0], z[:, 1].exp(), 10**(6 * u - 9), z[:, 2]**3, 5 * u - 1,
                        z[:, 3] * 0.1 + torch.where(z[:, 4] > 0, 100.0, -3.0)], 1)


def _laws():
    return MonotoneMap.of(("law",) * 6, laws=marginals(
        [stats.norm(3, 1), stats.lognorm(1.0), stats.loguniform(1e-9, 1e-3), stats.t(3), stats.uniform(-1, 5),
         stats.norm(0, 200)], 6))


def _all():
    x = _numbers()
    logs = fit_scales(x, positive=True)
    return {"scales": fit_scales(x), "logarithms": logs, "splines": gaussianised(x, logs),
            "plain splines": gaussianised(x, None), "laws": _laws()}


@pytest.fixture(scope="module", params=["scales", "logarithms", "splines", "plain splines", "laws"])
def scale(request):
    return _all()[request.param]


def test_maps_invert_to_rounding(scale):
    x = _numbers()
    there = scale.forward(x)
    assert torch.isfinite(there).all()
    assert ((scale.inverse(there) - x).abs() < 1e-12 * x.std(0)).all()
    # Over six decades the smallest numbers come back, too.
    small = x[:, 2] < 1e-8
    torch.testing.assert_close(scale.inverse(there)[small, 2], x[small, 2], rtol=1e-12, atol=0)
    u = torch.linspace(-4, 4, 200, dtype=torch.float64)[:, None].expand(-1, 6)
    torch.testing.assert_close(scale.forward(scale.inverse(u)), u, rtol=1e-9, atol=1e-9)


def test_maps_grow_and_know_their_slopes(scale):
    x = _numbers().sort(0).values[::7]
    assert (scale.forward(x).diff(dim=0) >= 0).all()
    middle = (x[1:] + x[:-1]) / 2
    step = 1e-6 * torch.minimum(middle.abs(), (x[1:] - x[:-1]).clamp(min=1e-9 * x.std(0)))
    slope = (scale.forward(middle + step) - scale.forward(middle - step)) / (2 * step)
    error = slope.log() - scale.log_slope(middle)
    # Differences lose what the step does not see of u, and jump where a spline has a knot.
    lost = 1e-15 * scale.forward(middle).abs() / (step * slope)
    assert (error.abs() < 1e-4 + 10 * lost).float().mean() > 0.99


def test_the_inverse_has_the_derivative(scale):
    u = torch.linspace(-2.5, 2.5, 50, dtype=torch.float64)[:, None].repeat(1, 6).requires_grad_()
    x = scale.inverse(u)
    slope, = torch.autograd.grad(x.sum(), u)
    torch.testing.assert_close(slope.log(), -scale.log_slope(x.detach()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["scales", "splines", "plain splines"])
def test_tails_are_sound_a_million_times_beyond_the_training(name):
    scale, x = _all()[name], _numbers()
    far = x.abs().amax(0) * 10.0**torch.arange(0, 7, dtype=torch.float64)[:, None]
    signs = torch.tensor([1.0, 1, 1, -1, -1, 1]) if name == "splines" else torch.tensor([-1.0, -1, -1, -1, -1, 1])
    far = torch.where(torch.tensor([kind == "log" for kind in scale.kinds]), far, signs.double() * far)
    u = scale.forward(far)
    assert torch.isfinite(u).all() and torch.isfinite(scale.log_slope(far)).all()
    away = u.diff(dim=0) * torch.where(u[-1] > u[0], 1.0, -1.0)
    # Never saturating: each decade still counts.
    assert (away > 1e-2).all()
    torch.testing.assert_close(scale.inverse(u), far, rtol=1e-9, atol=0)


def test_splines_make_numbers_gaussian_and_scales_alone_do_not():
    x = _numbers()
    spline = gaussianised(x, fit_scales(x, positive=True))
    fresh = spline.forward(_numbers_again())
    assert all(stats.kstest(column, "norm").pvalue > 1e-4 for column in fresh[:, [0, 1, 2, 4]].T.numpy())
    plain = fit_scales(x, positive=True).forward(x)
    plain = (plain - plain.mean(0)) / plain.std(0)
    assert stats.kstest(plain[:, 4].numpy(), "norm").pvalue < 1e-6


def _numbers_again():
    z = torch.randn(N, 6, generator=random(10), dtype=torch.float64)
    u = torch.rand(N, generator=random(11), dtype=torch.float64)
    return torch.stack([3 + z[:, 0], z[:, 1].exp(), 10**(6 * u - 9), z[:, 2]**3, 5 * u - 1,
                        z[:, 3] * 0.1 + torch.where(z[:, 4] > 0, 100.0, -3.0)], 1)


def test_scales_are_those_of_the_laws():
    x = _numbers()
    assert fit_scales(x[:, :1]) is None
    assert fit_scales(x[:, 1:3], positive=True).kinds == ("log", "log")
    assert fit_scales(x[:, 1:4]).kinds == ("asinh",) * 3
    # A heap of equal numbers has no scale of its own, and a constant is left alone.
    heap = torch.where(x[:, :1] > 3, x[:, :1], 3.0)
    assert torch.isfinite(gaussianised(heap, None).forward(heap)).all()
    assert fit_scales(torch.full((N, 1), 7.0).double()) is None


def test_maps_of_some_are_those_of_all():
    scale, x, index = _all()["splines"], _numbers(), torch.tensor([5, 2, 2, 0])
    torch.testing.assert_close(scale.select(index).forward(x[:, index]), scale.forward(x)[:, index])


def test_laws_are_exact_and_keep_their_bounds():
    scale = MonotoneMap.of(("law",) * 2, laws=marginals(stats.uniform(-1, 2), 2))
    u = torch.tensor([[-40.0, 40.0], [-1.0, 1.0]]).double()
    x = scale.inverse(u)
    assert (x.abs() <= 1).all()
    np.testing.assert_allclose(x[1], 2 * stats.norm.cdf([-1, 1]) - 1, rtol=1e-14)
    inside = scale.contains(torch.tensor([[0.0, 0.5], [0.0, 1.5], [-1.1, 0.0]]).double())
    assert inside.tolist() == [True, False, False]


@pytest.mark.parametrize("law, theirs", [
    (torch.distributions.Uniform(torch.tensor([-1.0, 0]), torch.tensor([1.0, 3])), ("uniform", "uniform")),
    (type("Theirs", (torch.distributions.Uniform,), {})(torch.zeros(2), torch.ones(2)), ("uniform", "uniform")),
    (torch.distributions.Independent(torch.distributions.LogNormal(torch.zeros(2), torch.ones(2)), 1),
     ("lognorm", "lognorm")),
    (torch.distributions.MultivariateNormal(torch.zeros(2), torch.diag(torch.tensor([1.0, 4]))), ("norm", "norm")),
    ([torch.distributions.Gamma(2.0, 3.0), stats.expon()], ("gamma", "expon")),
    (torch.distributions.Chi2(torch.tensor([3.0, 5.0])), ("gamma", "gamma")),
], ids=["uniform", "subclass", "lognormal", "normal", "list", "other names"])
def test_laws_of_torch_are_those_of_scipy(law, theirs):
    found = marginals(law, 2)
    assert tuple(x.distribution.dist.name for x in found) == theirs
    torch.manual_seed(0)
    draws = torch.stack([torch.distributions.Gamma(2.0, 3.0).sample((3000,)), torch.distributions.Exponential(
        1.0).sample((3000,))], 1) if isinstance(law, list) else law.sample((3000,))
    for one, column in zip(found, draws.T.double().numpy()):
        assert stats.kstest(column, one.distribution.cdf).pvalue > 1e-4


@pytest.mark.parametrize("law, message", [
    (torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1]])), "depend on each"),
    (torch.distributions.Poisson(torch.ones(2)), "torch's Poisson"), (stats.poisson(3), "one continuous"),
    ([stats.norm()] * 3, "prior is of 3 latents"), (5, "prior is of type int"), ("normal", "prior is of type str")])
def test_other_laws_are_refused(law, message):
    with pytest.raises(InputError, match=message):
        marginals(law, 2)


@pytest.mark.parametrize("noise", [
    GaussianNoise(relative=0.1), GaussianNoise(std=0.2, relative=0.05), StudentNoise(0.3),
    join_noise((1, StudentNoise(0.3)), (1, GaussianNoise(relative=0.1)))], ids=["relative", "both", "t", "joined"])
def test_noise_has_its_density_on_the_new_scale(noise):
    scale = MonotoneMap.of(("asinh", "asinh"), unit=torch.tensor([0.3, 2.0]).double())
    mapped = MappedNoise(noise, scale)
    assert mapped.law
    clean = torch.tensor([[1.3, -0.7]]).double()
    # The density integrates to one, and histograms of draws follow it.
    grid = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(grid, grid[::10] / 12 * 4 - 0.7, indexing="ij"), -1).reshape(-1, 2)
    density = mapped.log_density(points, clean.expand(len(points), -1)).exp()
    cell = float((grid[1] - grid[0]) * (grid[10] - grid[0]) / 3)
    assert abs(float(density.sum()) * cell - 1) < 2e-2
    drawn = mapped.sample(clean.expand(40_000, -1), random(0))
    shares = density.view(len(grid), -1).sum(1) * cell
    shares = shares.cumsum(0) - shares / 2
    places = torch.tensor(np.interp(drawn[:, 0].numpy(), grid.numpy(), shares.numpy()))
    assert stats.kstest(places.numpy(), "uniform").statistic < 0.02
    # To first order: where the noise is small beside the bend of the map.
    fine = MappedNoise(GaussianNoise(std=1e-3), scale)
    torch.testing.assert_close(fine.each(clean)[0].diagonal(), fine.covariance(clean).diagonal(), rtol=0.1, atol=0)


def test_errors_of_an_emulator_count_on_the_new_scale():
    scale = MonotoneMap.of(("asinh",), unit=torch.tensor([0.3]).double())
    mapped, clean = MappedNoise(GaussianNoise(std=1e-4), scale), torch.tensor([[2.0]]).double()
    wide = mapped.widened(torch.tensor([1e-4]).double())
    y = 2 + torch.linspace(-0.03, 0.03, 13, dtype=torch.float64)[:, None]
    found = wide.log_density(y, clean.expand(13, -1))
    np.testing.assert_allclose(found.numpy(), stats.norm(2, 1e-2).logpdf(y[:, 0]), atol=0.15)
    assert abs(float(mapped.log_density(y[:1], clean)) - float(found[0])) > 10


def _mapped_denoiser(latents=None, readings=None):
    g = random(3)
    operator, R = torch.randn(2, 3, generator=g, dtype=torch.float64), 0.04 * torch.eye(2, dtype=torch.float64)
    return Denoiser(linear_base(operator, R), latents=latents, readings=readings), operator


def test_samples_and_densities_are_in_the_users_units():
    latents = MonotoneMap.of(("log", "identity", "law"), laws=(None, None, marginals(stats.uniform(-1, 2), 1)[0]))
    readings = MonotoneMap.of(("asinh", "identity"), unit=torch.tensor([0.1, 1.0]).double())
    plain, mapped = _mapped_denoiser()[0], _mapped_denoiser(latents, readings)[0]
    u = torch.tensor([[0.4, -0.3]]).double()
    y = readings.inverse(u)
    one, other = (sample_latents(x, 500, seed=1, progress=False) for x in (plain.at(u), mapped.at(y)))
    torch.testing.assert_close(latents.inverse(one), other)
    assert (other[..., 0] > 0).all() and (other[..., 2].abs() < 1).all()
    density = log_density(mapped.at(y), other)
    torch.testing.assert_close(density, log_density(plain.at(u), one) + latents.log_slope(other).sum(-1))
    out = other.clone()
    out[0, 0, 0], out[0, 1, 2] = -1.0, 1.5
    found = log_density(mapped.at(y), out)[0]
    assert (found[:2] == -math.inf).all() and torch.equal(found[2:], density[0, 2:])
    # Its mass is one: the mean of the ratio to another law of the same bounds.
    wide = torch.stack([torch.distributions.LogNormal(0.0, 1.5).sample((4000,)), 2 * torch.randn(4000),
                        2 * torch.rand(4000) - 1], 1).double()
    law = (stats.lognorm(1.5).logpdf(wide[:, 0]) + stats.norm(0, 2).logpdf(wide[:, 1]) - math.log(2))
    ratio = np.exp(log_density(mapped.at(y), wide[None])[0].numpy() - law)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4000**0.5


def test_a_file_holds_the_maps(tmp_path):
    x = _numbers()[:, :2]
    maps = [MonotoneMap.of(("log", "identity", "law"), laws=(None, None, marginals(stats.gamma(2, scale=3), 1)[0])),
            gaussianised(x, fit_scales(x))]
    denoiser, _ = _mapped_denoiser(*maps)
    arrays, values = pack_denoiser(denoiser, History())
    files.write(tmp_path / "model", "model", arrays, values)
    again, _ = unpack_denoiser(files.read(tmp_path / "model", "model", ""))
    for one, other in ((denoiser.latents, again.latents), (denoiser.readings, again.readings)):
        assert one.kinds == other.kinds and repr(one) == repr(other)
        at = torch.rand(5, len(one), generator=random(0), dtype=torch.float64)
        assert torch.equal(one.forward(at), other.forward(at)) and torch.equal(one.log_slope(at), other.log_slope(at))
    broken = [({"readings.slopes": -arrays["readings.slopes"]}, {}),
              ({"readings.knots": arrays["readings.knots"][:, ::-1].copy()}, {}),
              ({"readings.unit": 0 * arrays["readings.unit"]}, {}),
              ({}, {"latents": values["latents"] | {"kinds": ["log", "identity", "identity"]}}),
              ({}, {"latents": values["latents"] | {"kinds": ["log", "identity", "exec"]}}),
              ({"latents.centre": np.zeros(2)}, {})]
    for name, args in (("os", []), ("gamma", ["2"]), ("gamma", [-2.0]), ("gamma", [2.0] * 9)):
        law = {"name": name, "args": args, "kwds": {}}
        broken.append(({}, {"latents": values["latents"] | {"laws": [None, None, law]}}))
    for more, others in broken:
        files.write(tmp_path / "broken", "model", arrays | more, values | others)
        with pytest.raises(FileError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unpack_denoiser(files.read(tmp_path / "broken", "model", ""))
    with pytest.raises(InputError, match="cannot be made again"):
        pack_denoiser(_mapped_denoiser(MonotoneMap.of(("law",) * 3, laws=marginals(stats.Normal(), 3)))[0], History())


def test_a_map_fits_its_denoiser():
    with pytest.raises(InputError, match="map of latents is of 2 numbers"):
        _mapped_denoiser(MonotoneMap.of(("log", "log")))
    with pytest.raises(InputError, match="latents is of type str"):
        _mapped_denoiser("log")
