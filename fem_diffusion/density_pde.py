r"""The diffusion models of this package as PDEs for a density, solved with finite elements.

Forward in time, the law of ``a z_0 + s ε`` is the solution of (arXiv 2504.07437, forward process; the Fokker-Planck
equation of Song et al. 2021, eq. 5)

.. math:: \partial_t p = \nabla\cdot(b\, \xi\, p) + \tfrac{g}{2} \Delta p .

With time reversed, :math:`\tau = T - t`, and the score :math:`q = \nabla \log p_t`, the densities for all
:math:`\alpha \ge 0` retrace the same path,

.. math:: \partial_\tau p = -\nabla\cdot\big([b\, \xi + \tfrac{1+\alpha}{2} g\, q]\, p\big)
                            + \tfrac{\alpha g}{2} \Delta p ,

the law of particles under the probability-flow ODE (:math:`\alpha = 0`), the reverse SDE (:math:`\alpha = 1`, Song et
al. 2021, eqs. 6 and 13) and the whole family between and beyond (arXiv 2504.07437, reverse process).

Both are conservation laws, :math:`\partial p + \nabla\cdot F = 0`, with the natural boundary condition
:math:`n \cdot F = 0` of :math:`\int \partial p\, w = \int F \cdot \nabla w`: the mass is conserved to rounding on any
domain; choose it so that p is negligible at its boundary. No stabilisation is needed, not even without diffusion: the
densities are smooth and form no layer at a boundary they do not reach. The order in L2 is the degree plus one; for
:math:`\alpha = 0` and even degree it is the degree. Times are the formulation's, in [0, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ufl
from firedrake import (Constant, Function, LinearVariationalProblem, LinearVariationalSolver, SpatialCoordinate,
                       TestFunction, TrialFunction, dot, dx, grad, lhs, rhs)
from firedrake.adjoint import stop_annotating
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from numpy.typing import ArrayLike
from ufl.core.expr import Expr

from fem_diffusion.checks import check_array, check_callable, check_count, check_flag, check_number, check_seed
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import require_real
from fem_diffusion.fields.checks import check_finite, check_solver, solver_reason
from fem_diffusion.forward.solvers import linear_options
from fem_diffusion.progress import bar

if TYPE_CHECKING:   # this room is of use without torch
    import torch
    from fem_diffusion.diffusion import Formulation

__all__ = ["GaussianMixture", "forward_density", "noise_times", "reverse_density"]

Monitor = Callable[[float, Function], None]
Number = Expr | float
Positions = TypeVar("Positions", Expr, np.ndarray)


def forward_density(p: Function, formulation: "Formulation", times: ArrayLike, *, theta: float = 0.5,
                    solver_parameters: str | dict = "direct", options_prefix: str | None = None,
                    monitor: Monitor | None = None, progress: bool = True) -> Function:
    """Density at ``times[-1]``, in the space of p, carried forward: ``∂p/∂t = ∇·(b ξ p) + (g/2) Δp``.

    Parameters
    ----------
    p : Function
        Density at ``times[0]``, in a scalar H1-conforming space (CG or Q of any degree); left as it is.
    formulation : Formulation
        Gives b(t), g(t), a(t) and s(t).
    times : sequence of float
        Increasing times in [0, 1], shape (steps + 1,); see `noise_times`.
    theta : float
        Implicitness in [1/2, 1]. A step solves with p = θ p_new + (1 - θ) p_old and coefficients at the time of that
        p: 1/2 is the implicit midpoint rule (Crank-Nicolson, second order), 1 backward Euler for rough data.
    solver_parameters, options_prefix : "direct", "iterative" or dict, and str, optional
        PETSc options of the linear solve of each step, and their prefix on the command line.
    monitor : callable, optional
        ``monitor(t, p)``, called at the first time and after every step, with a copy of the density.
    progress : bool
        Show a progress bar on rank 0.

    InputError where an argument does not fit, SolveError where a solve fails, InstallError for a complex PETSc.
    """
    return _march(p, formulation, _checked(p, formulation, times, direction=1),
                  lambda p, xi, b, g, a, s: -b * xi * p - g / 2 * grad(p), theta, (solver_parameters, options_prefix),
                  monitor, progress)


def reverse_density(p: Function, formulation: "Formulation", times: ArrayLike,
                    score: Callable[[Expr, Expr, Expr], Expr], alpha: float, *, theta: float = 0.5,
                    solver_parameters: str | dict = "direct", options_prefix: str | None = None,
                    monitor: Monitor | None = None, progress: bool = True) -> Function:
    """Density carried backward: ``∂p/∂τ = -∇·([b ξ + (1+α)/2 g q] p) + (α g/2) Δp``.

    Parameters
    ----------
    times : sequence of float
        Decreasing times in [0, 1], shape (steps + 1,).
    score : callable
        ``score(ξ, a, s)``, the UFL vector q of shape (gdim,) at the coordinates ξ of the mesh, for the law of
        ``a z_0 + s ε``; called once, with Constants a and s that every step sets. `GaussianMixture.score` is one.
    alpha : float
        0 for the probability-flow ODE, 1 for the reverse SDE, any number >= 0.
    p, formulation, theta, solver_parameters, options_prefix, monitor, progress
        As in `forward_density`, and so is what it raises.
    """
    times = _checked(p, formulation, times, direction=-1)
    check_callable(score, "score", "a function of ξ, a and s, such as GaussianMixture.score", 3)
    weight = Constant(check_number(alpha, "alpha", least=0))

    def flux(p: Expr, xi: Expr, b: Constant, g: Constant, a: Constant, s: Constant) -> Expr:
        q = score(xi, a, s)
        if not isinstance(q, Expr) or q.ufl_shape != xi.ufl_shape:
            raise InputError(f"score(ξ, a, s) is {q!r}: return a UFL vector of shape {xi.ufl_shape}, by as_vector.")
        return (b * xi + (1 + weight) / 2 * g * q) * p - weight * g / 2 * grad(p)
    return _march(p, formulation, times, flux, theta, (solver_parameters, options_prefix), monitor, progress)


def noise_times(formulation: "Formulation", sigma: float, steps: int) -> np.ndarray:
    """Times from 0 to the noise level `sigma`, shape (steps + 1,), between which the level grows by equal amounts.

    Formulations spend their time very differently; with these times all of them see the same noise in each step.
    InputError unless `sigma` lies between the formulation's noise levels at t = 0 and t = 1.
    """
    _check_formulation(formulation, ("sigma", "time"))
    start, end = (float(formulation.sigma(_tensor(t))) for t in (0.0, 1.0))
    steps, sigma = check_count(steps, "steps"), check_number(sigma, "sigma", above=start, most=end)
    times = formulation.time(_tensor(np.linspace(start, sigma, steps + 1))).numpy()
    times[0] = 0.0
    return times


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A density whose diffusion is known in closed form: a mixture of isotropic Gaussians in d dimensions.

    The law of ``a z_0 + s ε`` has the component means ``a m_i`` and variances ``a² std_i² + s²``. Positions are a UFL
    vector (the coordinates of a mesh) or an array of shape (n, d); a and s are Constants or numbers to go with them.

    Parameters
    ----------
    weights, means, stds : array_like
        Probabilities (k,), positive, which sum to one, centres (k, d) and positive standard deviations (k,); copied.
    """

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray

    def __post_init__(self) -> None:
        for name, shape in (("weights", ("k",)), ("means", ("k", "d")), ("stds", ("k",))):
            object.__setattr__(self, name, check_array(getattr(self, name), name, shape))
            getattr(self, name).flags.writeable = False
        k, d = self.means.shape
        if not d or len(self.weights) != k or len(self.stds) != k:
            raise InputError(f"weights {self.weights.shape}, means {self.means.shape}, stds {self.stds.shape}: give "
                             "the shapes (k,), (k, d) and (k,) for k components in d dimensions.")
        if not ((self.weights > 0).all() and (self.stds > 0).all() and np.isclose(self.weights.sum(), 1)):
            raise InputError("weights and stds must be positive and the weights sum to 1: divide them by their sum.")

    def __repr__(self) -> str:
        return "GaussianMixture({} components in {} dimensions)".format(*self.means.shape)

    def density(self, xi: Positions, a: Number = 1.0, s: Number = 0.0) -> Positions:
        """Density at positions `xi` of the law of ``a z_0 + s ε``: a UFL scalar, or an array (n,)."""
        shares, top, *_ = self._shares(xi, a, s)
        return top * sum(shares)

    def score(self, xi: Positions, a: Number = 1.0, s: Number = 0.0) -> Positions:
        """Gradient of the logarithm of that density: a UFL vector of shape (d,), or an array (n, d)."""
        shares, _, pulls = self._shares(xi, a, s)
        rows = [sum(share * x for share, x in zip(shares, along)) / sum(shares) for along in zip(*pulls)]
        join: dict[bool, Callable] = {True: ufl.as_vector, False: partial(np.stack, axis=-1)}
        return join[isinstance(xi, Expr)](rows)

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Independent draws of z_0, shape (n, d)."""
        n, rng = check_count(n), np.random.default_rng(check_seed(seed))
        which = rng.choice(len(self.weights), size=n, p=self.weights)
        return self.means[which] + self.stds[which, None] * rng.standard_normal((n, self.means.shape[1]))

    def _shares(self, xi: Expr | np.ndarray, a: Number, s: Number) -> tuple[list, Any, list[list]]:
        """Weighted component densities over the largest, that one, and scores by component."""
        k, d = self.means.shape
        array = not isinstance(xi, Expr)
        if array:
            xi = check_array(xi, "xi", (d,), ("n", d))
        elif xi.ufl_shape != (d,):
            raise InputError(f"the mixture lives in {d} dimensions, the positions do not: give means of shape (k, d) "
                             "with the dimension d of the mesh, and arrays of positions the shape (n, d).")
        a, s = (x if isinstance(x, Expr) and not x.ufl_shape else check_number(x, name, least=least)
                for name, x, least in (("a", a, -np.inf), ("s", s, 0.0)))
        if isinstance(a, float) and isinstance(s, float) and not a and not s:
            raise InputError("a and s are both zero: a law without spread has no density; give one of them.")
        rules: dict[bool, tuple[Callable, ...]] = {
            True: (np.exp, np.log, np.maximum), False: (ufl.exp, ufl.ln, ufl.max_value)}
        exp, log, maximum = rules[array]
        # Constants, so that every mixture of so many components shares one compiled kernel.
        weights, means, stds = (v if array else Constant(v) for v in (self.weights, self.means, self.stds))
        logs, pulls = [], []
        for i in range(k):
            variance, away = a**2 * stds[i]**2 + s**2, [a * means[i, j] - xi[..., j] for j in range(d)]
            logs.append(log(weights[i]) - d / 2 * log(2 * math.pi * variance)
                        - sum(x**2 for x in away) / (2 * variance))
            pulls.append([x / variance for x in away])
        top = reduce(maximum, logs)
        # Relative to the largest term, because far from all centres every term underflows.
        return [exp(value - top) for value in logs], exp(top), pulls


def _tensor(values: float | np.ndarray) -> "torch.Tensor":
    """Floats as the float64 tensors on which a formulation computes."""
    import torch   # here, because Firedrake must come first
    return torch.as_tensor(values, dtype=torch.float64)


def _check_formulation(formulation: "Formulation", methods: Sequence[str]) -> None:
    if isinstance(formulation, type) or not all(callable(getattr(formulation, name, None)) for name in methods):
        raise InputError(f"formulation is {formulation!r}: give a Formulation, such as variance_exploding().")


def _checked(p: Function, formulation: "Formulation", times: ArrayLike, direction: int) -> np.ndarray:
    """Times as an array (steps + 1,), or InputError for what does not describe a run in this direction."""
    require_real()
    _check_formulation(formulation, "bgas")
    if not isinstance(p, Function) or p.ufl_shape != () or p.function_space().ufl_element() not in ufl.H1:
        raise InputError("the density must be a scalar Function of a continuous space: make one with "
                         "Function(FunctionSpace(mesh, 'CG', 2)).interpolate(...).")
    mesh = p.function_space().mesh()
    if mesh.geometric_dimension != mesh.topological_dimension:
        raise InputError(f"the mesh has dimension {mesh.topological_dimension} in {mesh.geometric_dimension} "
                         "dimensions: take a mesh that fills its space, because ξ is a vector of its coordinates.")
    check_finite(p, "the density")
    times = check_array(times, "times", ("n",))
    steps = direction * np.diff(times)
    if not (steps.size and (steps > 0).all() and times.min() >= 0 and times.max() <= 1):
        raise InputError(f"give at least two {'increasing' if direction > 0 else 'decreasing'} times in [0, 1]; "
                         "noise_times makes increasing ones, times[::-1] turns them round.")
    return times


def _march(p: Function, formulation: "Formulation", times: np.ndarray, flux: Callable[..., Expr], theta: float,
           solver: tuple[str | dict, str | None], monitor: Monitor | None, progress: bool) -> Function:
    """Density at the last time, by the theta rule for ``∂p + ∇·F(p) = 0`` with ``n·F = 0`` on the boundary."""
    V = p.function_space()
    theta = check_number(theta, "theta", least=0.5, most=1)
    options = linear_options(check_solver(*solver, V.comm), V, advective=True)
    tell = (lambda t, p: None) if monitor is None else check_callable(monitor, "monitor", "a function of t and p", 2)
    show = check_flag(progress, "progress") and V.comm.rank == 0
    step, *coefficients = (Constant(0.0) for _ in range(5))
    old, trial, test = p.copy(deepcopy=True), TrialFunction(V), TestFunction(V)
    new = Function(V, name="density").assign(p)
    # Two degrees above the polynomial part: what UFL would estimate for a quotient of exponentials is far too much.
    measure = dx(degree=2 * V.ufl_element().embedded_superdegree + 2)
    F = flux(theta * trial + (1 - theta) * old, SpatialCoordinate(V.mesh()), *coefficients)
    form = ((trial - old) * test - step * dot(F, grad(test))) * measure
    problem = LinearVariationalProblem(lhs(form), rhs(form), new)
    step_solver = LinearVariationalSolver(problem, solver_parameters=options, options_prefix=solver[1])
    with stop_annotating(), bar(len(times) - 1, "density", show) as shown:
        tell(float(times[0]), new.copy(deepcopy=True))
        for start, end in zip(times[:-1], times[1:]):
            time = _tensor((1 - theta) * start + theta * end)
            for constant, name in zip(coefficients, "bgas"):
                constant.assign(float(getattr(formulation, name)(time)))
            step.assign(abs(end - start))
            old.assign(new)
            try:
                step_solver.solve()
            except (ConvergenceError, PETSc.Error) as error:
                raise SolveError(f"the step from t = {start:g} to {end:g} failed: {solver_reason(error)}; take smaller "
                                 "steps or solver_parameters='direct'.") from error
            tell(float(end), new.copy(deepcopy=True))
            shown.update()
    return new
