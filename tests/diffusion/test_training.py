"""Training: reproducible, resumable, never worse than the base, better where the problem is not linear."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion import files
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import (
    METHODS, CallableNoise, Collapse, CollapseWarning, Denoiser, GaussianNoise, Sampler, TrainingOptions,
    constant_moment, fit_base, fit_denoiser, linear_base, measure_collapse, straight_line, sub_variance_preserving,
    variance_exploding, variance_preserving,
)
from fem_diffusion.diffusion.training.choice import even
from fem_diffusion.diffusion.training.loop import Loop, Task
from fem_diffusion.errors import InputError, FileError, SolveError
from truths import Known, draw, random

QUICK = TrainingOptions(steps=400, evaluate_every=100, width=32, depth=2, batch=128)
NOISE = GaussianNoise(std=0.1)
OPERATOR = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64)


def _pairs(n=600, nonlinear=True):
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z, z[:, :2]**2 if nonlinear else z @ OPERATOR.T


def _hidden(std):
    """Gaussian noise of which the training knows draws alone: it makes do without an emulator."""
    return CallableNoise(lambda y, g: y + std * torch.randn(y.shape, generator=g, dtype=y.dtype))


def _train(noise=_hidden(0.1), options=QUICK, standard_prior=False, **settings):
    """A network under the base; where the prior is known an emulator comes before, of readings or of the noise."""
    return fit_denoiser(*_pairs(), noise, standard_prior=standard_prior, options=options, **settings)


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
    first = _train()
    _assert_same(first, _train())
    other, _ = _train(options=replace(QUICK, seed=1))
    assert (_weights(other) - _weights(first[0])).abs().max() > 0.01


@pytest.mark.parametrize("interrupted", ["emulate", "noise", "train"])
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path, monkeypatch, interrupted):
    given = {"noise": NOISE if interrupted == "emulate" else _hidden(0.1), "standard_prior": interrupted != "train"}
    whole = _train(**given)
    save, names = Loop._save, []

    def interrupt(self, path):
        save(self, path)
        names.append(self.task.name)
        raise KeyboardInterrupt
    monkeypatch.setattr(Loop, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _train(**given, checkpoint=tmp_path / "state")
    assert names == [interrupted] and (tmp_path / "state").exists() == (interrupted == "train")
    monkeypatch.setattr(Loop, "_save", save)
    again = _train(**given, checkpoint=tmp_path / "state")
    if whole[0].network is None:
        one, other = (list(x.base.learnt.network.parameters()) for x in (whole[0], again[0]))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    else:
        _assert_same(whole, again)


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    file, (z, y) = tmp_path / "state", _pairs()
    _train(checkpoint=file)
    for other in ((z + 1, y, _hidden(0.1)), (z, y, _hidden(0.2))):
        with pytest.raises(FileError, match="other data, noise or options"):
            fit_denoiser(*other, options=QUICK, checkpoint=file)
    # Random numbers of another device are others; nothing else is compared before.
    state = files.read(file, "checkpoint", "")
    files.write(file, "checkpoint", state.arrays | {"marks": np.ones((1, 2))}, state.values | {"device": "cuda"})
    with pytest.raises(FileError, match="resume with TrainingOptions\\(device='cuda'\\)"):
        _train(checkpoint=file)
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b"not a checkpoint", b""):
        file.write_bytes(broken)
        with pytest.raises(FileError, match="is damaged|no file that fem_diffusion reads"):
            _train(checkpoint=file)
        assert file.read_bytes() == broken


@pytest.mark.parametrize("noise", [0.1, GaussianNoise(covariance=[[0.02, 0.01], [0.01, 0.03]])],
                         ids=["one", "correlated"])
def test_a_known_linear_problem_trains_nothing_and_is_exact(noise, monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("A network is trained."))
    z, y = _pairs(nonlinear=False)
    denoiser, history = fit_denoiser(z, y, noise, standard_prior=True, options=QUICK)
    assert denoiser.network is None and denoiser.known and history.step == []
    measurement = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    covariance = noise.covariance(y) if isinstance(noise, GaussianNoise) else noise**2 * torch.eye(2).double()
    exact = Denoiser(linear_base(OPERATOR, covariance)).at(measurement).located
    conditioned = denoiser.at(measurement)
    assert conditioned.density is None and conditioned.support is None
    torch.testing.assert_close(conditioned.located.mean, exact.mean)
    torch.testing.assert_close(conditioned.located.covariance, exact.covariance)
    samples = draw(conditioned, 4000, Sampler(steps=1))
    assert min(moment_p_values(samples.numpy(), exact.mean[0].numpy(), exact.covariance[0].numpy())) > 1e-4


def test_modes_left_out_of_a_linear_problem_are_noise_and_train_nothing():
    z = torch.randn(2000, 3, generator=random(), dtype=torch.float64)
    left_out = 0.3 * torch.randn(2000, 2, generator=random(1), dtype=torch.float64)
    denoiser, history = fit_denoiser(z, z @ OPERATOR.T + left_out, NOISE, standard_prior=True, options=QUICK)
    assert denoiser.network is None and denoiser.base.emulator.head is None and history.step == []
    expected = torch.full((2,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(denoiser.base.emulator.residual.diagonal(), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("latents, factor", [(20, 1.05), (20, 0.95), (1, 1.15), (1, 0.85), (20, 1.0)])
def test_samples_that_are_too_wide_or_narrow_are_seen(latents, factor):
    found = torch.randn(5, 2048, 20, generator=random(), dtype=torch.float64)
    found[1:, :, :latents] *= factor
    values = even(found, torch.randn(2048, 8, generator=random(1), dtype=torch.float64), 20)
    assert (float(values.min()) * len(values) > 1e-3) == (factor == 1)


def test_samples_of_a_prior_that_ignores_its_measurement_are_seen():
    found = torch.randn(5, 1000, 2, generator=random(), dtype=torch.float64)
    assert float(even(found, found[0, :, :1]**2, 2).min()) < 1e-10


def test_a_linear_problem_stays_exact_where_it_is_not_known_to_be_one():
    z, y = _pairs(nonlinear=False)
    denoiser, history = fit_denoiser(z, y, _hidden(0.5), standard_prior=True, options=QUICK)
    assert history.step and not denoiser.known
    measurement = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    exact = Denoiser(linear_base(OPERATOR, 0.25 * torch.eye(2).double())).at(measurement).located
    white = exact.whiten(draw(denoiser.at(measurement), 4000, Sampler(steps=1)))
    # 600 draws of the noise tell its covariance to 6 %.
    assert white.mean(0).abs().max() < 0.15 and (white.std(0) - 1).abs().max() < 0.15


def test_network_learns_what_the_base_cannot():
    # z_i^2 is measured: the posterior is known and has two modes, of which the base sees nothing.
    n = 2000
    denoiser, history = fit_denoiser(*_pairs(4000), _hidden(0.5), standard_prior=True,
                                     options=TrainingOptions(steps=1500, width=64, depth=2))
    assert min(history.validation) < 0.9 * history.base
    y0 = torch.tensor([[2.0, 1.5]], dtype=torch.float64)
    grid = np.linspace(-4, 4, 4001)
    exact = [np.exp(-grid**2 / 2 - (grid**2 - reading)**2 / (2 * 0.25)) for reading in (2.0, 1.5)]

    def distance(model, **settings):
        """Largest Kolmogorov-Smirnov distance of the two latents that are seen."""
        z = draw(model.at(y0), n, Sampler(**settings)).numpy()
        return max(np.abs((z[:, i, None] <= grid).mean(0) - np.cumsum(p) / p.sum()).max() for i, p in enumerate(exact))
    # Twice the Kolmogorov-Smirnov bound at level 1e-4, 0.10; the base alone is 0.25 away.
    bound = 2 * 2.23 / np.sqrt(n)
    assert distance(denoiser) < bound and distance(denoiser, alpha=1.0) < bound
    assert distance(Denoiser(denoiser.base), steps=1) > bound
    # One network, trained once, has the same law under every formulation.
    for formulation in (variance_exploding(), variance_exploding(0.01, 10.0, "linear"), variance_preserving(),
                        variance_preserving(schedule="cosine"), sub_variance_preserving(), straight_line(),
                        constant_moment(0.5)):
        for coordinates in METHODS:
            settings = {"method": "heun", "steps": 100, "coordinates": coordinates, "formulation": formulation}
            assert distance(denoiser, **settings) < bound, (formulation.name, coordinates)


@pytest.mark.parametrize("base", ["gaussian", "plain"])
def test_one_call_fits_latents_and_measurements_of_any_scale(base):
    z, y = _pairs(2000, nonlinear=False)
    shift, scale = torch.tensor([5.0, -2000.0, 0.01]), torch.tensor([1e-3, 1e4, 1.0])
    units = torch.tensor([1e5, 1e-6], dtype=torch.float64)
    noise = GaussianNoise(std=0.5 * units)
    options = replace(QUICK, steps=1500)
    denoiser, history = fit_denoiser(shift + scale * z, y * units, noise, base=base, options=options)
    assert history.base == pytest.approx(1.0, abs=0.15)
    measurement = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    samples = draw(denoiser.at(measurement * units), 2000, Sampler())
    exact = Denoiser(linear_base(OPERATOR, 0.25 * torch.eye(2, dtype=torch.float64))).at(measurement).located
    white = exact.whiten((samples - shift) / scale)
    # The error of sample moments of 2,000 pairs and of the network; three Monte Carlo standard errors are 0.07.
    assert white.mean(0).abs().max() < 0.2 and (white.std(0) - 1).abs().max() < 0.12
    with pytest.raises(InputError, match="base is"):
        fit_denoiser(z, y, noise, base="none")
    with pytest.raises(InputError, match="standard_prior is 'no'"):
        fit_denoiser(z, y, noise, standard_prior="no")


class Memory(Known):
    """A network that knows training pairs by their features and answers with their latents; others get the base."""

    def __init__(self, base, z, y, everywhere):
        super().__init__(None)
        self.w, self.known, self.everywhere = Denoiser(base).at(y).located.whiten(z), base.features(y), everywhere

    def see(self, base, layout, y, located):
        return base.features(y),

    def __call__(self, v, angle, features):
        distance, nearest = torch.cdist(features, self.known).min(1)
        c, s = torch.cos(angle), torch.sin(angle).clamp(min=1e-3)
        remembered = self.w[nearest]
        answer = s * remembered - c / s * (v - c * remembered)
        return torch.where((distance < 1e-6)[:, None] | self.everywhere, answer, torch.zeros_like(answer))


@pytest.mark.parametrize("everywhere", [False, True])
def test_collapse_is_measured_and_warned_of(everywhere):
    z, y = _pairs(600, nonlinear=False)
    y = NOISE.sample(y, torch.Generator().manual_seed(3))
    base = fit_base(z, y, torch.zeros(2, 2), standard_prior=True)

    def found(network):
        denoiser = Denoiser(base, network)
        return measure_collapse((denoiser.at(y[:400]), z[:400]), (denoiser.at(y[400:]), z[400:]), z[:400])
    sound = found(None)
    assert abs(sound.spread_ratio - 1) < 0.1 and abs(sound.neighbour_ratio - 1) < 0.15
    sound.warn()
    collapsed = found(Memory(base, z[:400], y[:400], everywhere))
    assert (collapsed.neighbour_ratio if everywhere else collapsed.spread_ratio) < 0.5
    with pytest.warns(CollapseWarning, match="Simulate more pairs"):
        collapsed.warn()


def test_training_measures_collapse_and_tells_of_it(monkeypatch):
    _, history = _train()
    assert abs(history.spread_ratio - 1) < 0.3 and abs(history.neighbour_ratio - 1) < 0.3
    assert history.spread_ratio != 1 != history.neighbour_ratio
    monkeypatch.setattr("fem_diffusion.diffusion.training.denoising.measure_collapse", lambda *_: Collapse(0.5, 0.9))
    with pytest.warns(CollapseWarning, match="its spread at training measurements is 0.50 of"):
        _, history = _train()
    assert (history.spread_ratio, history.neighbour_ratio) == (0.5, 0.9)


def test_training_goes_on_from_where_it_ended():
    """A second run with more patience learns on: the network that the first has returned stays as it is."""
    class Square(Task):
        name, size, options = "square", 256, QUICK

        def __init__(self):
            self.x = torch.randn(256, 1, generator=random())
            self.parts = [self.x]
            self.base_losses = self.evaluate(lambda x: 0 * x)

        def network(self):
            return torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))

        def draw(self, index, generator):
            return self.x[index],

        def loss(self, network, x):
            return (network(x) - x**2).square().mean()

        def evaluate(self, network):
            return (network(self.x) - self.x**2).square()[:, 0]
    loop = Loop(Square(), replace(QUICK, steps=200, evaluate_every=50), None)
    first = loop.run(False)
    kept, loop.options = first(loop.task.x).clone(), QUICK
    again = loop.run(False)
    losses = loop.history.validation
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[3]
    torch.testing.assert_close(first(loop.task.x), kept, rtol=0, atol=0)
    np.testing.assert_allclose(float(loop.task.evaluate(again).mean()), min(losses), rtol=1e-5)


def test_early_stopping_keeps_the_best_weights():
    options = TrainingOptions(steps=3000, evaluate_every=50, patience=3, width=64, batch=64)
    _, history = fit_denoiser(*_pairs(80), standard_prior=True, options=options)
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
    z, y = _pairs(20)
    with pytest.raises(InputError, match="device is"):
        fit_denoiser(z, y, NOISE, options=TrainingOptions(device=device))


def test_numbers_of_numpy_are_the_same_options():
    same = TrainingOptions(steps=np.int64(40), seed=np.int32(3), log_sigma_std=np.int8(1), device=torch.device("cpu"))
    assert same == TrainingOptions(steps=40, seed=3, log_sigma_std=1.0, device="cpu")
    assert type(same.steps) is int and type(same.log_sigma_std) is float and type(same.device) is str


@pytest.mark.parametrize("change, words", [
    ({"options": {"steps": 3}}, r"TrainingOptions\(\*\*options\)"), ({"options": None}, "options is of type NoneType"),
    ({"base": None}, "base is None"), ({"geometry": 3}, "geometry is of type int"),
    ({"network": "none"}, "network is 'none'"), ({"network": "sensors"}, "for families: leave"),
    ({"network": "field"}, "layers on the mesh: give geometry"), ({"progress": "no"}, "progress is 'no'"),
    ({"noise": 0.0}, "needs noise"),
    ({"y": torch.ones(600, 2) * 1j}, "imaginary"), ({"z": np.ones((600, 3))}, "torch.as_tensor"),
])
def test_wrong_arguments_are_refused(change, words):
    z, y = _pairs()
    with pytest.raises(InputError, match=words):
        fit_denoiser(**{"z": z, "y": y, "noise": NOISE, "options": QUICK, **change})


def test_training_that_diverges_says_so():
    for noise in (NOISE, _hidden(0.1)):
        with pytest.raises(SolveError, match="lower `learning_rate`"):
            _train(noise, replace(QUICK, learning_rate=1e30))


@pytest.mark.parametrize("known", [False, True])
def test_the_network_knows_no_units(known):
    z, y = _pairs(500)
    y = torch.cat([y, z[:, 2:]**2 + y[:, :1]], 1)
    unit, scale = torch.tensor([1e-8, 1e8, 1e-3]).double(), torch.tensor([1e8, 1e-8, 1.0]).double()

    def noise(unit):
        return GaussianNoise(std=0.3 * unit) if known else _hidden(0.3 * unit)
    few = replace(QUICK, steps=200)
    one, history = fit_denoiser(z, y, noise(torch.ones(3).double()), options=few)
    other, found = fit_denoiser(z * scale, y * unit, noise(unit), options=few)
    assert one.network is not None and (one.base.emulator.head is None) != known
    np.testing.assert_allclose([found.base, *found.validation], [history.base, *history.validation], rtol=1e-4)
    measurement = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)
    draws = [draw(model.at(m), 200, Sampler()) for model, m in ((one, measurement), (other, measurement * unit))]
    torch.testing.assert_close(draws[1] / scale, draws[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change, words", [
    ({"training": (None, torch.zeros(50, 3))}, r"training\[0\] is of type NoneType"), ({"seed": None}, "seed is None"),
    ({"held_out": lambda at: (at(1), torch.zeros(1, 3))}, "held_out holds 1 pairs"),
    ({"held_out": lambda at: (at(5), torch.zeros(4, 3))}, r"give \(5, 3\)"),
    ({"held_out": lambda at: (at(5), _pairs(50)[0][:5])}, "Held-out latents are training latents"),
])
def test_collapse_of_what_is_no_model_or_no_pairs_is_refused(change, words):
    z, y = _pairs(50, nonlinear=False)
    denoiser = Denoiser(fit_base(z, y, 0.01 * torch.eye(2), standard_prior=True))
    change = {name: x(lambda n: denoiser.at(y[:n])) if callable(x) else x for name, x in change.items()}
    with pytest.raises(InputError, match=words):
        measure_collapse(**{"training": (denoiser.at(y), z), "held_out": (denoiser.at(y), z + 1), "trained": z,
                            **change})


def test_a_handful_of_pairs_gets_no_network():
    for seed in range(3):
        denoiser, history = fit_denoiser(*_pairs(12, nonlinear=False), _hidden(0.1), standard_prior=True,
                                         options=replace(QUICK, seed=seed, steps=200))
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
        _train(checkpoint=tmp_path / "none" / "state")


def test_wrong_data_are_refused():
    z, y = _pairs()
    y[3, 1] = torch.nan
    with pytest.raises(InputError, match=r"y holds values that are not finite.*sensors \[1\]"):
        fit_denoiser(z, y, NOISE)


def test_the_torch_room_works_without_firedrake():
    code = "import sys; sys.modules['firedrake'] = None; import fem_diffusion.diffusion, fem_diffusion.comparison"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = ("import sys; sys.modules['firedrake'] = None; import importlib.metadata as m; "
            "m.version = lambda name: '2025.4.1'; import fem_diffusion; fem_diffusion.fit")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InstallError" in result.stderr and "2026.10 or newer" in result.stderr
