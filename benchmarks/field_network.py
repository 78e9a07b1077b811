"""A network with layers on the mesh against the fully connected one: the release of a contaminant, equal training time.

    OMP_NUM_THREADS=1 python benchmarks/field_network.py [--output FOLDER] [--seconds 100] [--seeds 0 1]

The pairs are those of demos/source_release, simulated to FOLDER or read from there; the last thousand take no part in
training. Time is that of the processor, one thread, so that what else the machine does counts as little as it can;
every network gets as many steps, on its own cosine, as fit into the time.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fem_diffusion.diffusion import (
    Denoiser, FieldGeometry, Noise, TrainingOptions, fit_denoiser, sample_latents,
)
from fem_diffusion.diffusion.training.denoising import noisy
from fem_diffusion.fields.geometry import field_geometry
from fem_diffusion.trust import energy_score

DEMO = Path(__file__).parents[1] / "demos" / "source_release"
SCORED, DRAWS = 400, 32  # of the unseen pairs; samples for each
NETWORKS = {"on the mesh, 128": (True, 128), "fully connected, 64": (False, 64), "fully connected, 128": (False, 128),
            "fully connected, 192": (False, 192)}


def step_time(z: Tensor, y: Tensor, noise: Noise, options: TrainingOptions,
              geometry: FieldGeometry | None) -> float:
    """Processor time of a training step: what so many steps more take."""
    def spent(steps: int) -> float:
        start = time.process_time()
        # With so few held-out pairs no network is kept, so nothing is measured after training.
        few = replace(options, steps=steps, evaluate_every=steps, validation_fraction=0.002)
        fit_denoiser(z[:3000], y[:3000], noise, options=few, network=geometry and "field", geometry=geometry,
                     progress=False)
        return time.process_time() - start
    spent(5)
    return (spent(45) - spent(5)) / 40


def denoising_loss(denoiser: Denoiser, z: Tensor, y: Tensor, noise: Noise) -> tuple[float, float]:
    """Loss on pairs that training has not seen, eight noise levels each; its standard error."""
    generator = torch.Generator().manual_seed(1)
    conditioned = denoiser.at(noise.sample(y, generator))
    w = conditioned.located.whiten(conditioned.mapped(z)).float().expand(8, -1, -1)
    v, angle, target = noisy(w, TrainingOptions(), generator)
    with torch.no_grad():
        output = conditioned.network(v, angle, *conditioned.context) if conditioned.network else 0.0
    losses = (output - target).square().mean((0, 2))
    return float(losses.mean()), float(losses.std() / len(losses)**0.5)


def score(denoiser: Denoiser, z: Tensor, y: Tensor, noise: Noise, scale: Tensor) -> np.ndarray:
    """Energy score of samples of sqrt(m) in L2, in units of the prior's spread; one for each pair."""
    y = noise.sample(y, torch.Generator().manual_seed(2))
    drawn = sample_latents(denoiser.at(y), DRAWS, seed=3, progress=False)
    return energy_score((drawn * scale).numpy(), (z * scale).numpy())


def run(folder: Path, pairs: int = 40000, seconds: float = 100.0, seeds: tuple[int, ...] = (0, 1),
        modes: int = 64, unseen: int = 1000) -> dict[tuple[str, int], np.ndarray]:
    """Train all networks for equal time and print a row for each."""
    sys.path.insert(0, str(DEMO))
    from source_release import training_pairs
    problem, basis, data, _, _ = training_pairs(folder, pairs, modes)
    noise = problem.noise
    torch.set_num_threads(1)
    z, y = torch.from_numpy(basis.encode(data.coefficients)), torch.as_tensor(data.readings)
    del data  # nodal values fill most of the memory
    scale = torch.as_tensor(np.sqrt(basis.variances / basis.variances.sum()))
    geometry = field_geometry(basis)
    z, z_new, y, y_new = z[:-unseen], z[-unseen:], y[:-unseen], y[-unseen:]
    print(f"{len(z)} pairs, {basis.r} latents, {y.shape[1]} measurements, {geometry.modes.shape[1]} points\n\n"
          "| network, width | seed | weights | ms a step | steps | seconds | loss on unseen pairs | energy score |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)
    scores = {}
    for seed in seeds:
        for name, (on_mesh, width) in NETWORKS.items():
            where = geometry if on_mesh else None
            probe = TrainingOptions(width=width, seed=seed)
            step = step_time(z, y, noise, probe, where)
            steps = round(seconds / step)
            options = TrainingOptions(steps=steps, width=width, seed=seed, validation_fraction=0.02,
                                      evaluate_every=-(-steps // 4))
            start = time.process_time()
            denoiser, _ = fit_denoiser(z, y, noise, network=where and "field", options=options, geometry=where,
                                       progress=False)
            spent = time.process_time() - start
            weights = sum(p.numel() for p in denoiser.network.parameters()) if denoiser.network else 0
            loss, error = denoising_loss(denoiser, z_new, y_new, noise)
            scores[name, seed] = values = score(denoiser, z_new[:SCORED], y_new[:SCORED], noise, scale)
            print(f"| {name} | {seed} | {weights:,} | {1e3 * step:.1f} | {steps} | {spent:.0f} "
                  f"| {loss:.3f} ± {error:.3f} | {values.mean():.4f} ± {values.std() / SCORED**0.5:.4f} |", flush=True)
        ours, *others = (scores[name, seed] for name in NETWORKS)
        best = min(others, key=np.mean)
        print(f"\nseed {seed}: energy score of the best fully connected network minus that of the one on the mesh, "
              f"pair by pair: {(best - ours).mean():.4f} ± {(best - ours).std() / SCORED**0.5:.4f}\n", flush=True)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=DEMO / "output")
    parser.add_argument("--pairs", type=int, default=40000)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments, _ = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    run(arguments.output, arguments.pairs, arguments.seconds, arguments.seeds)
