"""A small monitor without a mesh of Firedrake: a linear-Gaussian problem, whose posterior is known."""

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import identity
from scipy.spatial import Delaunay

from fem_diffusion.diffusion import Denoiser, GaussianNoise, linear_base
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.monitor.bundle import Area, Bundle, Quantity, Sensor, Table

R, K, SIDE, NOISE = 4, 5, 8, 0.1


def operator():
    """Readings of latents, (K, R)."""
    return np.random.default_rng(3).standard_normal((K, R)) / 2


def modes():
    """Fields of latents on a grid of the unit square, (R, SIDE²), and its places (SIDE², 2)."""
    x, y = (g.ravel() for g in np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE)))
    fields = [np.ones_like(x), np.cos(np.pi * x), np.cos(np.pi * y), np.cos(np.pi * x) * np.cos(np.pi * y)]
    return np.stack(fields) * [[0.5], [0.4], [0.3], [0.2]], np.stack([x, y], axis=1)


def posterior(y, there=slice(None)):
    """Mean (R,) and covariance of the latents given some of the readings (K,), by Bayes' formula."""
    A = operator()[there]
    precision = np.eye(R) + A.T @ A / NOISE**2
    return np.linalg.solve(precision, A.T @ y[there] / NOISE**2), np.linalg.inv(precision)


def reading(z, seed):
    """A reading of latents (R,) with noise."""
    return operator() @ z + NOISE * np.random.default_rng(seed).standard_normal(K)


def make_bundle(exponential=False, draws=500):
    """The monitor; the field, or its exponential, with its mean over the square and its largest value on the right."""
    A, (fields, places) = torch.from_numpy(operator()), modes()
    n, generator = SIDE**2, torch.Generator().manual_seed(0)
    covariance = NOISE**2 * torch.eye(K, dtype=torch.float64)
    seen = torch.randn(1000, R, generator=generator, dtype=torch.float64) @ A.T
    weights = np.stack([np.full(n, 1 / n), (places[:, 0] > 0.5).astype(float)])
    grid = np.linspace(-9.0, 9.0, 20001)
    tables = (Table(0, n, -9.0, 9.0, np.exp(grid)),) if exponential else ()
    sensors = tuple(Sensor(f"gauge {i}", "mg/m³", (0.15 + 0.17 * i, 0.3 + 0.1 * (i % 3))) for i in range(K))
    area = Area(places, Delaunay(places).simplices, identity(n, format="csr"), ("x", "y"), "emission", "g/s", "km")
    denoiser = Denoiser(linear_base(A, covariance), known=True)
    emulated = EmulatedSensors.fixed(denoiser, GaussianNoise(std=NOISE), seen)
    return Bundle(emulated, sensors, (Quantity("mean emission", "g/s"), Quantity("highest emission", "g/s", True)),
                  np.full(n, 1.0, dtype=np.float32), fields.astype(np.float32), weights, tables, None, area,
                  draws=draws)


def along(bundle):
    """The same where the field is shown along the lower side of the square, of which there is nothing in the middle."""
    n, middle = len(bundle.mean), SIDE // 2
    nodes = np.array([i for i in range(SIDE - 1) if i != middle - 1])
    nodes = np.column_stack([nodes, nodes + 1])
    rows = identity(n, format="csr")[nodes.ravel()]
    area = Area(modes()[1][nodes.ravel(), :1], np.arange(nodes.size).reshape(-1, 2), rows, ("x",), "flux", "g/s", "km")
    sensors = tuple(replace(sensor, point=sensor.point[:1]) for sensor in bundle.sensors)
    return replace(bundle, area=area, sensors=sensors)
