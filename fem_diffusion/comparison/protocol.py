"""The comparison protocol: formulations times samplers times numbers of network evaluations, resumable.

A training makes one denoiser; a combination is one way to sample it. Every finished combination is a row in a file, on
the disk before the next one starts, and every training keeps its checkpoint. So a crash loses the combination in work,
and the same call goes on where it stopped. `compare` runs the protocol on joint samples of your own;
benchmarks with exact conditionals call `run_protocol` with scores of their own.

All combinations of one training share the seed of the sampler. Samplers of the ODE that start from the same noise then
converge to the same samples, so their errors can be compared to far below the noise of a set of samples. Nothing but
formulations and samplers is compared: the emulator corrects no samples, and a hard support of the latents is left out,
as it would draw some samples again, at a cost beyond the budget.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fem_diffusion import files
from fem_diffusion.checks import (
    LARGEST, check_all, check_array, check_callable, check_count, check_flag, check_options, check_path, check_seed,
    check_text,
)
from fem_diffusion.comparison.combinations import Combination, Plan
from fem_diffusion.comparison.report import summarise, write_csv, write_markdown
from fem_diffusion.diffusion import (
    Conditioned, Denoiser, Noise, Sampler, ScoreNetwork, TrainingOptions, as_noise, fit_denoiser,
    sample_latents,
)
from fem_diffusion.diffusion.base.emulator import spread
from fem_diffusion.diffusion.checks import check_pairs, check_tensor
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.progress import bar
from fem_diffusion.trust.calibration import calibrate

__all__ = ["Training", "compare", "run_protocol"]


@dataclass(frozen=True)
class Training:
    """One denoiser and all the ways to sample it.

    Parameters
    ----------
    problem, base, seed : str, str, int
        For tables and files, and the seed of the training and its samples; together they name the training.
    fit : Callable[[Path], Denoiser]
        Trains, given the path of a checkpoint.
    measurements, draws : Tensor, int
        Of shape (m, k), and the number n of samples for each of them.
    score : Callable[[numpy.ndarray, Combination], dict]
        Maps the samples (m, n, r), which may not be finite, to numbers; the same names for every combination.
    combinations : tuple of Combination
        What to run.

    InputError is raised if an argument is of the wrong kind, or there are no measurements.
    """

    problem: str
    base: str
    seed: int
    fit: Callable[[Path], Denoiser]
    measurements: Tensor
    draws: int
    score: Callable[[np.ndarray, Combination], dict[str, float]]
    combinations: tuple[Combination, ...]

    def __post_init__(self):
        check_text(self.problem, "problem")
        check_text(self.base, "base")
        check_callable(self.fit, "fit", "a function that trains")
        check_callable(self.score, "score", "a function of samples and their combination")
        if not len(check_tensor(self.measurements, "measurements", ("m", "k"), "sensors")):
            raise InputError("There are no measurements: give at least one row.")
        for name, value in (("seed", check_seed(self.seed)), ("draws", check_count(self.draws, "draws")),
                            ("combinations", check_all(self.combinations, "combinations", Combination))):
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.problem}-{self.base}-{self.seed}"


def run_protocol(trainings: Iterable[Training], folder: str | os.PathLike, settings: dict, *,
                 progress: bool = True) -> list[dict]:
    """Run every combination of every training that `folder` does not hold yet; returns all their rows, values as text.

    Parameters
    ----------
    trainings : iterable of Training
        With names of their own.
    folder : path
        Where rows (rows/*.safetensors) and checkpoints (models/*.safetensors) are kept; made where it does not exist.
    settings : dict
        What the rows depend on besides their names, in JSON types, none of them called "signatures"; a folder made
        under other settings is refused. Combinations and seeds may be added later; a name of a formulation or sampler
        stands for one and the same in all the life of the folder, and its signature is kept with the settings.

    InputError is raised if the folder belongs to other settings, these are not in JSON types, two trainings share a
    name, or the name of a formulation or sampler stands for another one in the folder; FileError if a file is damaged
    or cannot be written, or another run works in the folder.
    """
    trainings, folder = check_all(trainings, "trainings", Training), check_path(folder, "folder")
    check_flag(progress, "progress")
    if len({training.name for training in trainings}) < len(trainings):
        raise InputError("Two trainings share problem, base and seed; give each its own.")
    try:
        if not isinstance(settings, dict) or "signatures" in settings:
            raise TypeError("no dict without the key 'signatures'")
        settings = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise InputError(f"settings cannot be written as JSON ({error}): give a dict of words, numbers and lists of "
                         "them.") from error
    for part in ("rows", "models"):
        files.make_folder(folder / part)
    cells = [c for training in trainings for c in training.combinations]
    # The bar counts evaluations, most of the time; scores and training take about as long as so many more.
    with (files.locked(folder / "in_use.lock", f"The folder {folder}"),
          bar(sum(map(_work, cells)), "compare", progress) as shown):
        _claim(folder / "settings.safetensors", settings, cells)
        return [row for training in trainings for row in _run_training(training, folder, shown)]


def _work(combination: Combination) -> int:
    return 40 + combination.budget


def _run_training(training: Training, folder: Path, shown: tqdm) -> list[dict]:
    """Rows of a training, old and new."""
    path = folder / "rows" / f"{training.name}.safetensors"
    rows = {(row["formulation"], row["sampler"], row["budget"]): row for row in _read(path)}
    missing = [c for c in training.combinations if c.key not in rows]
    shown.update(sum(_work(c) for c in training.combinations if c.key in rows))
    if missing:
        shown.set_description(f"train {training.name}")
        denoiser = training.fit(folder / "models" / f"{training.name}.safetensors")
        conditioned = replace(denoiser.at(training.measurements), support=None)
    for combination in missing:
        shown.set_description(f"{training.name}: {' '.join(combination.key)}")
        row = _row(training, combination, conditioned)
        rows[combination.key] = {name: str(value) for name, value in row.items()}
        files.write(path, "rows", {}, {"rows": list(rows.values())})
        shown.update(_work(combination))
    return [rows[c.key] for c in training.combinations]


def _row(training: Training, combination: Combination, conditioned: Conditioned) -> dict:
    """Sample, score, and put together one line."""
    sampler, network = replace(combination.sampler, corrections=0), conditioned.network
    counter = None if network is None else _Counter(network)
    # One seed for all combinations of a training, another for each problem: chance must not agree across problems.
    seed = zlib.crc32(f"{training.problem} {training.seed}".encode())
    start = time.perf_counter()
    try:
        z = sample_latents(replace(conditioned, network=counter), training.draws, sampler, seed=seed,
                           progress=False).cpu().numpy()
    except SolveError:
        z = np.full((len(conditioned), training.draws, conditioned.r), np.nan)
    seconds = time.perf_counter() - start
    cost = counter.rows / (len(conditioned) * training.draws) if counter else 0
    if counter is None and sampler.method != "adaptive":
        cost = sampler.evaluations
    formulation, name, budget = combination.key
    scores = {key: f"{value:.6g}" for key, value in training.score(z, combination).items()}
    return {"problem": training.problem, "base": training.base, "formulation": formulation, "sampler": name,
            "alpha": "varies" if callable(sampler.alpha) else sampler.alpha, "coordinates": sampler.coordinates,
            "nodes": sampler.nodes, "budget": budget, "evaluations": round(cost), "seed": training.seed,
            "seconds": f"{seconds:.4g}", **scores}


class _Counter(nn.Module):
    """A network that counts the rows it evaluates."""

    def __init__(self, network: ScoreNetwork):
        super().__init__()
        self.network, self.rows = network, 0
        self.dtype, self.row_size = network.dtype, getattr(network, "row_size", 0)
        self.see, self.context = network.see, network.context

    def forward(self, v: Tensor, angle: Tensor, *context: Tensor) -> Tensor:
        self.rows += v.shape[0] * v.shape[1]
        return self.network(v, angle, *context)


def _claim(path: Path, settings: dict, combinations: Sequence[Combination]) -> None:
    """Write the settings of a new folder, or compare them with those of an old one; add signatures of new names."""
    before, signatures = settings, {"formulations": {}, "samplers": {}}
    if path.exists():
        content = files.read(path, "settings", f"Delete {path.parent}, or name another folder.")
        before, signatures = content.value("settings", dict), content.value("signatures", dict)
        if set(signatures) != {"formulations", "samplers"} or not all(isinstance(x, dict) for x in signatures.values()):
            raise content.error("holds no signatures")
    if before != settings:
        names = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
        raise InputError(f"{path.parent} holds results for other settings ({', '.join(names)}). Name another "
                         "folder, or delete it.")
    formulations = {id(f): f for c in combinations if (f := c.sampler.formulation) is not None}.values()
    for group, name, signature in (*(("formulations", f.name, _numbers(f.sigma, f.scaling)) for f in formulations),
                                   *(("samplers", c.name, _signature(c.sampler)) for c in combinations)):
        if signatures[group].setdefault(name, signature) != signature:
            raise InputError(f"{path.parent} knows another one of the {group} as {name!r}, whose rows cannot "
                             "stand for this one. Give it a name of its own, or name another folder.")
    files.write(path, "settings", {}, {"settings": settings, "signatures": signatures})


def _signature(sampler: Sampler) -> str:
    """What the name of a sampler stands for."""
    alpha = _numbers(sampler.alpha) if callable(sampler.alpha) else sampler.alpha
    return f"{sampler.method} {alpha} {sampler.coordinates} {sampler.nodes}"


def _numbers(*functions: Callable[[Tensor], Tensor]) -> str:
    """Fingerprint of functions of time, equal on all machines: numbers count to ten digits."""
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    text = " ".join(f"{x:.9e}" for f in functions for x in f(t.clone()).tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> list[dict]:
    """Rows of a file, none where there is no file."""
    if not path.exists():
        return []
    content = files.read(path, "rows", "Delete it and run again.")
    rows = content.value("rows", list)
    if not all(isinstance(row, dict) and {"formulation", "sampler", "budget"} <= set(row)
               and all(isinstance(value, str) for value in row.values()) for row in rows):
        raise content.error("holds no rows of this protocol")
    return rows


def compare(z: Tensor | np.ndarray, y: Tensor | np.ndarray, folder: str | os.PathLike, *,
            noise: Noise | float | None = None, plan: Plan = Plan(),
            options: TrainingOptions = TrainingOptions(), progress: bool = True) -> list[dict]:
    """Compare formulations and samplers on joint samples of your own, scored on held-out pairs.

    One network is trained for each seed and base. No exact conditional is needed: the energy score (lower is better,
    proper), the p-value of simulation-based calibration and the coverage of central intervals come from pairs that no
    training has seen.

    Parameters
    ----------
    z, y : Tensor or numpy.ndarray
        Latents, shape (n, r), and noise-free readings, shape (n, k), or measurements where `noise` is None.
    folder : path
        For rows, checkpoints, results.csv, summary.csv and summary.md; the same call continues what is there.
    noise : Noise, float or None
        Noise model, or the standard deviation of Gaussian noise; None where `y` already holds noise.
    plan : Plan
        What is compared; formulations, samplers, budgets, seeds and bases may be added to a folder later.
    options : TrainingOptions
        Of every training; the seed is replaced.

    Returns
    -------
    list of dict
        Means over seeds and their spread, one for each base, formulation, sampler and budget; energy scores in
        standard deviations of the latents.

    Errors are those of `run_protocol`, and InputError if shapes disagree, or too few pairs remain for training.
    """
    # The protocol runs on the CPU; `options.device` says where training does.
    z, y = torch.from_numpy(check_array(z, "z", ("n", "r"))), torch.from_numpy(check_array(y, "y", ("n", "k")))
    check_options(plan, Plan, "plan")
    check_options(options, TrainingOptions).check()
    folder, held_out, noise = check_path(folder, "folder"), plan.held_out, as_noise(noise, y.shape[1])
    if len(z) != len(y) or held_out >= len(z):
        raise InputError(f"Joint samples z (n, r) and y (n, k) with n > held_out are needed, not {tuple(z.shape)}, "
                         f"{tuple(y.shape)} and held_out = {held_out}.")
    check_pairs(z, y)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    test, rest = order[:held_out], order[held_out:]
    # Each latent counts alike in a score, whatever its unit.
    unit = spread(z[rest] - z[rest].mean(0)).numpy()
    measured = y[test] if noise is None else noise.sample(y[test], torch.Generator().manual_seed(1))

    def training(base: str, seed: int) -> Training:
        def fit(file: Path) -> Denoiser:
            mine = replace(options, seed=seed)
            return fit_denoiser(z[rest], y[rest], noise, base=base, options=mine, checkpoint=file,
                                progress=False)[0]
        return Training("data", base, seed, fit, measured, plan.draws, score, plan.combinations)

    def score(samples: np.ndarray, _: Combination) -> dict[str, float]:
        return _held_out_scores(samples / unit, z[test].numpy() / unit)
    settings = {"data": _digest(z, y, measured), "held_out": held_out, "draws": plan.draws, "scores": "standardised",
                "options": asdict(replace(options, seed=0))}
    rows = run_protocol([training(base, seed) for base in plan.bases for seed in plan.seeds], folder, settings,
                        progress=progress)
    summary = summarise(rows)
    write_csv(rows, folder / "results.csv")
    write_csv(summary, folder / "summary.csv")
    write_markdown(rows, folder / "summary.md", "energy_score")
    return summary


def _held_out_scores(samples: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Energy score, calibration and coverage of samples (m, n, r) for truths (m, r); infinite scores if not finite."""
    names = [f"sbc_p_{i + 1}" for i in range(truth.shape[1])]
    if not (np.abs(samples) < LARGEST).all():
        return {"energy_score": np.inf, "coverage_50": np.nan, "coverage_90": np.nan, "sbc_p": 0.0,
                **dict.fromkeys(names, 0.0)}
    result = calibrate(samples, truth)
    return {"energy_score": result.energy_score.mean(), "coverage_50": result.coverage[0.5],
            "coverage_90": result.coverage[0.9], "sbc_p": result.p_value, **dict(zip(names, result.p_values))}


def _digest(*parts: Tensor) -> str:
    """Fingerprint of tensors."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
