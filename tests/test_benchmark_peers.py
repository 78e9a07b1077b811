"""Side by side with sbi: what the command keeps, scores and prints, with stand-ins for sbi and sbibm."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation  # noqa: E402  (benchmarks is a folder of scripts, not a package)
import peers  # noqa: E402

STD = 0.5
SIZE = peers.Size(simulations=50, samples=400, held_out=2000, observations=(1, 2), seeds=(0,))


class StandIn:
    """A task like those of sbibm: z ~ N(0, I) in 2D, x = z + e."""

    name = "two_moons"

    def get_prior_dist(self):
        return Independent(Normal(torch.zeros(2), torch.ones(2)), 1)

    def get_prior(self):
        return lambda num_samples: self.get_prior_dist().sample((num_samples,))

    def get_simulator(self):
        return lambda z: z + STD * torch.randn_like(z)

    def get_observation(self, num_observation):
        return torch.tensor([[0.3, -0.8]]) * num_observation

    def get_reference_posterior_samples(self, num_observation):
        generator = torch.Generator().manual_seed(num_observation)
        law = posterior(self.get_observation(num_observation))
        return law.mean + law.stddev * torch.randn(SIZE.samples, 2, generator=generator)


def posterior(y):
    """The exact posterior of the stand-in."""
    return Independent(Normal(y / (1 + STD**2), torch.full_like(y, STD / math.sqrt(1 + STD**2))), 1)


def exact(shift=0.0, calls=None, end=None):
    """A trainer whose posterior is the exact one, moved; it counts its trainings, and may end when it samples."""
    def fit(prior, theta, x, seed, size):
        assert theta.shape == x.shape == (SIZE.simulations, 2)
        if calls is not None:
            calls.append(seed)

        def sample(y, n):
            if end is not None and torch.equal(y, end):
                raise KeyboardInterrupt
            return posterior(y).sample((n,))[:, 0] + shift
        return peers.Trained(sample, lambda z, y: posterior(y).log_prob(z - shift))
    return fit


def run(folder, methods):
    peers.files.make_folder(folder)
    return peers.run(peers.Study(folder, SIZE), [StandIn()], methods, [0], [1, 2])


def scores(rows, method, name="c2st"):
    return [float(row[name]) for row in rows if row["method"] == method]


def test_exact_samples_are_not_told_apart_and_moved_ones_are(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "TRAINERS", {"fem_diffusion": exact(), "sbi FMPE": exact(0.5)})
    rows = run(tmp_path, ["fem_diffusion", "sbi FMPE"])
    right, moved = scores(rows, "fem_diffusion"), scores(rows, "sbi FMPE")
    # 800 labels: the accuracy of a coin has the standard deviation 0.018.
    assert len(right) == len(moved) == 2 and all(abs(score - 0.5) < 4 * 0.018 < score_moved - 0.5
                                                 for score, score_moved in zip(right, moved))
    # Projections of a move by one posterior standard deviation and more of each coordinate have the rms 0.79 and more.
    assert max(scores(rows, "fem_diffusion", "sliced_wasserstein")) < 0.2 < 0.7 < min(
        scores(rows, "sbi FMPE", "sliced_wasserstein"))
    # The density of held-out pairs is minus the entropy of the posterior, in 2D, with a standard deviation of 1 a pair.
    entropy = math.log(2 * math.pi * math.e * STD**2 / (1 + STD**2))
    assert abs(scores(rows, "fem_diffusion", "log_density")[0] + entropy) < 4 / math.sqrt(SIZE.held_out)
    assert scores(rows, "sbi FMPE", "log_density")[0] < -entropy - 0.5
    table = (tmp_path / "peers.md").read_text()
    assert table == f"{peers.table(rows)}\n" and "| two_moons | fem_diffusion | 1 | 2 | **" in table


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(peers, "TRAINERS", {"fem_diffusion": exact(calls=calls, end=StandIn().get_observation(2))})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["fem_diffusion"])
    kept = [path.read_bytes() for path in (tmp_path / "draws" / "fem_diffusion").iterdir()]
    monkeypatch.setattr(peers, "TRAINERS", {"fem_diffusion": exact(calls=calls)})
    score = peers.c2st
    monkeypatch.setattr(peers, "c2st", lambda *sets: score(*sets) if not (tmp_path / "peers.csv").exists() else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, ["fem_diffusion"])
    # The draws of the first observation are those that were there, and its row is kept.
    first = (tmp_path / "draws" / "fem_diffusion" / "two_moons-0-1.safetensors").read_bytes()
    rows = peers.read(tmp_path / "peers.csv")
    assert kept == [first] and [row["observation"] for row in rows] == ["1"] and len(calls) == 2
    monkeypatch.setattr(peers, "c2st", score)
    assert run(tmp_path, ["fem_diffusion"])[0] == rows[0] and len(calls) == 2
    # All is there: nothing is trained or scored.
    monkeypatch.setattr(peers, "c2st", None)
    assert len(run(tmp_path, ["fem_diffusion"])) == 2 and len(calls) == 2


def test_draws_that_are_made_anew_are_scored_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "TRAINERS", {"fem_diffusion": exact(0.5), "sbi FMPE": exact()})
    monkeypatch.setattr(peers, "c2st", lambda reference, samples: abs(reference.mean() - samples.mean()))
    before = run(tmp_path, list(peers.TRAINERS))
    shutil.rmtree(tmp_path / "draws" / "fem_diffusion")
    monkeypatch.setattr(peers, "TRAINERS", {"fem_diffusion": exact(), "sbi FMPE": exact(0.5)})
    after = run(tmp_path, list(peers.TRAINERS))
    assert len(after) == 4 and max(scores(after, "fem_diffusion")) < min(scores(before, "fem_diffusion"))
    assert scores(after, "sbi FMPE") == scores(before, "sbi FMPE")


def test_an_ensemble_is_the_even_mixture_of_its_members(tmp_path, monkeypatch):
    shifts = iter(10.0 * np.arange(peers.MEMBERS))
    monkeypatch.setattr(peers, "TRAINERS", {peers.FLOW: lambda *arguments: exact(next(shifts))(*arguments)})
    study = peers.Study(tmp_path, SIZE)
    draws, _ = study.draws(StandIn(), peers.ENSEMBLE, 0, [1, 2])
    centres = (draws.array("samples", SIZE.samples, 2)[:, 0] / 10).round()
    assert [(centres == i).sum() for i in range(peers.MEMBERS)] == [SIZE.samples // peers.MEMBERS] * peers.MEMBERS
    # The members lie so far apart that one alone tells.
    one, = study.draws(StandIn(), peers.FLOW, 0, [1])
    assert np.allclose(draws.array("log_density", None), one.array("log_density", None) - math.log(peers.MEMBERS))
    assert draws.value("training_s", float) >= one.value("training_s", float)


def test_the_table_names_the_best_and_the_source_of_published_figures():
    def row(method, seed, number, score):
        values = ("slcp", method, str(seed), str(number), str(score), "0.1", "-3.0", "10", "1", "")
        return dict(zip(peers.FIELDS, values))
    lines = peers.table([row("fem_diffusion", 0, 1, 0.8), row("fem_diffusion", 1, 1, 0.7), row(peers.FLOW, 0, 1, 0.7),
                         row(peers.FLOW, 0, 2, 0.9)]).splitlines()[2:]
    assert lines[0].startswith("| slcp | fem_diffusion | 2 | 1 | **0.750** | 0.800 |")
    assert lines[1].startswith(f"| slcp | {peers.FLOW} | 1 | 2 | 0.800 | 0.900 |")
    assert len(lines) == 4 and all(peers.SOURCE in line for line in lines[2:]) and "0.761" in lines[2]


@pytest.mark.filterwarnings("ignore:The posterior collapses")  # twenty steps on 400 pairs
def test_ablation_changes_one_part_at_a_time_and_goes_on(tmp_path, monkeypatch):
    seen, learnt = [], []
    # The noise of the banana does not depend on the latents.
    monkeypatch.setattr(ablation.measured, "fit_noise", lambda *arguments, **named: learnt.append(len(seen)))

    def samples(conditioned, n, sampler, *, seed, progress):
        seen.append(sampler.corrections)
        return sample_latents(conditioned, n, sampler, seed=seed, progress=progress)
    sample_latents = ablation.sample_latents
    monkeypatch.setattr(ablation, "sample_latents", samples)
    monkeypatch.setattr(ablation, "c2st", lambda exact, found: 0.6 if seen[-1] == 0 else 0.5)  # slow, tested elsewhere
    size = ablation.Size(pairs=400, samples=20, seeds=(0,), steps=20)
    file = tmp_path / "rows.csv"
    changes = ["default", "no corrections", "constant noise"]
    rows = ablation.run(file, ["banana"], changes, [0], size)
    assert seen == [None] * 3 + [0] * 3 + [None] * 3 and learnt == [0, 3] and len(rows) == 9
    assert ablation.run(file, ["banana"], changes, [0], size) == rows and len(seen) == 9
    header, _, line = ablation.table(rows).splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | ")))
    assert cells["default"] == "0.500" and cells["no corrections"] == "0.600"
