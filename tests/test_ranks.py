"""On two ranks: what one of them raises, or has other arguments for, is an error of both, and nobody waits for ever."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each case calls; it prints what comes out on this rank.
HEAD = """
import sys, warnings
import numpy as np
import torch
from firedrake import COMM_WORLD, Function, FunctionSpace, UnitIntervalMesh, assemble, dx
from fem_diffusion import *
from fem_diffusion import checks
from fem_diffusion.diffusion import CallableNoise
from fem_diffusion.prior.transformed import CallablePrior
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.point import map_point
from fem_diffusion.simulation.simulate import simulated_parameter
from fem_diffusion.trust.calibration import calibrate_model
from fem_diffusion.trust.correct import correct

warnings.simplefilter("ignore")
checks._PATIENCE = 60.0
V = FunctionSpace(UnitIntervalMesh(8), "CG", 1)
rank, prior, basis = COMM_WORLD.rank, GaussianPrior(V, 1.0, 0.5), None
basis = karhunen_loeve(prior, 3)
sensors, Y = point_sensors(V, [[0.25], [0.75]]), np.array([0.3, 0.2])
noise = GaussianNoise(std=0.1)
QUICK = TrainingOptions(steps=20, evaluate_every=10, width=8, depth=1, batch=16)
QUIET = {"progress": False}


def alone(who=1):
    if rank == who:
        raise ValueError("on one rank only")


def twice(m):
    return Function(V).interpolate(2 * m)


def failing(m):
    # After the steps that ranks take together: even an interpolation is one.
    u = twice(m)
    alone()
    return u


def instrument(u):
    return np.array([assemble(u * dx), assemble(u**2 * dx)])


def broken_instrument(u):
    found = instrument(u)
    alone()
    return found


class Blocks:
    M = U = V

    def __init__(self, solves=True):
        self.solves = solves

    def __call__(self, m):
        return twice(m)

    def solve_many(self, values):
        if not self.solves:
            alone()
        return 2 * values

    def sensitivity(self, m, rows):
        alone()
        return 2 * (rows.toarray() if hasattr(rows, "toarray") else rows)


def density(who):
    def log_density(y, clean):
        if len(clean) > 1:
            alone(who)
        return -((y - clean)**2).sum(1) / 0.02
    return CallableNoise(lambda y, g: y + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype), log_density)


def noisy(y, g):
    alone(0)
    return y


def problem(forward=twice, observation=sensors, noise=noise, prior=prior):
    return InverseProblem(prior, forward, observation, noise)


def latent(*given, **options):
    return LatentProblem(problem(*given, **options), Y, basis)


def case(run):
    try:
        found = run()
        word = np.array2string(np.ravel(np.asarray(found, dtype=float))[:4], precision=4)
    except Exception as error:
        word = f"{type(error).__name__}: {error}"
    words = COMM_WORLD.allgather(word)
    if rank == 0:
        print("SAME" if len(set(words)) == 1 else "OTHER", words[0].splitlines()[0], flush=True)


