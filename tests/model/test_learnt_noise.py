"""Noise that grows with the readings: known, and held by the pairs, of which alone it is learnt then."""

from dataclasses import replace

import numpy as np
import torch
from firedrake import FunctionSpace, UnitIntervalMesh

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianNoise, GaussianPrior, InverseProblem, Physics, TrainingOptions, fit,
    karhunen_loeve, load_model, point_sensors, simulate,
)
from fem_diffusion.diffusion import Denoiser, fit_base
from fem_diffusion.diffusion.training.scatter import fit_noise

OPTIONS = TrainingOptions(steps=1500, evaluate_every=100, width=48, depth=2)
NOISE = GaussianNoise(relative=0.4)
Y = np.array([0.1, 0.15, 0.3, 0.25, 0.4, 0.2, 0.25, 0.1])


def _problem():
    """A source in one dimension, of which probes see little."""
    V = FunctionSpace(UnitIntervalMesh(24), "CG", 1)
    prior = GaussianPrior(V, std=1.5, correlation_length=0.5, mean=3.0)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0, 2: 0.0}))
    return InverseProblem(prior, forward, point_sensors(V, [[x] for x in np.linspace(0.1, 0.9, 8)]), NOISE)


def test_noise_that_pairs_hold_is_learnt_as_if_it_were_known(tmp_path):
    problem = _problem()
    data = simulate(problem, 3000, seed=1, progress=False)
    held = replace(problem, noise=None)
    noisy = NOISE.sample(torch.from_numpy(np.array(data.readings)), torch.Generator().manual_seed(2))
    basis, how = karhunen_loeve(problem.prior, 3), {"options": OPTIONS, "progress": False}
    known = fit(problem, data, basis=basis, **how)
    assert known.denoiser.known and known.denoiser.base.law is not None
    z, base = torch.from_numpy(basis.encode(data.coefficients)), fit_base(
        torch.from_numpy(basis.encode(data.coefficients)), noisy, torch.zeros(8, 8), True)
    noise = fit_noise(z, noisy, base.emulator(z), base.emulator.residual, lambda y, generator: y, OPTIONS, None, False)
    assert noise is not None
    learnt, constant = (replace(known, problem=held, seen=noisy[:1000],
                                denoiser=Denoiser(replace(base, learnt=some), known=True)) for some in (noise, None))
    assert "knows its noise" in learnt.summary
    learnt.save(tmp_path / "model")
    again = load_model(tmp_path / "model", held)
    for y in (Y, np.where(np.arange(8) == 2, np.nan, Y)):
        truth = known.condition(y).sample(2000, seed=1, progress=False).latents
        off = []
        for model in (learnt, constant):
            found = model.condition(y).sample(2000, seed=1, progress=False).latents
            off.append([np.linalg.norm((found.mean(0) - truth.mean(0)) / truth.std(0)),
                        np.abs(np.log(found.std(0) / truth.std(0))).max()])
        # Monte Carlo makes 0.05 and 0.03.
        assert off[0][0] < 0.25 and off[0][1] < 0.2 and max(off[1]) > 0.35
        np.testing.assert_allclose(*(one.condition(y).sample(20, seed=3, progress=False).values
                                     for one in (again, learnt)), rtol=1e-8)
