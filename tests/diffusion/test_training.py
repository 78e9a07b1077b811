"""Training: reproducible, resumable, never worse than the base, better where the problem is not linear."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion import files
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import _loop
from fem_diffusion.diffusion import (
    METHODS, CollapseWarning, Denoiser, GaussianNoise, TrainingOptions, constant_moment, fit_base, fit_denoiser,
    linear_base, measure_collapse, sample_latents, straight_line, sub_variance_preserving, train,
    variance_exploding, variance_preserving,
)
from fem_diffusion.errors import InputError, FileError, SolveError

QUICK = TrainingOptions(steps=400, evaluate_every=100, width=32, depth=2, batch=128)
NOISE = GaussianNoise(std=0.1)


def _pairs(n=600, nonlinear=True):
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = z[:, :2]**2 if nonlinear else z[:, :2] + z[:, 2:]
    return z, y, fit_base(z, y, NOISE.covariance(y), standard_prior=True)


def _weights(denoiser):
    return torch.cat([x.flatten() for x in denoiser.network.parameters()])


def _assert_same(first, second):
    """The same run up to rounding, which in single precision depends on where tensors lie in memory."""
    (one, history), (two, other) = first, second
    assert history.step == other.step and history.best_step == other.best_step
    for name in ("train", "validation", "base"):
        np.testing.assert_allclose(getattr(history, name), getattr(other, name), rtol=1e-5)
    torch.testing.assert_close(_weights(one), _weights(two), rtol=0, atol=1e-5)


def test_a_seed_reproduces_the_run():
    z, y, base = _pairs()
    _assert_same(train(z, y, NOISE, base, QUICK), train(z, y, NOISE, base, QUICK))
    other, _ = train(z, y, NOISE, base, replace(QUICK, seed=1))
    assert (_weights(other) - _weights(train(z, y, NOISE, base, QUICK)[0])).abs().max() > 0.01


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path, monkeypatch):
    z, y, base = _pairs()
    whole = train(z, y, NOISE, base, QUICK)
    save = _loop.Loop._save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt
    monkeypatch.setattr(_loop.Loop, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(z, y, NOISE, base, QUICK, checkpoint=tmp_path / "state")
    monkeypatch.setattr(_loop.Loop, "_save", save)
    _assert_same(whole, train(z, y, NOISE, base, QUICK, checkpoint=tmp_path / "state"))


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    z, y, base = _pairs()
    file = tmp_path / "state"
    train(z, y, NOISE, base, QUICK, checkpoint=file)
    with pytest.raises(FileError, match="other data, noise or options"):
        train(z + 1, y, NOISE, base, QUICK, checkpoint=file)
    with pytest.raises(FileError, match="other data, noise or options"):
        train(z, y, GaussianNoise(std=0.2), base, QUICK, checkpoint=file)
    # Random numbers of another device are others; nothing else is compared before.
    state = files.read(file, "checkpoint", "")
    files.write(file, "checkpoint", state.arrays | {"marks": np.ones((1, 2))}, state.values | {"device": "cuda"})
    with pytest.raises(FileError, match="resume with TrainingOptions\\(device='cuda'\\)"):
        train(z, y, NOISE, base, QUICK, checkpoint=file)
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b"not a checkpoint", b""):
        file.write_bytes(broken)
        with pytest.raises(FileError, match="is damaged|no file that fem_diffusion reads"):
            train(z, y, NOISE, base, QUICK, checkpoint=file)
        assert file.read_bytes() == broken


def test_linear_gaussian_problem_stays_exact():
    z, y, base = _pairs(nonlinear=False)
    denoiser, _ = train(z, y, NOISE, base, QUICK)
    measurement = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    operator = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    exact = linear_base(operator, 0.01 * torch.eye(2, dtype=torch.float64))
    samples = sample_latents(denoiser, measurement.expand(4000, 2), variance_preserving(), steps=1,
                             generator=torch.Generator().manual_seed(0))
    mean, covariance = exact.mean(measurement.double())[0].numpy(), exact.covariance.numpy()
    assert min(moment_p_values(samples.double().numpy(), mean, covariance)) > 1e-4


def test_network_learns_what_the_base_cannot():
    # z_i^2 is measured: the posterior is known and has two modes, of which the base sees nothing.
    noise, n = GaussianNoise(std=0.5), 2000
    z, y, _ = _pairs(4000)
    base = fit_base(z, y, noise.covariance(y), standard_prior=True)
    denoiser, history = train(z, y, noise, base, TrainingOptions(steps=1500, width=64, depth=2))
    assert min(history.validation) < 0.9 * history.base
    y0 = torch.tensor([[2.0, 1.5]], dtype=torch.float64).expand(n, 2)
    grid = np.linspace(-4, 4, 4001)
    exact = [np.exp(-grid**2 / 2 - (grid**2 - reading)**2 / (2 * 0.25)) for reading in (2.0, 1.5)]

    def distance(model, *others, **settings):
        """Largest Kolmogorov-Smirnov distance of the two latents that are seen."""
        z = sample_latents(model, y0, *others, generator=torch.Generator().manual_seed(0), **settings).numpy()
        return max(np.abs((z[:, i, None] <= grid).mean(0) - np.cumsum(p) / p.sum()).max() for i, p in enumerate(exact))
    # Twice the Kolmogorov-Smirnov bound at level 1e-4, 0.10; the base alone is 0.25 away.
    bound = 2 * 2.23 / np.sqrt(n)
    assert distance(denoiser) < bound and distance(denoiser, alpha=1.0) < bound
    assert distance(Denoiser(base, None), steps=1) > bound
    # One network, trained once, has the same law under every formulation.
    for formulation in (variance_exploding(), variance_exploding(0.01, 10.0, "linear"), variance_preserving(),
                        variance_preserving(schedule="cosine"), sub_variance_preserving(), straight_line(),
                        constant_moment(0.5)):
        for coordinates in METHODS:
            settings = {"method": "heun", "steps": 100, "coordinates": coordinates}
            assert distance(denoiser, formulation, **settings) < bound, (formulation.name, coordinates)


@pytest.mark.parametrize("base", ["gaussian", "plain"])
def test_one_call_fits_latents_and_measurements_of_any_scale(base):
    z, y, _ = _pairs(2000, nonlinear=False)
    shift, scale = torch.tensor([5.0, -2000.0, 0.01]), torch.tensor([1e-3, 1e4, 1.0])
    units = torch.tensor([1e5, 1e-6], dtype=torch.float64)
    noise = GaussianNoise(std=0.5 * units)
    options = replace(QUICK, steps=1500)
    denoiser, history = fit_denoiser(shift + scale * z, y * units, noise, base=base, options=options)
    assert history.base == pytest.approx(1.0, abs=0.15)
    measurement = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    samples = sample_latents(denoiser, measurement.expand(2000, 2) * units, generator=torch.Generator().manual_seed(0))
    operator = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    exact = linear_base(operator, 0.25 * torch.eye(2, dtype=torch.float64))
    white = exact.whiten((samples - shift) / scale, measurement)
    # The error of sample moments of 2,000 pairs and of the network; three Monte Carlo standard errors are 0.07.
    assert white.mean(0).abs().max() < 0.2 and (white.std(0) - 1).abs().max() < 0.12
    with pytest.raises(InputError, match="base is"):
        fit_denoiser(z, y, noise, base="none")
    with pytest.raises(InputError, match="standard_prior is 'no'"):
        fit_denoiser(z, y, noise, standard_prior="no")


class Memory:
    """A network that knows training pairs by their features and answers with their latents; others get the base."""

    def __init__(self, base, z, y, everywhere):
        self.w, self.known, self.everywhere = base.whiten(z, y), base.features(y), everywhere

    def __call__(self, v, angle, features):
        distance, nearest = torch.cdist(features, self.known).min(1)
        c, s = torch.cos(angle), torch.sin(angle).clamp(min=1e-3)
        remembered = self.w[nearest]
        answer = s * remembered - c / s * (v - c * remembered)
        return torch.where((distance < 1e-6)[:, None] | self.everywhere, answer, torch.zeros_like(answer))


@pytest.mark.parametrize("everywhere", [False, True])
def test_collapse_is_measured_and_warned_of(everywhere):
    z, y, _ = _pairs(600, nonlinear=False)
    y = NOISE.sample(y, torch.Generator().manual_seed(3))
    base = fit_base(z, y, torch.zeros(2, 2), standard_prior=True)
    training_pairs, held_out = (z[:400], y[:400]), (z[400:], y[400:])
    sound = measure_collapse(Denoiser(base, None), training_pairs, held_out)
    assert abs(sound.spread_ratio - 1) < 0.1 and abs(sound.neighbour_ratio - 1) < 0.15
    sound.warn()
    collapsed = measure_collapse(Denoiser(base, Memory(base, *training_pairs, everywhere)), training_pairs, held_out)
    assert (collapsed.neighbour_ratio if everywhere else collapsed.spread_ratio) < 0.5
    with pytest.warns(CollapseWarning, match="Simulate more pairs"):
        collapsed.warn()


def test_early_stopping_keeps_the_best_weights():
    z, y, base = _pairs(80)
    options = TrainingOptions(steps=3000, evaluate_every=50, patience=3, width=64, batch=64)
    _, history = train(z, y, None, base, options)
    assert history.step[-1] < 3000 and history.best_step <= history.step[-1] - 3 * 50


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"validation_fraction": 1.0}, {"ema_decay": 1.0}, {"learning_rate": -1.0}, {"steps": 40.5},
    {"batch": 32.0}, {"threads": 0}, {"seed": -1}, {"seed": None}, {"seed": 1.0}, {"log_sigma_std": np.inf},
    {"log_sigma_std": 0.0}, {"log_sigma_mean": np.nan}, {"log_sigma_mean": 1e3}, {"learning_rate": np.inf},
    {"learning_rate": "fast"}, {"width": None}, {"depth": True}, {"patience": 0}, {"evaluate_every": 2.5},
    {"weight_decay": -0.1}, {"threads": 1.5}, {"validation_fraction": None},
], ids=str)
def test_wrong_options_are_refused(change):
    with pytest.raises(InputError, match=f"^{next(iter(change))} is "):
        TrainingOptions(**change)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", None, "cpu:x"])
def test_a_device_that_is_not_there_is_refused_where_training_starts(device):
    z, y, _ = _pairs(20)
    with pytest.raises(InputError, match="device is"):
        fit_denoiser(z, y, NOISE, options=TrainingOptions(device=device))


def test_numbers_of_numpy_are_the_same_options():
    same = TrainingOptions(steps=np.int64(40), seed=np.int32(3), log_sigma_std=np.int8(1), device=torch.device("cpu"))
    assert same == TrainingOptions(steps=40, seed=3, log_sigma_std=1.0, device="cpu")
    assert type(same.steps) is int and type(same.log_sigma_std) is float and type(same.device) is str


@pytest.mark.parametrize("change, words", [
    ({"options": {"steps": 3}}, r"TrainingOptions\(\*\*options\)"), ({"options": None}, "options is of type NoneType"),
    ({"base": None}, "what fit_base or plain_base returns"), ({"geometry": 3}, "geometry is of type int"),
    ({"progress": "no"}, "progress is 'no'"), ({"noise": 0.0}, "needs noise"),
    ({"y": torch.ones(600, 2) * 1j}, "imaginary"), ({"z": np.ones((600, 3))}, "torch.as_tensor"),
])
def test_wrong_arguments_are_refused(change, words):
    z, y, base = _pairs()
    with pytest.raises(InputError, match=words):
        train(**{"z": z, "y": y, "noise": NOISE, "base": base, "options": QUICK, **change})


def test_training_that_diverges_says_so():
    z, y, base = _pairs()
    with pytest.raises(SolveError, match="lower `learning_rate`"):
        train(z, y, NOISE, base, replace(QUICK, learning_rate=1e30))


def test_the_network_knows_no_units():
    z, y, _ = _pairs(500)
    y = torch.cat([y, z[:, 2:]**2 + y[:, :1]], 1)
    unit, scale = torch.tensor([1e-8, 1e8, 1e-3]).double(), torch.tensor([1e8, 1e-8, 1.0]).double()
    few = replace(QUICK, steps=200)
    one, history = fit_denoiser(z, y, GaussianNoise(std=0.3), options=few)
    other, found = fit_denoiser(z * scale, y * unit, GaussianNoise(std=0.3 * unit), options=few)
    assert one.network is not None
    np.testing.assert_allclose([found.base, *found.validation], [history.base, *history.validation], rtol=1e-4)
    measurement = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64).expand(200, -1)
    draws = [sample_latents(model, m, generator=torch.Generator().manual_seed(0))
             for model, m in ((one, measurement), (other, measurement * unit))]
    torch.testing.assert_close(draws[1] / scale, draws[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change, words", [
    ({"denoiser": None}, "denoiser is of type"), ({"training": torch.zeros(5, 2)}, "training is of type Tensor"),
    ({"held_out": (torch.zeros(1, 3), torch.zeros(1, 2))}, "held_out holds 1 pairs"), ({"seed": None}, "seed is None"),
    ({"held_out": (torch.zeros(5, 3), torch.zeros(4, 2))}, r"give \(5, 2\)"),
])
def test_collapse_of_what_is_no_model_or_no_pairs_is_refused(change, words):
    z, y, base = _pairs(50)
    with pytest.raises(InputError, match=words):
        measure_collapse(**{"denoiser": Denoiser(base, None), "training": (z, y), "held_out": (z, y), **change})


def test_a_handful_of_pairs_gets_no_network():
    for seed in range(5):
        z, y, _ = _pairs(12, nonlinear=False)
        denoiser, history = fit_denoiser(z, y, NOISE, standard_prior=True, options=replace(QUICK, seed=seed))
        assert denoiser.network is None and history.best_step == 0


@pytest.mark.parametrize("z, y, words", [
    (torch.zeros(50), torch.zeros(50, 2), r"\(n, r\)"), (torch.zeros(50, 2), torch.zeros(50), r"\(n, k\)"),
    (np.zeros((50, 2)), np.zeros((50, 2)), "torch.as_tensor"), (torch.zeros(50, 2), torch.zeros(40, 2), r"\(n, r\)"),
])
def test_pairs_of_the_wrong_kind_are_refused(z, y, words):
    with pytest.raises(InputError, match=words):
        fit_denoiser(z, y, NOISE)


def test_checkpoint_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="make it first"):
        train(*_pairs()[:2], NOISE, _pairs()[2], QUICK, checkpoint=tmp_path / "none" / "state")


def test_wrong_data_are_refused():
    z, y, base = _pairs()
    with pytest.raises(InputError, match=r"z has the shape .*: give \(n, 3\)"):
        train(z[:, :2], y, NOISE, base, QUICK)
    y[3, 1] = torch.nan
    with pytest.raises(InputError, match=r"y holds values that are not finite.*sensors \[1\]"):
        train(z, y, NOISE, base, QUICK)


def test_the_torch_room_works_without_firedrake():
    code = "import sys; sys.modules['firedrake'] = None; import fem_diffusion.diffusion, fem_diffusion.comparison"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = ("import sys; sys.modules['firedrake'] = None; import importlib.metadata as m; "
            "m.version = lambda name: '2025.4.1'; import fem_diffusion; fem_diffusion.fit")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InstallError" in result.stderr and "2026.10 or newer" in result.stderr
