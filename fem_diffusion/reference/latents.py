"""A measurement as a density over latents: the one target of every reference and of corrections."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import numpy as np
from firedrake import Ensemble
from mpi4py import MPI

from fem_diffusion.checks import check_array, check_kind, check_seed, stream, together
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.checks import check_ensemble
from fem_diffusion.fields.coefficients import coefficients, field, on_root
from fem_diffusion.prior.chain_rule import ChainRule
from fem_diffusion.prior.draws import filled
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.problem import InverseProblem
from fem_diffusion.progress import tell
from fem_diffusion.reference.likelihood import Likelihood
from fem_diffusion.reference.solver import CountedSolver
from fem_diffusion.samples import Samples

__all__ = ["FAR", "LatentProblem"]

T = TypeVar("T")

# Beyond so many prior standard deviations nothing is solved.
FAR = 12.0
# Steps of differences in latents: of readings, with the solver's tolerance, and of a log density, which has none.
_STEP, _FINE = 1e-3, 1e-5


class LatentProblem(CountedSolver):
    """One measurement in latents z in R^r: -log p(z | y) = -log prior(z) - log p(y | readings(z)), up to log p(y).

    Latents and readings are NumPy arrays, global and the same on all ranks and members of an ensemble; all methods are
    collective. The gradient is exact, from one adjoint solve: derivative of -log p(y | readings) by the readings, as
    one row over the state, back through the forward problem, the prior's transform and the modes.

    Parameters
    ----------
    problem : InverseProblem
        With noise that has a density: all but CallableNoise without its `log_density`. Any forward problem and
        any instrument.
    y : array_like of shape (k,)
        The measurement.
    basis : ModalBasis, optional
        ``karhunen_loeve(problem.prior)`` where left out.
    log_prior : callable, optional
        Log density of latents, (B, r) to (B,), where they are not standard normal: for a POD basis, and only there.
    ensemble : firedrake.Ensemble, optional
        Shares out the solves over its members, each with a problem on a mesh of its own communicator.

    Attributes
    ----------
    r, width : int
        Number of latents; of readings, with the standard normal numbers of unknown levels of noise behind them, (B, k)
        being (B, width) then.
    unrestricted : bool
        Whether a constraint of the prior is left out: see `solver.unrestricted`.
    solves, pulls, failure, limit
        As `CountedSolver` has them.

    InputError is raised if an argument is of another kind, the noise has no density, y is of another shape or not
    finite, or the basis has neither standard normal latents nor a `log_prior`.
    """

    def __init__(self, problem: InverseProblem, y: np.ndarray, basis: ModalBasis | None = None, *,
                 log_prior: Callable[[np.ndarray], np.ndarray] | None = None, ensemble: Ensemble | None = None):
        self._likelihood = Likelihood(problem, y)
        self.y = self._likelihood.y
        super().__init__(problem, len(self.y))
        self.basis = check_kind(karhunen_loeve(problem.prior) if basis is None else basis, "basis", ModalBasis,
                                "karhunen_loeve(prior)")
        if self.basis.V != problem.V:
            raise InputError("The basis is not in the space of the prior's fields: give karhunen_loeve(problem.prior).")
        if self.basis.standard_prior and log_prior is not None:
            raise InputError("The latents of this basis are standard normal under the prior: leave log_prior out.")
        if not self.basis.standard_prior and log_prior is None:
            raise InputError("The basis has no standard normal latents, so their prior density is not known: give "
                             "karhunen_loeve(problem.prior), or log_prior=.")
        self._log_prior, self._ensemble = log_prior, None if ensemble is None else check_ensemble(ensemble)
        self.r = self.basis.r
        # Levels of noise are affine in the latents: rows (l, r) and offset (l,) of their standard normal numbers.
        self.level_rows = problem.normal_levels(self.basis.scaled_modes).T
        self._normal = problem.normal_levels(coefficients(self.basis.mean)[None])[0]
        self.width = len(self.y) + len(self._normal)
        self._told, self._back = False, ChainRule(problem.prior, self.basis)
        self._last: tuple[bytes, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def everyone(self) -> MPI.Comm:
        """MPI communicator of all who call together."""
        return self.problem.comm if self._ensemble is None else self._ensemble.global_comm

    @cached_property
    def differentiable(self) -> bool:
        """Whether forward problem, sensors, density and transform have derivatives, so that gradients are exact."""
        try:
            self.problem.differentiable()
        except InputError:
            return False
        return self._back.there and self._said(lambda: self._likelihood.differentiable)

    def parameters(self, z: np.ndarray) -> np.ndarray:
        """Owned coefficients of the parameters (B, n_owned of M) with latents (B, r), without modes past r."""
        return self.problem.prior.transform_many(self.basis.decode(z))

    def readings(self, z: np.ndarray) -> np.ndarray:
        """Noise-free readings (B, k) by the forward problem, one solve each; rows of NaN where it fails.

        What a failure is: the user's code raises, or parameter, state or readings are not finite. Mistakes, such as a
        state in another space, are raised.
        """
        z = check_array(z, "z", ("B", self.r))
        return self.with_levels(self._shared(z, lambda mine: self._solve(self.parameters(mine)), len(self.y)), z)

    def with_levels(self, readings: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Readings (B, k) with the normal numbers of the levels at latents (B, r) behind them; NaN stays such."""
        if self.width == len(self.y):
            return readings
        lost = np.isnan(readings).any(axis=1, keepdims=True)
        return np.hstack([readings, np.where(lost, np.nan, self.normal_levels(z))])

    def normal_levels(self, z: np.ndarray) -> np.ndarray:
        """Standard normal numbers (B, l) of unknown levels of noise at latents (B, r)."""
        return self._normal + z @ self.level_rows.T

    def log_likelihood(self, readings: np.ndarray) -> np.ndarray:
        """log p(y | readings), shape (B,), of noise-free readings (B, k); minus infinity where they are NaN."""
        return self._said(lambda: self._likelihood.log_density(readings))

    def log_prior(self, z: np.ndarray) -> np.ndarray:
        """Log density of latents (B, r) under the prior, shape (B,); minus infinity where it does not allow them."""
        found = self.smooth_log_prior(z)
        return found if self.unrestricted else np.where(self.allowed(z), found, -np.inf)

    def allowed(self, z: np.ndarray) -> np.ndarray:
        """Whether the prior allows latents (B, r), shape (B,)."""
        allows = self.problem.prior.allows
        return np.ones(len(z), dtype=bool) if allows is None else allows(self.basis.decode(z))

    def smooth_log_prior(self, z: np.ndarray) -> np.ndarray:
        """As `log_prior`, without a constraint."""
        if self._log_prior is None:
            return -(z**2).sum(axis=1) / 2 - self.r / 2 * np.log(2 * np.pi)
        given = self._log_prior
        found = on_root(self.everyone, lambda: np.asarray(given(z.copy()), dtype=float))
        if found.shape != (len(z),) or np.isnan(found).any():
            raise InputError(f"log_prior gives {'NaN' if found.shape == (len(z),) else f'the shape {found.shape}'}: "
                             f"let it return a number for each of {len(z)} latents.")
        return found

    def energy(self, z: np.ndarray) -> np.ndarray:
        """-log p(z | y) up to log p(y), shape (B,): infinity where the solver fails, or z is beyond reach of a prior.

        Nothing is solved where z is more than 12 prior standard deviations out.
        """
        z, prior, inside = self._reached(z)
        readings = np.full((len(z), self.width), np.nan)
        readings[inside] = self.readings(z[inside])
        # The same on all ranks, whatever their rounding: one that accepts alone would leave the others.
        return self.everyone.bcast(self._energy(prior, readings))

    def energy_and_gradient(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`energy` (B,) and its gradient (B, r), zero where it is infinite: one solve and one adjoint solve each.

        Where there is no derivative, central differences of the readings, by 2 r more solves each.
        """
        return self.readings_and_gradient(z)[1:]

    def readings_and_gradient(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Readings (B, k), NaN where nothing is solved or solves fail, and `energy_and_gradient`."""
        z, prior, inside = self._reached(z)
        readings, gradient = np.full((len(z), self.width), np.nan), np.zeros_like(z)
        if inside.any() and self.differentiable:
            found = self._shared(z[inside], self._read_and_pulled, self.width + self.r)
            readings[inside], gradient[inside] = np.split(found, [self.width], axis=1)
        elif inside.any():
            readings[inside] = self.readings(z[inside])
            solved = np.isfinite(readings).all(axis=1)
            scores = self._said(lambda: self._likelihood.score(readings[solved]))
            gradient[solved] = [score @ self._differences(row) for row, score in zip(z[solved], scores)]
        energy = self._energy(prior, readings)
        # A state whose adjoint fails counts as failed.
        there = np.isfinite(energy) & np.isfinite(gradient).all(axis=1)
        gradient[there] -= self._prior_slope(z[there])
        return self.everyone.bcast((readings, np.where(there, energy, np.inf), np.where(there[:, None], gradient, 0.0)))

    def noise_matrix(self, readings: np.ndarray) -> np.ndarray:
        """What whitens the noise at readings (k,), as `whitened` and `linearised` have it: a matrix (k, k)."""
        return self._said(lambda: self._likelihood.matrix(readings))

    def whitened(self, readings: np.ndarray) -> np.ndarray:
        """Readings (B, k) minus measurement in units of the noise, whitened, shape (B, k).

        Noise that depends on the readings is whitened at these, a density of the user's own by the covariance of draws
        at readings y.
        """
        return self._said(lambda: self._likelihood.whitened(readings))

    def linearised(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whitened misfit (k,) at z (r,), and its derivative by latents (k, r): one solve and k adjoint ones.

        Noise that depends on the readings keeps its covariance there. Where there is no derivative, central
        differences, by 2 r solves. SolveError if there is no solution at z. Once more at the same z it costs nothing.
        """
        z = check_array(z, "z", (self.r,))
        if self._last is None or self._last[0] != z.tobytes():
            self._last = z.tobytes(), self._linearised(z)
        return self._last[1]

    def _linearised(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `linearised`, whatever it costs."""
        readings = self.readings(z[None])
        if np.isnan(readings).any():
            raise SolveError(f"The forward problem has no solution where it is to be linearised ({self.failure}): "
                             "check it there.")
        W = self.noise_matrix(readings[0])
        jacobian = self.pull(z, W) if self.differentiable else W @ self._differences(z)
        return self.everyone.bcast((self.whitened(readings)[0], jacobian))

    def pull(self, z: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Derivatives by latents of weighted sums (l, k) of the readings at z (r,): (l, r), by l adjoint solves."""
        k = len(self.y)
        seen = weights[:, :k].any(axis=1)
        pulled = weights[:, k:] @ self.level_rows
        if seen.any():
            pulled[seen] += self._back.at(self._rows(z, weights[seen, :k]), self.basis.decode(z[None])[0])
        return self.everyone.bcast(pulled)

    @property
    def noise_std(self) -> np.ndarray:
        """Standard deviation (k,) of the noise at readings y."""
        return self._said(lambda: self._likelihood.std)

    @property
    def noise_draws(self) -> np.ndarray | None:
        """Whitened draws (n, k) of noise of the user's own at readings y; None for Gaussian noise."""
        return self._said(lambda: self._likelihood.draws)

    def chances(self, size: float) -> tuple[float, float]:
        """Chance that squares of whitened noise sum up to so much or more, and to so much or less."""
        return self._said(lambda: self._likelihood.chances(size))

    def slopes(self, z: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Derivatives (l, k) of the readings at z (r,) along directions (l, r), by central differences: 2 l solves.

        NaN where a solve fails.
        """
        length = np.linalg.norm(directions, axis=1, keepdims=True)
        steps = _STEP * directions / length
        ahead, behind = np.split(self.readings(z + np.vstack([steps, -steps])), 2)
        return (ahead - behind) * length / (2 * _STEP)

    def whitener(self, z: np.ndarray) -> np.ndarray:
        """Matrix W (k, k) that whitens the noise at latents z (r,), as `whitened` and `linearised` use it."""
        return self.noise_matrix(self.y if self._likelihood.constant else self.readings(z[None])[0])

    def expanded(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (r,) of the energy at z (r,), and its Gauss-Newton Hessian (r, r); costs and errors of `linearised`.

        Noise that is not Gaussian, or depends on the readings, takes one adjoint solve more.
        """
        misfit, jacobian = self.linearised(z)
        if self._likelihood.gaussian:
            gradient = jacobian.T @ misfit - self._prior_slope(z[None])[0]
        else:
            gradient = self.energy_and_gradient(z[None])[1][0]
        return gradient, np.eye(self.r) + jacobian.T @ jacobian

    def linear_force(self, z: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Gradients (B, r) of an energy with the forward problem linearised at z (r,), without solves.

        In the parameter, so that transforms stay what they are; in the latents where there is no derivative. Costs and
        errors of `linearised`.
        """
        at, comm = self.readings(z[None]), self.problem.comm
        if np.isnan(at).any():
            raise SolveError(f"The forward problem has no solution where it is to be linearised ({self.failure}): "
                             "check it there.")
        there, smooth = self.parameters(z[None]), self.differentiable
        rows = self._rows(z) if smooth else self._differences(z)

        def force(x: np.ndarray) -> np.ndarray:
            fields = self.basis.decode(x) if smooth else x
            if smooth:
                change = comm.allreduce((self.problem.prior.transform_many(fields) - there) @ rows.T)
                change = np.hstack([change, (x - z) @ self.level_rows.T])
            else:
                change = (x - z) @ rows.T
            scores = self._said(lambda: self._likelihood.score(at + change))
            k = len(self.y)
            pulled = (self._back.each(scores[:, :k] @ rows, fields) + scores[:, k:] @ self.level_rows if smooth else
                      scores @ rows)
            return self.everyone.bcast(pulled - self._prior_slope(x))
        return force

    def samples(self, z: np.ndarray, seed: int) -> Samples:
        """Latents (n, r) as samples of the parameter; modes past r are drawn from the prior, but those of POD.

        Where the prior is constrained they are drawn anew until it allows them; SolveError if it hardly does.
        """
        def values() -> np.ndarray:
            return filled(self.problem.prior, self.basis, z, seed)
        seed = stream(check_seed(seed), "tail")
        if self.problem.prior.allows is not None:   # which may fail
            return Samples(self.problem.M, values(), np.array(z))
        return Samples.later(self.problem.M, values, np.array(z))

    def refilled(self, z: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Readings (B, k) at latents (B, r) with modes past r from the prior, and without: two solves each."""
        tail = filled(self.problem.prior, self.basis, z, stream(seed, "tail"), constrained=False)

        def read(mine: np.ndarray) -> np.ndarray:
            mine = mine[:, 0].astype(int)
            return np.hstack([self._solve(tail[mine]), self._solve(self.parameters(z[mine]))])
        found = self._shared(np.arange(len(z))[:, None], read, 2 * len(self.y))
        whole, part = np.split(self.everyone.bcast(found), 2, axis=1)
        return self.with_levels(whole, z), self.with_levels(part, z)

    def _said(self, run: Callable[[], T]) -> T:
        """What the likelihood says, of rank 0: a density of the user's own runs once, and fails for all."""
        return on_root(self.problem.comm, run)

    def _reached(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latents (B, r), their log prior (B,), and which of them are to be solved for (B,)."""
        z = check_array(z, "z", ("B", self.r))
        prior = self.log_prior(z)
        return z, prior, self.everyone.bcast((np.abs(z) < FAR).all(axis=1) & np.isfinite(prior))

    def _energy(self, prior: np.ndarray, readings: np.ndarray) -> np.ndarray:
        """Energies (B,) from log prior (B,) and readings (B, k)."""
        energy = -prior - self.log_likelihood(readings)
        return np.where(np.isfinite(energy), energy, np.inf)

    def _shared(self, z: np.ndarray, run: Callable[[np.ndarray], np.ndarray], columns: int) -> np.ndarray:
        """Rows of `run` (B, columns) for rows z, shared out over the members of an ensemble."""
        if self._ensemble is None:
            return together(self.problem.comm, lambda: run(z)) if len(z) else np.empty((0, columns))
        comm, before = self._ensemble.ensemble_comm, (self.solves, self.pulls)
        mine = z[comm.rank::comm.size]
        try:
            part = together(self._ensemble.global_comm, lambda: run(mine) if len(mine) else np.empty((0, columns)))
        finally:
            spent = comm.allreduce(np.array([self.solves, self.pulls]) - before)
            self.solves, self.pulls = (int(x) for x in before + spent)
        found = np.empty((len(z), columns))
        for i, rows in enumerate(comm.allgather(part)):
            found[i::comm.size] = rows
        return found

    def _rows(self, z: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Derivative of the readings, or of weighted sums (l, k), by the parameter at z (r,): (l, n_owned of M)."""
        m = field(self.problem.M, self.parameters(z[None])[0])
        seen = None if weights is None else weights @ self.problem.differentiable()[1].rows
        self._spend(0, len(self.y) if weights is None else len(weights))
        return together(self.everyone, lambda: self.problem.sensitivity(m, seen))

    def _prior_slope(self, z: np.ndarray) -> np.ndarray:
        """Derivative of the prior's log density at latents (B, r)."""
        if self._log_prior is None:
            return -z
        steps = _FINE * np.eye(self.r)
        return np.stack([(self.smooth_log_prior(z + step) - self.smooth_log_prior(z - step)) / (2 * _FINE)
                         for step in steps], axis=1)

    def _read_and_pulled(self, z: np.ndarray) -> np.ndarray:
        """Readings and the gradient of -log p(y | readings) at latents (B, r): (B, k + r), NaN where solves fail.

        One latent after the other, so that a solver that keeps its last solve has it ready for the derivative.
        """
        problem, fields, k = self.problem, self.basis.decode(z), len(self.y)
        parameters, found = problem.prior.transform_many(fields), np.full((len(z), self.width + self.r), np.nan)
        observation = problem.differentiable()[1]
        for i in range(len(z)):
            read = self.with_levels(self._solve(parameters[i:i + 1], derivative=True), z[i:i + 1])
            found[i, :self.width] = read[0]
            if np.isfinite(read).all():
                self._spend(0, 1)
                score = self._said(lambda: self._likelihood.score(read))
                row = score[:, :k] @ observation.rows
                pulled = self._attempt(lambda: problem.sensitivity(field(problem.M, parameters[i]), row))
                if pulled is not None:
                    by_levels = score[:, k:] @ self.level_rows
                    found[i, self.width:] = (self._back.each(pulled, fields[i:i + 1]) + by_levels)[0]
        return found

    def _differences(self, z: np.ndarray) -> np.ndarray:
        """Derivative of the readings by latents (k, r) at z (r,), by differences: 2 r solves."""
        if not self._told:
            tell("The forward problem, its sensors, noise or transform have no derivative: differences in the latents "
                 "take its place.", False)
            self._told = True
        return self.slopes(z, np.eye(self.r)).T
