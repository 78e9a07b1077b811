"""Does long training shrink the posterior? The training loop of this package against a naive one.

A linear-Gaussian problem with few pairs, whose posterior variance is known. The base is switched off, so the network
has to learn all of it. The naive loop is the usual one: measurements with noise drawn once, no held-out pairs, the
weights of the last step. Each loop trains for as many steps as ours takes before it stops by itself, and for ten times
as many, where ours is not allowed to stop.

    python benchmarks/collapse.py [--pairs 300] [--output FOLDER]

Printed and drawn: the variance of samples over the exact posterior variance (1 is right), at measurements of the
training set and at new ones, and the two ratios of the collapse monitor.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from fem_diffusion.comparison import write_csv
from fem_diffusion.diffusion import (
    CollapseWarning, Denoiser, GaussianNoise, Layout, ResidualMLP, Sampler, TrainingOptions, fit_denoiser, linear_base,
    measure_collapse, plain_base, sample_latents,
)
from fem_diffusion.progress import bar

LATENTS, SENSORS, NOISE = 4, 2, 0.3
FIELDS = ("loop", "steps", "training", "new", "spread_ratio", "neighbour_ratio")


def problem(n: int, seed: int) -> tuple[Tensor, Tensor, Denoiser]:
    """Latents (n, 4), noise-free readings (n, 2) and the exact posterior."""
    g = torch.Generator().manual_seed(0)
    operator = torch.randn(SENSORS, LATENTS, generator=g, dtype=torch.float64)
    z = torch.randn(n, LATENTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, z @ operator.T, Denoiser(linear_base(operator, NOISE**2 * torch.eye(SENSORS, dtype=torch.float64)))


def naive(z: Tensor, y: Tensor, steps: int, width: int, depth: int, progress: bool = False) -> Denoiser:
    """Denoising score matching as it is usually written down, on measurements (n, 2) that hold their noise."""
    base = plain_base(z, y, torch.zeros(SENSORS, SENSORS))
    w, features = base.locate(Layout.readings(SENSORS, y), y).whiten(z).float(), base.features(y).float()
    g = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = ResidualMLP(LATENTS, SENSORS, width, depth)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    with bar(steps, "naive loop", progress) as shown:
        for _ in range(steps):
            index = torch.randint(len(w), (256,), generator=g)
            angle = torch.arctan(torch.exp(1.2 * torch.randn(256, 1, generator=g)))
            white = torch.randn(256, LATENTS, generator=g)
            cosine, sine = torch.cos(angle), torch.sin(angle)
            output = network(cosine * w[index] + sine * white, angle, features[index])
            optimiser.zero_grad()
            (output - (sine * w[index] - cosine * white)).square().mean().backward()
            optimiser.step()
            shown.update()
    return Denoiser(base, network.eval().requires_grad_(False))


def variance_ratio(denoiser: Denoiser, exact: Denoiser, y: Tensor) -> float:
    """Variance of 64 samples for each of up to 200 measurements (m, 2), over the exact posterior variance."""
    z = sample_latents(denoiser.at(y[:200]), 64, Sampler(steps=40, method="heun"), seed=2, progress=False)
    # In coordinates in which the exact posterior has variance one, whatever the measurement.
    return float(exact.at(y[:200]).located.whiten(z.transpose(0, 1)).var(0).mean())


def run(pairs: int = 300, width: int = 128, depth: int = 3, progress: bool = True) -> list[dict]:
    """Rows of the table."""
    z, clean, exact = problem(pairs, seed=1)
    new, unseen, _ = problem(400, seed=2)
    noise, g = GaussianNoise(std=NOISE), torch.Generator().manual_seed(3)
    fixed, unseen = noise.sample(clean, g), noise.sample(unseen, g)
    settings = TrainingOptions(width=width, depth=depth)

    def ours(noise: GaussianNoise | None, y: Tensor, steps: int) -> Denoiser:
        options = replace(settings, steps=steps, patience=steps)
        return fit_denoiser(z, y, noise, base="plain", options=options, progress=progress)[0]
    enough = fit_denoiser(z, clean, noise, base="plain", options=settings, progress=progress)[1].step[-1]
    rows = []
    for steps in (enough, 10 * enough):
        for loop, train in {"naive": lambda n: naive(z, fixed, n, width, depth, progress),
                            "ours, noise known": lambda n: ours(noise, clean, n),
                            "ours, noise in the data": lambda n: ours(None, fixed, n)}.items():
            with warnings.catch_warnings():
                # The warning is what the naive loop is here to show; the numbers are in the table.
                warnings.simplefilter("ignore", CollapseWarning)
                denoiser = train(steps)
            collapse = measure_collapse((denoiser.at(fixed), z), (denoiser.at(unseen), new), z)
            rows.append(dict(zip(FIELDS, (loop, steps, variance_ratio(denoiser, exact, fixed),
                                          variance_ratio(denoiser, exact, unseen), collapse.spread_ratio,
                                          collapse.neighbour_ratio))))
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """Bars of the variance ratio at training measurements, short and long training side by side."""
    loops = list(dict.fromkeys(row["loop"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, (shift, colour) in enumerate(zip((-0.2, 0.2), ("tab:blue", "tab:orange"))):
        chosen = [row for row in rows if row["loop"] == loops[0]][number]["steps"]
        values = [next(r["training"] for r in rows if r["loop"] == loop and r["steps"] == chosen) for loop in loops]
        bars = axes.bar([i + shift for i in range(len(loops))], values, 0.38, color=colour,
                        label=f"{chosen} steps" + ("" if number == 0 else ", ten times what is needed"))
        axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="exact posterior")
    axes.set(xticks=range(len(loops)), xticklabels=loops, ylim=(0, 1.45),
             ylabel="posterior variance at training\nmeasurements / exact variance")
    axes.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "collapse")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = run(arguments.pairs)
    write_csv(rows, arguments.output / "collapse.csv")
    print("| loop | steps | variance / exact, training | new | spread ratio | neighbour ratio |")
    print("|---|---|---|---|---|---|")
    line = "| {loop} | {steps} | {training:.3f} | {new:.3f} | {spread_ratio:.2f} | {neighbour_ratio:.2f} |"
    for row in rows:
        print(line.format(**row))
    draw(rows, arguments.output / "collapse.png")


if __name__ == "__main__":
    main()
