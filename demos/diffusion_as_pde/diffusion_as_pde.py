"""A diffusion model is a linear PDE for a density. Here Firedrake solves it, forward and back.

Forward, any density p drifts and spreads until only a Gaussian is left:

    ∂p/∂t = ∇·(b ξ p) + (g/2) Δp.

Back in time τ = T - t, with the score q = ∇ log p, one equation for every α ≥ 0 retraces the way,

    ∂p/∂τ = -∇·([b ξ + (1+α)/2 g q] p) + (α g/2) Δp,

and so do particles: dξ = [b ξ + (1+α)/2 g q] dτ + sqrt(α g) dW. Samplers of diffusion models move such particles, with
a network in place of q. For α = 0 they follow an ordinary differential equation, for α = 1 the usual stochastic one.

The coefficients b and g belong to a formulation: variance exploding (VE), variance preserving (VP), the straight line
of flow matching, one of your own. For a mixture of Gaussians p and q are known exactly at all times, so this demo can
say how far each formulation and each α comes back to where it started.

    python demos/diffusion_as_pde/diffusion_as_pde.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from firedrake import (
    COMM_WORLD, Constant, Function, FunctionSpace, IntervalMesh, RectangleMesh, SpatialCoordinate, assemble, dx, sqrt,
)
from firedrake.pyplot import tripcolor
from matplotlib import colors, patheffects, pyplot as plt, ticker
from tqdm import tqdm

from fem_diffusion.checks import read_arguments
from fem_diffusion.diffusion import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.density_pde import GaussianMixture, forward_density, noise_times, reverse_density

# ## The data: three unequal modes on a line, an open ring in the plane

line = GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.3], [2.0]], [0.35, 0.25, 0.4])
angles = np.linspace(-0.6, 3.7, 10)
ring = GaussianMixture(np.linspace(0.05, 0.15, 10), 1.6 * np.stack([np.cos(angles), np.sin(angles)], axis=1),
                       np.full(10, 0.35))
SIGMA = 2.0  # final noise level, the same for all formulations

# ## The formulations: seven of the package and one written here

mine = Formulation(
    "my own",
    variance=lambda t: 2500 * t**2,
    scaling=lambda t: (1 + (50 * t)**3)**(1 / 3),
)
FORMULATIONS = [
    variance_exploding(), variance_exploding(schedule="linear"), variance_preserving(),
    variance_preserving(schedule="cosine"), sub_variance_preserving(), straight_line(), constant_moment(0.3), mine,
]
ALPHAS = (0.0, 0.5, 1.0, 2.0)


# ## One problem: a formulation, a mesh that is wide enough, the exact densities


class Problem:
    """Densities of a mixture under a formulation at equal steps of the noise level, in finite elements and exactly."""

    def __init__(self, mixture, formulation, cells, steps, degree=2):
        self.mixture, self.formulation = mixture, formulation
        self.times = noise_times(formulation, SIGMA, steps)
        self.a, self.s = (factor(torch.as_tensor(self.times)).numpy() for factor in (formulation.a, formulation.s))
        reach = np.linalg.norm(mixture.means, axis=1).max()
        self.width = float((self.a * reach + 5.5 * np.sqrt(self.a**2 * mixture.stds.max()**2 + self.s**2)).max())
        if mixture.means.shape[1] == 1:
            mesh = IntervalMesh(cells, -self.width, self.width)
        else:
            mesh = RectangleMesh(cells, cells, self.width, self.width, -self.width, -self.width)
        self.V = FunctionSpace(mesh, "CG", degree)

    def exact(self, k):
        """Exact density after step k, as a UFL expression."""
        return self.mixture.density(SpatialCoordinate(self.V.mesh()), Constant(self.a[k]), Constant(self.s[k]))

    def error(self, p, k):
        """Relative L2 error of a density after step k."""
        measure = dx(degree=2 * self.V.ufl_element().degree() + 4)
        return sqrt(assemble((p - self.exact(k))**2 * measure) / assemble(self.exact(k)**2 * measure))

    def forward(self, **kwargs):
        """From the data to noise."""
        return forward_density(Function(self.V).interpolate(self.exact(0)), self.formulation, self.times, **kwargs)

    def back(self, alpha, start=None, **kwargs):
        """From noise to the data, from the exact density or the one given, with the exact score."""
        start = start or Function(self.V).interpolate(self.exact(-1))
        return reverse_density(start, self.formulation, self.times[::-1], self.mixture.score, alpha, **kwargs)

    def particles(self, alpha, n, seed):
        """Particles carried back from the exact density at the final time, after every step: (steps + 1, n, d).

        Heun's rule for the drift, four steps in each step of the density equation, so that what is left is chance.
        """
        rng = np.random.default_rng(seed)
        data = self.mixture.sample(n, seed)
        xi = self.a[-1] * data + self.s[-1] * rng.standard_normal(data.shape)
        path = [xi]
        for start, end in zip(self.times[:0:-1], self.times[-2::-1]):
            fine = np.linspace(start, end, 5)
            for now, then in zip(fine[:-1], fine[1:]):
                dt = now - then
                b, g, a, s = self._coefficients((now + then) / 2)

                def drift(xi):
                    return b * xi + (1 + alpha) / 2 * g * self.mixture.score(xi, a, s)
                noise = np.sqrt(alpha * g * dt) * rng.standard_normal(xi.shape)
                first = drift(xi)
                xi = xi + dt / 2 * (first + drift(xi + dt * first + noise)) + noise
            path.append(xi)
        return np.array(path)

    def _coefficients(self, t):
        t = torch.tensor(t, dtype=torch.float64)
        return [float(getattr(self.formulation, name)(t)) for name in "bgas"]


# ## All formulations and all α come back


def errors(cells, steps, progress):
    """Rows of the table: name, error of the density at the final time, errors of the returned one for each α."""
    table = []
    for formulation in tqdm(FORMULATIONS, desc="formulations", disable=not progress or COMM_WORLD.rank > 0):
        problem = Problem(line, formulation, cells, steps)
        # Every way back starts from the finite element density, so its error holds those of both ways.
        end = problem.forward()
        table.append([formulation.name, problem.error(end, -1),
                      *(problem.error(problem.back(alpha, end), 0) for alpha in ALPHAS)])
    return table


def print_table(table):
    """The errors, as a Markdown table."""
    say("\nRelative L2 errors: of the density at the final time, and of the initial density after the way back\n")
    say("| formulation | forward | " + " | ".join(f"back, α = {alpha:g}" for alpha in ALPHAS) + " |")
    say("|---" * (len(ALPHAS) + 2) + "|")
    for name, *values in table:
        say(f"| {name} | " + " | ".join(f"{value:.1e}" for value in values) + " |")


# ## Pictures

plt.rcParams.update({"font.size": 14, "axes.titlesize": 15, "savefig.dpi": 160, "figure.constrained_layout.use": True})
MAP, LINES = "magma", ("#0072B2", "#D55E00", "#009E73")  # distinct for colour-blind eyes
OUTLINE = [patheffects.withStroke(linewidth=2.4, foreground="black")]


def history(problem, march, **kwargs):
    """Nodes (n,) of a line in order, times (steps + 1,) and densities (steps + 1, n) that `march` passes through."""
    nodes = Function(problem.V).interpolate(SpatialCoordinate(problem.V.mesh())[0]).dat.data_ro
    order, times, values = np.argsort(nodes), [], []

    def keep(t, p):
        times.append(t)
        values.append(p.dat.data_ro[order].copy())
    march(monitor=keep, **kwargs)
    return nodes[order], np.array(times), np.array(values)


def heat_map(ax, times, nodes, values, norm):
    """Density over time and place."""
    ax.set_facecolor(plt.get_cmap(MAP)(0))
    return ax.pcolormesh(times, nodes, values.T, cmap=MAP, norm=norm, shading="gouraud", rasterized=True)


def density_norm(top):
    """Colour scale that still shows the tails of a density."""
    return colors.PowerNorm(0.5, vmin=0, vmax=top)


def density_bar(figure, image, axes, top):
    """Colour bar with few ticks."""
    bar = figure.colorbar(image, ax=axes, label="density p, finite elements", aspect=25, pad=0.015)
    bar.set_ticks([round(top * fraction, 3) for fraction in (0, 0.05, 0.2, 0.5, 1)])


def draw_forward(folder, cells, steps):
    """Three formulations carry one density to noise: as a surface, and as a map with the exact contours on it."""
    figure = plt.figure(figsize=(14, 9))
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    surfaces = above.subplots(1, 3, subplot_kw={"projection": "3d"})
    maps = below.subplots(1, 3, sharey=True)
    names, top = ("variance exploding", "variance preserving", "straight line"), 0.6
    shown = (FORMULATIONS[0], FORMULATIONS[2], FORMULATIONS[5])
    for surface, ax, name, formulation in zip(surfaces, maps, names, shown):
        problem = Problem(line, formulation, cells, steps)
        nodes, times, values = history(problem, problem.forward)
        near = np.abs(nodes) < 4.4
        surface.plot_surface(*np.meshgrid(times, nodes[near]), values[:, near].T, cmap=MAP, norm=density_norm(top),
                             rcount=250, ccount=100, linewidth=0, antialiased=False, shade=False,
                             clip_on=False)
        surface.view_init(elev=40, azim=-38)
        surface.set_box_aspect((1.1, 1.3, 0.6), zoom=1.2)
        surface.set(ylim=(-5, 5), yticks=[-4, 0, 4], zticks=[0, 0.3, 0.6], zlim=(0, top))
        surface.set_title(name, y=1.08)
        surface.set_xlabel("time t", labelpad=8)
        surface.set_ylabel("ξ", labelpad=6)
        surface.set_zlabel("p")
        surface.xaxis.set_major_locator(ticker.MaxNLocator(3))
        image = heat_map(ax, times, nodes, values, density_norm(top))
        exact = np.array([line.density(nodes[:, None], a, s) for a, s in zip(problem.a, problem.s)])
        ax.contour(times, nodes, exact.T, levels=[0.01, 0.05, 0.1, 0.2, 0.4], colors="white", linewidths=0.9,
                   linestyles="dashed")
        ax.set(xlabel="time t", ylim=(-5, 5))
    maps[0].set_ylabel("ξ")
    maps[0].plot([], [], "--", color="white", linewidth=1, label="exact contours")
    maps[0].legend(loc="upper left", facecolor="black", labelcolor="white", fontsize=12)
    density_bar(below, image, maps, top)
    save(figure, folder / "forward.png")


def draw_reverse(folder, cells, steps, particles):
    """Particles of the ODE and of the SDE over the density, from the terminal law back to the data."""
    problem, top = Problem(line, FORMULATIONS[3], cells, steps), 0.6
    figure = plt.figure(figsize=(15, 5))
    grid = figure.add_gridspec(1, 7, width_ratios=[1, 3.6, 1, 0.25, 1, 3.6, 1])
    xi = np.linspace(-4, 4, 400)
    for column, alpha, name in ((0, 0.0, "ODE, α = 0"), (4, 1.0, "SDE, α = 1")):
        nodes, times, values = history(problem, problem.back, alpha=alpha)
        paths = problem.particles(alpha, particles, seed=3)[:, :, 0]
        left, middle, right = (figure.add_subplot(grid[column + i], ylim=(-4, 4)) for i in range(3))
        image = heat_map(middle, times, nodes, values, density_norm(top))
        # From every part of the terminal law, the same starts for both.
        shown = np.argsort(paths[0])[(np.linspace(0.02, 0.98, 12) * (particles - 1)).astype(int)]
        middle.plot(times, paths[:, shown], color="white", linewidth=1.3, path_effects=OUTLINE)
        middle.set(xlim=(times[0], times[-1]), title=name, xlabel="time t, running back")
        for ax, k, title in ((left, 0, "noise"), (right, -1, "data")):
            ax.hist(paths[k], bins=np.linspace(-4, 4, 61), density=True, orientation="horizontal", color="#56B4E9",
                    label="particles")
            ax.plot(line.density(xi[:, None], problem.a[-1 - k], problem.s[-1 - k]), xi, "k", linewidth=1.6,
                    label="exact")
            ax.set(title=title, xticks=[], xlabel="density")
        left.invert_xaxis()
        left.set_ylabel("ξ")
        for ax in (middle, right):
            ax.tick_params(labelleft=False)
    figure.axes[0].legend(loc="upper left", fontsize=10, frameon=False, handlelength=0.9, borderaxespad=0.1)
    density_bar(figure, image, figure.axes, top)
    save(figure, folder / "reverse.png")


def draw_plane(folder, cells, steps, particles, progress):
    """The ring on its way to noise, and on its way back for alpha = 1, with particles; both errors."""
    problem, top = Problem(ring, FORMULATIONS[3], cells, steps), 0.2
    shown, kept, rng = [0, steps // 6, steps // 2, steps], {"forward": {}, "back": {}}, np.random.default_rng(5)

    def keep(way):
        def monitor(t, p):
            k = int(np.argmin(np.abs(problem.times - t)))
            if k in shown:
                kept[way][k] = p.copy(deepcopy=True)
        return monitor
    end = problem.forward(monitor=keep("forward"), progress=progress)
    returned = problem.back(1.0, end, monitor=keep("back"), progress=progress)
    start = ring.sample(particles, seed=4)
    clouds = {"forward": [problem.a[k] * start + problem.s[k] * rng.standard_normal(start.shape) for k in shown],
              "back": problem.particles(1.0, particles, seed=6)[[steps - k for k in shown]]}
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.6), sharex=True, sharey=True)
    for row, way, name in zip(axes, kept, ("forward  →", "←  back, α = 1")):
        for ax, k, cloud in zip(row, shown, clouds[way]):
            image = tripcolor(kept[way][k], axes=ax, cmap=MAP, norm=density_norm(top), shading="gouraud",
                              rasterized=True)
            ax.plot(*cloud.T, ".", color="white", markersize=3, alpha=0.75, markeredgewidth=0)
            ax.set(aspect="equal", xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        row[0].set_ylabel(f"{name}\nξ₂")
    for above, below, k in zip(*axes, shown):
        above.set_title(f"t = {problem.times[k]:.2f}, σ = {SIGMA * k / steps:.2f}")
        below.set_xlabel("ξ₁")
    density_bar(figure, image, axes, top)
    save(figure, folder / "plane.png")
    return problem.error(end, -1), problem.error(returned, 0)


def draw_refinement(folder, coarse, progress):
    """Errors under refinement of mesh and step, with the slopes that theory expects."""
    def error(way, cells, steps, degree):
        problem = Problem(line, FORMULATIONS[3], cells, steps, degree)
        return problem.error(problem.forward(), -1) if way == "forward" else problem.error(problem.back(way), 0)
    meshes, steps = ((20, 40), (5, 10)) if coarse else ((40, 80, 160, 320), (10, 20, 40, 80, 160))
    # The error that is not shown is kept small: many steps for the mesh, cubic elements for the step.
    many, fine = ({1: 10, 2: 20}, 40) if coarse else ({1: 200, 2: 600}, 200)
    ways = {"forward": "forward", 0.0: "back, α = 0", 1.0: "back, α = 1"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.4))
    for (way, name), colour in tqdm(list(zip(ways.items(), LINES)), desc="refinement", disable=not progress):
        for degree, style in ((1, "o--"), (2, "s-")):
            left.loglog(meshes, [error(way, n, many[degree], degree) for n in meshes], style, color=colour,
                        label=f"{name}, CG{degree}")
        right.loglog(steps, [error(way, fine, n, 3) for n in steps], "D-", color=colour, label=name)
    for ax, numbers, orders, label in ((left, meshes, (2, 3), "cells"), (right, steps, (2,), "time steps")):
        for order, height in zip(orders, (0.15, 5e-5)):
            ax.loglog(numbers, height * (np.array(numbers) / numbers[0])**-float(order), ":", color="0.35", linewidth=2)
            ax.annotate(f"order {order}", (numbers[1], height / 2**order), (0, 8 if order == 2 else -22),
                        textcoords="offset points", color="0.35")
        ax.set_xticks(numbers, map(str, numbers))
        ax.minorticks_off()
        ax.margins(y=0.12)
        ax.set(xlabel=f"number of {label}", ylabel="relative L2 error")
        ax.grid(alpha=0.3)
    left.set_title("mesh refinement")
    right.set_title("step refinement, CG3")
    for ax in (left, right):
        ax.legend(fontsize=11, loc="lower left")
    save(figure, folder / "refinement.png")


def save(figure, file):
    """Write and close a picture."""
    figure.savefig(file)
    plt.close(figure)


# ## The job


def run(folder, progress, coarse=False):
    """All pictures and the table of errors: name, forward, and back for each alpha, one row for each formulation."""
    start = time.perf_counter()
    cells, steps, particles = (60, 20, 500) if coarse else (300, 200, 20000)
    table = errors(cells, steps, progress)
    print_table(table)
    if COMM_WORLD.size > 1:
        say("pictures are drawn on one rank only")
        return table
    draw_forward(folder, cells, steps)
    draw_reverse(folder, cells, steps, particles)
    forward, back = draw_plane(folder, *((20, 12, 100) if coarse else (56, 90, 600)), progress)
    say(f"\nring in the plane, {FORMULATIONS[3].name}: error forward {forward:.1e}, back with α = 1 {back:.1e}")
    draw_refinement(folder, coarse, progress)
    say(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}")
    return table


def say(text):
    """Print on rank 0 only."""
    if COMM_WORLD.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output, progress=True)
