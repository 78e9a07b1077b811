"""Cross-validation of sensors: closed forms, simulated faults that are known, and rates of false alarms."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

from fem_diffusion import GaussianNoise, InputError, StudentNoise
from fem_diffusion.diffusion import Denoiser, Emulator, linear_base
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.diffusion.training.telling import widened
from fem_diffusion.trust.cross import cross_validate
from truths import bent_map

R, K = 5, 12
STD = 0.2
NAMES = tuple(f"gauge {i} [mg/l]" for i in range(K))


def _matrix(k=K, r=R, seed=0):
    """Sensors along a line over smooth modes."""
    x = np.linspace(0, 1, k)
    return np.stack([np.cos(np.pi * j * (x + 0.03 * seed)) / (1 + j) for j in range(r)], 1)


def _sensors(covariance=None, curved=False, noise=None, matrix=None):
    """Linear sensors; `curved` ones have a network as emulator, of zero weights, and are sampled."""
    matrix = torch.from_numpy(_matrix() if matrix is None else matrix)
    covariance = STD**2 * torch.eye(len(matrix)).double() if covariance is None else torch.from_numpy(covariance)
    base = linear_base(matrix, covariance)
    if curved:
        emulator = Emulator(matrix.shape[1], len(matrix), 8, 1)
        emulator.matrix, emulator.residual, emulator.scale = matrix, covariance, torch.eye(len(matrix)).double()
        base = type(base)(base.mean, base.factor, emulator, updates=2)
    noise = GaussianNoise(covariance=covariance.numpy()) if noise is None else noise
    return EmulatedSensors.fixed(Denoiser(base, known=True), noise, torch.zeros(1, len(matrix)).double())


def _readings(n, seed, std=STD, matrix=None, covariance=None):
    """Measurements (n, k) of other parameters each."""
    rng = np.random.default_rng(seed)
    matrix = _matrix() if matrix is None else matrix
    white = rng.standard_normal((n, len(matrix)))
    noise = std * white if covariance is None else white @ np.linalg.cholesky(covariance).T
    return rng.standard_normal((n, matrix.shape[1])) @ matrix.T + noise


def _cross(sensors, values, names=NAMES, **more):
    return cross_validate(sensors, values, names, MPI.COMM_SELF, **more)


def _expected(S, y, i):
    """Mean and standard deviation of reading i given the others that are there, by the law of y alone."""
    kept = [j for j in range(len(y)) if j != i and not np.isnan(y[j])]
    gain = np.linalg.solve(S[np.ix_(kept, kept)], S[kept, i])
    return gain @ y[kept], np.sqrt(S[i, i] - gain @ S[kept, i])


CORRELATED = STD**2 * (0.4 * np.eye(K) + 0.6 * np.exp(-np.abs(np.subtract.outer(np.arange(K), np.arange(K))) / 2))


@pytest.mark.parametrize("covariance", [None, CORRELATED], ids=["independent", "correlated"])
def test_predictions_are_the_conditional_law_of_each_sensor(covariance):
    values = _readings(6, 1, covariance=covariance)
    values[2, [3, 7]] = np.nan
    found = _cross(_sensors(covariance), values)
    S = _matrix() @ _matrix().T + (STD**2 * np.eye(K) if covariance is None else covariance)
    for y, mean, std in zip(values, found.mean, found.std):
        for i in range(K):
            if np.isnan(y[i]):
                assert np.isnan(mean[i]) and np.isnan(std[i])
                continue
            np.testing.assert_allclose((mean[i], std[i]), _expected(S, y, i), rtol=1e-8)
    assert found.draws is None
    np.testing.assert_allclose(found.residuals, (values - found.mean) / found.std)


@pytest.mark.parametrize("covariance", [None, CORRELATED], ids=["independent", "correlated"])
def test_samples_predict_what_the_closed_form_does(covariance):
    values = _readings(3, 2, covariance=covariance)
    values[1, 4] = np.nan
    exact, drawn = _cross(_sensors(covariance), values), _cross(_sensors(covariance, curved=True), values, draws=2000)
    there = ~np.isnan(values)
    away = ((drawn.mean - exact.mean) / exact.std)[there] * np.sqrt(2000)
    ratio = (drawn.std / exact.std - 1)[there] * np.sqrt(2 * 2000)
    # Moves under the emulator's density are not quite independent draws.
    assert np.abs(away).max() < 5 and np.abs(ratio).max() < 5 and np.sqrt((away**2).mean()) < 1.5
    # Predictions from all sensors, the left one too, are others.
    assert np.abs((exact.mean - values) / exact.std)[there].mean() > 0.5
    np.testing.assert_allclose(drawn.noise.value, exact.noise.value, rtol=1e-5)
    np.testing.assert_allclose(drawn.noise.interval(), exact.noise.interval(), rtol=1e-5)


class _Bent(Emulator):
    """An emulator that knows a map which is not affine."""

    def forward(self, z):
        return bent_map(z.double())

    def with_pull(self, z):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            c = bent_map(z.double())
        return c.detach(), lambda covector: torch.autograd.grad(c, z, covector, retain_graph=True)[0]


def test_predictions_of_a_nonlinear_model_are_those_of_quadrature():
    turn = np.linspace(0, np.pi, 7)[:-1]
    rows, std = torch.from_numpy(np.stack([np.cos(turn), np.sin(turn)], 1)), 0.3
    emulator = _Bent(2, 2, 8, 1)
    emulator.matrix = torch.eye(2).double()
    base = linear_base(torch.eye(2).double(), torch.eye(2).double())
    denoiser = Denoiser(type(base)(base.mean, base.factor, emulator, updates=6), known=True)
    noise = GaussianNoise(std=std)
    sensors = EmulatedSensors(denoiser, noise, std**2 * torch.eye(6).double(), rows, torch.zeros(6).double())
    line = torch.linspace(-6, 6, 401).double()
    z = torch.cartesian_prod(line, line)
    clean = bent_map(z) @ rows.T
    truth = torch.tensor([[1.3, -0.8], [-0.5, 1.5]]).double()
    values = (bent_map(truth) @ rows.T).numpy() + std * np.random.default_rng(1).standard_normal((2, 6))
    found = _cross(sensors, values, NAMES[:6], draws=4000)
    for y, mean, spread in zip(values, found.mean, found.std):
        for i in range(6):
            kept = np.delete(np.arange(6), i)
            misfit = ((torch.from_numpy(y[kept]) - clean[:, kept])**2).sum(1) / std**2
            weights = torch.softmax(-(z**2).sum(1) / 2 - misfit / 2, 0)
            average = float(weights @ clean[:, i])
            total = float(weights @ (clean[:, i] - average)**2 + std**2)**0.5
            # Ten moves bring samples to the posterior within a few per cent.
            assert abs(mean[i] - average) < 0.08 * total and abs(spread[i] / total - 1) < 0.08
            # A reading that took part in its own prediction would draw it to itself.
            alone = torch.softmax(torch.log(weights) - (y[i] - clean[:, i])**2 / (2 * std**2), 0)
            drawn = float(alone @ clean[:, i])
            assert abs(mean[i] - average) < abs(mean[i] - drawn) or abs(drawn - average) < 0.1 * total


def test_rows_of_one_sensor_are_left_out_together():
    names = [f"(0.{i // 3})[{i % 3}]" for i in range(K)]
    values = _readings(2, 3)
    found = _cross(_sensors(), values, names)
    S = _matrix() @ _matrix().T + STD**2 * np.eye(K)
    kept = [j for j in range(K) if j // 3 != 1]
    gain = np.linalg.solve(S[np.ix_(kept, kept)], S[np.ix_(kept, [3, 4, 5])]).T
    np.testing.assert_allclose(found.mean[0, 3:6], gain @ values[0, kept], rtol=1e-8)


def test_residuals_of_the_model_itself_are_calibrated_and_noise_is_found():
    inside, logs, held = [], [], []
    for seed in range(60):
        found = _cross(_sensors(), _readings(40, seed))
        inside.append(found.coverage[0.9][0])
        logs.append(np.log(found.noise.value))
        low, high = found.noise.interval(0.9)
        held.append(low < 1 < high)
    assert abs(np.mean(inside) - 0.9) < 4 * np.std(inside) / np.sqrt(60) + 1e-3
    # The interval that is told holds the truth as often as it says, within four standard errors.
    assert abs(np.mean(logs)) < 4 * np.std(logs) / np.sqrt(60)
    assert abs(np.mean(held) - 0.9) < 4 * np.sqrt(0.09 / 60)


def test_noise_that_is_twice_as_large_is_told():
    found = _cross(_sensors(), _readings(60, 5, std=2 * STD))
    low, high = found.noise.interval()
    assert low < 2 < high and low > 1.5 and high < 2.7
    assert found.verdict == "noise larger than assumed" and not found.worst and found.light == "red"
    assert "noise were" in str(found)
    # Without any noise at all the end of the reach is told, and from where noise is excluded.
    none = _cross(_sensors(), _readings(60, 5, std=0.0))
    assert none.noise.value == 2.0**-6 and none.noise.interval()[0] == 0.0 and none.noise.interval()[1] < 0.1
    smaller = _cross(_sensors(), _readings(60, 5, std=0.4 * STD))
    assert smaller.verdict == "noise smaller than assumed" and smaller.noise.interval()[1] < 0.6


def test_sensors_that_agree_raise_few_alarms():
    alarms = [0, 0, 0]
    for seed in range(100):
        for i, n in enumerate((1, 20)):
            found = _cross(_sensors(), _readings(n, 1000 + seed))
            alarms[i] += bool(found.worst)
            alarms[2] += found.verdict.startswith("noise") and n == 20
    assert max(alarms) <= 5     # one in a hundred is expected


def test_a_field_that_stays_raises_few_alarms():
    """Readings of one state at many times depend on each other."""
    alarms = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(R) @ _matrix().T + STD * rng.standard_normal((30, K))
        alarms += bool(_cross(_sensors(), values).worst)
    assert alarms <= 5


def test_noise_that_is_far_too_small_is_no_matter_of_sensors():
    for factor, n in ((4, 5), (4, 40), (1000, 10)):
        found = _cross(_sensors(), _readings(n, 7, std=factor * STD))
        assert not found.worst and found.verdict == "noise larger than assumed" and found.light == "red"
    assert found.noise.interval()[0] > 32 and found.coverage[0.9][0] < 0.2
    # A sensor that is broken beside is named all the same.
    values = _readings(40, 7, std=4 * STD)
    values[:, 5] += 40 * STD
    assert _cross(_sensors(), values).worst == (NAMES[5],)


def test_predictions_that_are_far_too_wide_are_told():
    rng = np.random.default_rng(3)
    values = 0.02 * rng.standard_normal((60, R)) @ _matrix().T + STD * rng.standard_normal((60, K))
    # An emulator whose own error is large: no noise at all would do.
    loose = _sensors()
    loose.denoiser.base.emulator.residual += 0.5 * torch.eye(K).double()
    found = _cross(loose, values)
    assert found.verdict == "too wide" and found.noise.interval() == (0.0, 2.0**-6) and found.light == "yellow"


def test_sensors_that_say_nothing_are_not_compared():
    """Whatever they read: a sinh of a normal number, with a reading far out among them."""
    generator = torch.Generator().manual_seed(0)
    operator = torch.randn(5, 2, generator=generator).double()
    narrow = Denoiser(linear_base(operator, 0.04 * torch.eye(5).double()))
    z, e = torch.randn(400, 2, generator=generator).double(), torch.randn(400, 7, generator=generator).double()
    y = torch.cat([torch.sinh(3 * e[:, 5:6]), z @ operator.T + 0.2 * e[:, :5], torch.sinh(3 * e[:, 6:])], 1)
    wide = EmulatedSensors.fixed(widened(narrow, y, torch.arange(1, 6)), None, y)
    values, names = y[:20].numpy().copy(), [f"s{i}" for i in range(7)]
    values[3, 0] = 1e6
    found = cross_validate(wide, values, names, MPI.COMM_WORLD)
    alone = cross_validate(EmulatedSensors.fixed(narrow, None, y[:, 1:6]), values[:, 1:6], names[1:6], MPI.COMM_WORLD)
    np.testing.assert_allclose(found.p_values[:, 1:6], alone.p_values)
    assert found.verdict == alone.verdict == "consistent" and not found.outliers[:, [0, 6]].any()
    assert "2 of 7 readings say nothing of the field, and are not compared" in str(found)
    assert wide.distance(y, None, torch.from_numpy(values[3]), names).worst == ()


def test_two_sensors_tell_nothing_of_the_noise():
    matrix = _matrix()[:2]
    found = _cross(_sensors(matrix=matrix, covariance=STD**2 * np.eye(2)), _readings(9, 1, matrix=matrix), NAMES[:2])
    assert found.noise is None and "too few sensors" in str(found)


FAULTS = {
    "offset": lambda y, rng: y + 1.5,
    "drift": lambda y, rng: y + np.linspace(0, 3, len(y)),
    "broken": lambda y, rng: 0.3 * rng.standard_normal(len(y)) - 1,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sensor_is_named_and_no_other(fault):
    hits = 0
    for seed in range(20):
        values = _readings(40, seed)
        values[:, 5] = FAULTS[fault](values[:, 5], np.random.default_rng(seed))
        values[10:14, 2] = np.nan
        found = _cross(_sensors(), values)
        hits += found.worst == (NAMES[5],)
        assert np.isnan(found.cleaned[:, 5]).all()
        # Others are predicted without it.
        assert np.sqrt(np.nanmean(np.delete(found.residuals, 5, 1)**2)) < 1.3
    assert hits >= 19
    words = {"offset": "reads too high", "drift": "It drifts", "broken": "contradict"}
    assert words[fault] in str(found) and found.verdict == "sensors disagree" and found.light == "red"


def test_single_readings_are_left_out_by_themselves():
    values = _readings(60, 8)
    places = [(3, 1), (17, 1), (20, 6), (44, 10)]
    for i, j in places:
        values[i, j] += 3.0
    found = _cross(_sensors(), values)
    assert not found.worst and set(zip(*map(list, np.nonzero(found.outliers)))) == set(places)
    assert "4 single readings of 3 sensors" in str(found) and found.light == "yellow"
    assert np.isnan(found.cleaned).sum() == 4


def test_one_measurement_names_the_sensor_that_is_off():
    values = _readings(1, 9)
    values[0, 4] += 12 * STD
    found = _cross(_sensors(), values)
    assert found.worst == (NAMES[4],) and "is expected" in str(found)


def test_outliers_of_their_own_law_are_no_alarm():
    rng = np.random.default_rng(0)
    std = STD * np.ones(K)
    law = StudentNoise(std, df=3)
    values = rng.standard_normal((8, R)) @ _matrix().T + STD * rng.standard_t(3, (8, K))
    sensors = _student(law)
    found = _cross(sensors, values, draws=200)
    assert found.noise is None and not found.worst and found.outliers.sum() <= 1
    assert abs(found.coverage[0.9][0] - 0.9) < 0.1
    values[:, 7] += 5
    assert _cross(sensors, values, draws=200).worst == (NAMES[7],)


def _student(law):
    from fem_diffusion.diffusion.base.law import NoiseLaw

    matrix = torch.from_numpy(_matrix())
    base = linear_base(matrix, 1e-8 * torch.eye(K).double())
    parts = torch.zeros(0, R).double(), torch.zeros(0).double(), law.covariance(torch.zeros(1, K).double())
    base = type(base)(base.mean, base.factor, base.emulator, law=NoiseLaw(law, *parts))
    return EmulatedSensors.fixed(Denoiser(base, known=True), law, torch.zeros(1, K).double())


@pytest.mark.parametrize("values, more", [
    (np.full((2, K), np.nan), {}), (np.where(np.arange(K) == 3, 1.0, np.nan)[None], {}),
    (_readings(1, 0), {"draws": 3}), (_readings(1, 0), {"seed": -1})])
def test_what_cannot_be_predicted_is_refused(values, more):
    with pytest.raises(InputError):
        _cross(_sensors(), values, **more)
