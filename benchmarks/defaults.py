"""Are the defaults of training tuned to one problem? Each setting on a spread of problems, in the same time.

    python benchmarks/defaults.py [--quick] [--problems NAME ...] [--settings NAME ...] [--seeds 0 ...]

Each setting changes one default: learning rate, width, stopping rule, number of members. What a step costs beside one
of the default is measured, and the steps of every setting are as many as take the time of the default's. The loss is
that of denoising on 10,000 fresh pairs. The regret of a setting is its loss above that of the best one of the problem,
as a share of what the best takes off the loss of the Gaussian base. In the last row the setting is the one with the
least mean regret on all other problems: where it does as well as the default, neither was tuned to the problem.

Every finished run is a file; the same command runs what is missing, and several commands may share the work.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fem_diffusion import files
from fem_diffusion.comparison import write_csv
from fem_diffusion.diffusion import Denoiser, LayoutFamily, LayoutKind, TrainingOptions, fit_denoiser
from fem_diffusion.diffusion.training.denoising import noisy
from problems import PROBLEMS

DEFAULT = TrainingOptions()
# What each setting changes.
SETTINGS = {name: change for name, change in {
    "default": {},
    "rate / 4": {"learning_rate": DEFAULT.learning_rate / 4},
    "rate / 2": {"learning_rate": DEFAULT.learning_rate / 2},
    "rate x 2": {"learning_rate": DEFAULT.learning_rate * 2},
    "width 64": {"width": 64},
    "width 256": {"width": 256},
    "patience 4": {"patience": 4},
    "patience 16": {"patience": 16},
    "half the steps": {"steps": DEFAULT.steps // 2},
    "1 member": {"members": 1},
    "3 members": {"members": 3},
    "3 members of width 64": {"members": 3, "width": 64},
    "3 members, small batches": {"members": 3, "batch": -(-DEFAULT.batch // 3)},
}.items() if name == "default" or any(getattr(DEFAULT, key) != value for key, value in change.items())}
TESTED, DRAWS, TIMED = 10000, 8, 30


@dataclass(frozen=True, eq=False)
class Joint:
    """A problem of this benchmark: pairs for training, their number, and what `fit_denoiser` is told of the noise."""

    pairs: int
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    family: LayoutFamily | None = None


def _canonical(name: str) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return lambda n, seed: tuple(torch.from_numpy(x) for x in PROBLEMS[name].draw(n, seed))  # pyright: ignore


def squared_field(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Twenty amplitudes of a field on a line, and twelve noisy readings of its smoothed square."""
    g = torch.Generator().manual_seed(seed)
    x, modes = torch.linspace(0, 1, 101, dtype=torch.float64), torch.arange(20, dtype=torch.float64)
    std = 1 / (1 + (0.6 * modes)**2)
    shapes = std[:, None] * torch.cos(math.pi * modes[:, None] * x) / std.norm()
    centres = torch.linspace(0.05, 0.95, 12, dtype=torch.float64)
    kernel = torch.exp(-(centres[:, None] - x).square() / (2 * 0.1**2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    z = torch.randn(n, 20, generator=g, dtype=torch.float64)
    clean = (0.5 + z @ shapes).square() @ kernel.T
    return z, clean + 0.05 * torch.randn(clean.shape, generator=g, dtype=torch.float64)


def bent(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three latents and two state coordinates of unit variance that are not affine in them."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    first = (torch.exp(0.5 * z[:, 0]) - math.exp(0.125)) / math.sqrt(math.exp(0.25) * (math.exp(0.25) - 1))
    return z, torch.stack([first, (z[:, 1] + 0.5 * z[:, 0] * z[:, 2]) / math.sqrt(1.25)], 1)


def any_sensors() -> LayoutFamily:
    """One to eight sensors that look into every direction of two state coordinates."""
    turn = torch.linspace(0, math.pi, 65, dtype=torch.float64)[:-1]
    rows = torch.stack([torch.cos(turn), torch.sin(turn)], 1)[:, None]
    return LayoutFamily((LayoutKind(rows, 0 * turn[:, None], torch.full((2, 64, 1), 0.3).double(), (1, 8)),))


SPREAD = {
    "bimodal": Joint(2000, _canonical("bimodal")), "heteroscedastic": Joint(10000, _canonical("heteroscedastic")),
    "spiral": Joint(10000, _canonical("spiral")), "banana": Joint(1000, _canonical("banana")),
    "mixture": Joint(4000, _canonical("mixture")), "mixture-10d": Joint(10000, _canonical("mixture-10d")),
    "heavy-tailed": Joint(4000, _canonical("heavy-tailed")), "squared-field": Joint(4000, squared_field),
    "any-sensors": Joint(4000, bent, any_sensors()),
}
SIZES = {"full": (list(SPREAD), DEFAULT),
         "quick": (["banana", "heteroscedastic", "squared-field"],
                   replace(DEFAULT, steps=DEFAULT.steps // 10, evaluate_every=DEFAULT.evaluate_every // 5))}


def fit(problem: Joint, options: TrainingOptions) -> tuple[Denoiser, int]:
    """The default call with these options; also the number of steps."""
    z, y = problem.draw(problem.pairs, 1)
    denoiser, history = fit_denoiser(z, y, problem.family, options=options, progress=False)
    return denoiser, (history.step or [0])[-1]


def losses(problem: Joint, denoiser: Denoiser) -> tuple[float, float]:
    """Loss on fresh pairs, and that of the base alone."""
    z, y = problem.draw(TESTED, 2)
    generator, found = torch.Generator().manual_seed(3), []
    for z, y in zip(z.split(1000), y.split(1000)):
        layout = None if problem.family is None else problem.family.draw(len(y), generator)
        conditioned = denoiser.at(y if layout is None else layout.measure(y, generator), layout)
        w = conditioned.located.whiten(z).float().expand(DRAWS, -1, -1)
        v, angle, target = noisy(w, DEFAULT, generator)
        with torch.no_grad():
            output = 0 * v if denoiser.network is None else denoiser.network(v, angle, *conditioned.context)
        found.append(torch.stack([(output - target).square().mean(), target.square().mean()]))
    return tuple(torch.stack(found).mean(0).tolist())  # pyright: ignore[reportReturnType]


@cache
def cost(problem: Joint, options: TrainingOptions, like: TrainingOptions) -> float:
    """Processor time of a step over that of a step with the options `like`: median of several turns."""
    def seconds(options: TrainingOptions) -> float:
        spent = []
        for steps in (1, 1 + TIMED):
            start = time.process_time()
            fit(problem, replace(options, steps=steps, evaluate_every=steps))
            spent.append(time.process_time() - start)
        return spent[1] - spent[0]
    # Few pairs are held out, as evaluations are no steps.
    options, like = (replace(x, validation_fraction=1e-6) for x in (options, like))
    return float(np.median([seconds(options) / seconds(like) for _ in range(3)]))


def run(name: str, setting: str, seed: int, size: TrainingOptions) -> dict:
    """One row: losses, steps, and the time of the run in units of that of the default's steps."""
    problem, change = SPREAD[name], dict(SETTINGS[setting])
    if "steps" in change:
        change["steps"] = round(size.steps * change["steps"] / DEFAULT.steps)
    options = replace(size, **change, seed=seed)
    work = {key: change[key] for key in ("width", "members", "batch") if key in change}
    # Sensors alone need attention; otherwise a step costs the same on all problems, but for chance.
    like = problem if problem.family else SPREAD["squared-field"]
    ratio = cost(like, replace(size, **work), size) if work else 1.0
    options = replace(options, steps=max(1, round(options.steps / ratio)),
                      evaluate_every=max(1, round(options.evaluate_every / ratio)))
    begun = time.process_time()
    denoiser, steps = fit(problem, options)
    spent = time.process_time() - begun
    loss, base = losses(problem, denoiser)
    return {"problem": name, "setting": setting, "seed": seed, "loss": loss, "base": base, "steps": steps,
            "cost": ratio, "time": steps * ratio / size.steps, "seconds": spent}


def regrets(rows: list[dict]) -> dict[tuple[str, str], float]:
    """Mean regret over the seeds, by setting and problem."""
    found = {}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        mean = {setting: float(np.mean([row["loss"] for row in chosen if row["setting"] == setting]))
                for setting in dict.fromkeys(row["setting"] for row in chosen)}
        best, base = min(mean.values()), chosen[0]["base"]
        found |= {(setting, problem): (loss - best) / max(base - best, 1e-12) for setting, loss in mean.items()}
    return found


def table(rows: list[dict]) -> str:
    """Markdown: regret of each setting on each problem, mean, largest, and the share of the time that was used."""
    found = regrets(rows)
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    settings = [name for name in SETTINGS if all((name, problem) in found for problem in problems)]

    def line(name: str, values: list[float], spent: str) -> str:
        cells = [f"{value:.1%}" for value in (*values, float(np.mean(values)), max(values))]
        return f"| {name} | {' | '.join(cells)} | {spent} |"
    lines = [f"| regret | {' | '.join(problems)} | mean | largest | time |", "|---" * (len(problems) + 4) + "|"]
    for name in settings:
        spent = float(np.mean([row["time"] for row in rows if row["setting"] == name]))
        lines.append(line(name, [found[name, problem] for problem in problems], f"{spent:.2f}"))
    if len(problems) > 1 and settings:
        others = [min(settings, key=lambda s: sum(found[s, q] for q in problems if q != p)) for p in problems]
        lines.append(line("best on the others", [found[name, p] for name, p in zip(others, problems)], ""))
        lines.append(f"\nBest on the other problems: {', '.join(f'{p}: {s}' for p, s in zip(problems, others))}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, fewer problems")
    parser.add_argument("--problems", nargs="+", choices=SPREAD)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "defaults")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = "quick" if arguments.quick else "full"
    problems, options = SIZES[size]
    folder = arguments.output / size
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        for setting in arguments.settings:
            for name in arguments.problems or problems:
                file = folder / f"{name}-{setting.replace(' ', '_').replace('/', 'by')}-{seed}.safetensors"
                told = {"options": asdict(replace(options, device="cpu")), "change": SETTINGS[setting],
                        "pairs": SPREAD[name].pairs}
                if file.exists():
                    content = files.read(file, "run", "Delete it and run again.")
                    if content.value("told", dict) == told:
                        rows.append(content.value("row", dict))
                        continue
                row = run(name, setting, seed, options)
                files.write(file, "run", {}, {"told": told, "row": row})
                rows.append(row)
                print(f"{name}, {setting}, seed {seed}: loss {row['loss']:.4f}, base {row['base']:.4f}, "
                      f"{row['steps']} steps of {row['cost']:.2f}, {row['seconds']:.0f} s", flush=True)
    write_csv(rows, folder / "runs.csv")
    print(table(rows))
    files.write_bytes(folder / "table.md", f"{table(rows)}\n".encode())


if __name__ == "__main__":
    main()