z, values = np.zeros((2, 3)), prior.sample_many(2, 0)
"""

FAILS = [
    ("problem(failing).readings(values)", "ValueError: on one rank only"),
    ("problem(failing, instrument).readings(values)", "ValueError: on one rank only"),
    ("problem(twice, broken_instrument).readings(values)", "ValueError: on one rank only"),
    ("problem(Blocks(False)).readings(values)", "ValueError: on one rank only"),
    ("problem(failing).measurements(values, seed=1)", "ValueError: on one rank only"),
    ("problem(noise=CallableNoise(noisy)).measurements(values, seed=1)", "ValueError: on one rank only"),
    ("problem(Blocks()).sensitivity(prior.mean)", "ValueError: on one rank only"),
    ("latent(failing).energy(z)", "[inf inf]"), ("latent(failing).readings(z)", "[nan nan nan nan]"),
    ("latent(failing, instrument).energy(z)", "[inf inf]"), ("latent(twice, broken_instrument).energy(z)", "[inf inf]"),
    ("latent(Blocks(False)).energy(z)", "[inf inf]"), ("latent(Blocks()).energy_and_gradient(z)[0]", "[inf inf]"),
    ("latent(noise=density(0)).energy(z)", "ValueError: on one rank only"),
    ("latent(noise=density(0)).readings_and_gradient(z)[0]", "ValueError: on one rank only"),
    ("LatentProblem(problem(), Y, pod(V, prior.sample_many(20, 1), 3), log_prior=lambda z: alone(0)).energy(z)",
     "ValueError: on one rank only"),
    ("map_point(problem(failing), Y)", "SolveError: The forward problem has no solution at the prior mean"),
    ("laplace(problem(failing), Y)", "SolveError: The forward problem has no solution at the prior mean"),
    ("exact(problem(failing), Y)", "InputError: The forward problem, of type CallableForward, has no derivative"),
    ("hmc(problem(failing), Y, seed=1, draws=4, progress=False)", "SolveError: The forward problem has no solution"),
    ("simulate(problem(failing), 3, seed=1, progress=False)", "SolveError: The forward problem failed for sample 0"),
    ("exact(problem(), Y).sample(4, seed=1).map(lambda m: alone() or 1.0)", "ValueError: on one rank only"),
    ("exact(problem(), Y).sample(4, seed=1).probability(lambda m: alone() or True)", "ValueError: on one rank only"),
    ("CallablePrior(V, lambda seed: alone() or Function(V)).sample(1)", "ValueError: on one rank only"),
]

SETUP = """
linear = problem()
data = simulate(linear, 60, seed=1, progress=False)
model = fit(linear, data, basis=basis, options=QUICK, progress=False)
posterior, right, near = model.condition(Y), exact(linear, Y), laplace(linear, Y)
chains = hmc(linear, Y, basis=basis, seed=1, chains=2, draws=30, progress=False)
"""

SEEDS = [
    "prior.sample_many(3, 1 + rank)", "prior.sample(1 + rank)", "prior.sample_many(3 + rank, 1)",
    "CallablePrior(V, lambda seed: Function(V)).sample(1 + rank)",
    "CallablePrior(V, lambda seed: Function(V)).sample_many(2 + rank, 1)",
    "linear.measurements(values, seed=1 + rank)", "simulate(linear, 5, seed=1 + rank, progress=False)",
    "simulate(linear, 5 + rank, seed=1, progress=False)", "simulated_parameter(linear, 3 + rank, seed=1)",
    "posterior.sample(4, seed=1 + rank, progress=False)", "posterior.sample(4 + rank, seed=1, progress=False)",
    "posterior.predictive(4, seed=1 + rank)", "posterior.correct(200 + rank, seed=1, progress=False)",
    "posterior.correct(200, seed=1 + rank, progress=False)", "posterior.check(seed=1 + rank)",
    "posterior.check(50 + rank)", "right.sample(4, seed=1 + rank)", "right.predictive(4, seed=1 + rank)",
    "near.sample(4 + rank, seed=1)", "chains.sample(4, seed=1 + rank)", "chains.sample(4 + rank, seed=1)",
    "laplace(linear, Y, seed=rank)", "map_point(linear, Y, seed=rank)", "map_point(linear, Y, starts=1 + rank)",
    "hmc(linear, Y, seed=1 + rank, draws=5, progress=False)", "hmc(linear, Y, seed=1, draws=5 + rank, progress=False)",
    "pcn(linear, Y, seed=1, chains=2 + rank, draws=5, progress=False)",
    "refine(model, data, Y, 60, seed=1 + rank, options=QUICK, progress=False)",
    "refine(model, data, Y, 60 + rank, seed=1, options=QUICK, progress=False)",
    "calibrate_model(model, data, seed=1 + rank)", "calibrate_model(model, data, seed=1, draws=19 + rank)",
    "posterior.report('page.html', seed=1 + rank)",
    "model.condition(Y + rank)", "exact(linear, Y + rank)", "laplace(linear, Y + rank)",
    # One rank refuses what it has.
    "posterior.sample(4, seed=-rank, progress=False)", "model.condition(Y if rank else Y[:1])",
]


def _run(cases, folder, setup=""):
    """Words of every case, from two ranks that have the same."""
    lines = [f"case(lambda: {case})" for case in cases]
    (folder / "ranks.py").write_text("\n".join([HEAD, setup, *lines]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    run = subprocess.run(["mpiexec", "-n", "2", sys.executable, "ranks.py"], cwd=folder, capture_output=True, text=True,
                         timeout=240, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = re.findall("^(SAME|OTHER) (.*)$", run.stdout, re.MULTILINE)
    assert len(found) == len(cases) and {how for how, _ in found} == {"SAME"}, run.stdout
    return [words for _, words in found]


def test_what_the_users_code_raises_on_one_rank_is_raised_on_all(tmp_path):
    for (case, wanted), found in zip(FAILS, _run([case for case, _ in FAILS], tmp_path)):
        assert found.startswith(wanted), (case, found)


@pytest.mark.parametrize("half", [0, 1])
def test_arguments_that_differ_between_ranks_are_refused_by_all(half, tmp_path):
    cases = SEEDS[half::2]
    for case, found in zip(cases, _run(cases, tmp_path, SETUP)):
        differ = re.match("InputError: .* (is another one|are others) on other ranks: read or draw on one", found)
        assert differ or re.match("InputError: (seed is -1|y has shape)", found), (case, found)
