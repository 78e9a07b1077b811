"""An inverse problem: prior, forward model, observation and noise, checked once to fit each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from firedrake import Function
from firedrake.adjoint import stop_annotating
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from numpy.typing import ArrayLike
from scipy.sparse import issparse, spmatrix

from fem_diffusion.checks import alike, check_array, check_kind, check_seed, stream, together
from fem_diffusion.diffusion import Noise, as_noise
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import by_component, field, on_root, owned_size
from fem_diffusion.forward.blocks import JUMPS, BlockForward
from fem_diffusion.forward.callable import CallableForward, as_forward, check_state
from fem_diffusion.forward.protocol import Differentiable, Forward, dense_rows
from fem_diffusion.forward.taped import Taped
from fem_diffusion.levels import Beside, beside, with_levels
from fem_diffusion.marginal import Marginal
from fem_diffusion.observation.family import SensorFamily
from fem_diffusion.observation.linear import Observation
from fem_diffusion.prior.protocol import Prior, check_prior

__all__ = ["InverseProblem", "check_problem"]

# Pairs of draws at which a recorded derivative is compared with differences, while the solver fails.
_TRIALS = 3
# Beyond so many standard deviations of its normal number a level is at its bound.
_FAR = 12.0


@dataclass(frozen=True, eq=False, repr=False, init=False)
class InverseProblem:
    """What is unknown, what is solved, and what is measured: `simulate`, `fit` and the references take it.

    Parameters
    ----------
    prior : Prior
        Of the parameter.
    forward : Forward or Callable
        Maps a parameter to a state; a plain function of a Function in ``prior.V`` will do, or a ReducedFunctional.
    observation : Observation, SensorFamily or Callable
        The sensors, or all that a measurement may have; or a nonlinear instrument, a function that maps a state to k
        numbers, the same on all ranks.
    noise : Noise, float, array_like of shape (k,) or None
        Of the measurements: GaussianNoise, StudentNoise, CallableNoise, or `join_noise` of several instruments; numbers
        are standard deviations. One that is unknown, ``GaussianNoise(std=scipy.stats.loguniform(0.005, 0.05))``, is one
        more number of the parameter, the last one, in a space named "noise level": `prior` and `M` have it. None for a
        family, whose kinds have their own, and where readings hold noise already.

    InputError is raised if one is none of these, spaces do not follow each other, or the noise is for other sensors.
    """

    prior: Prior
    forward: Forward
    observation: Observation | SensorFamily | Callable[[Function], ArrayLike]
    noise: Noise | None

    def __init__(self, prior: Prior, forward: Forward | Callable[[Function], Function],
                 observation: Observation | SensorFamily | Callable[[Function], ArrayLike],
                 noise: Noise | ArrayLike | None = None) -> None:
        object.__setattr__(self, "prior", check_prior(prior))
        object.__setattr__(self, "observation", observation)
        if not callable(observation) and not self.family:
            raise InputError(f"observation is of type {type(observation).__name__}: give an Observation such as "
                             "point_sensors(U, points), a SensorFamily, or a function of the state.")
        forward, seen = as_forward(forward, self.M), getattr(observation, "U", None)
        if isinstance(forward, CallableForward) and forward.U is None:
            forward = CallableForward(forward.function, self.M, seen)
        for name, ours, theirs in (("prior", self.M, forward.M), ("forward problem", forward.U, seen)):
            if None not in (ours, theirs) and ours != theirs:
                raise InputError(f"The {name} gives Functions in {ours}, but {theirs} is expected next: build prior, "
                                 "forward problem and observation on the same spaces.")
        if self.family and noise is not None:
            raise InputError("The kinds of a family have their own noise: leave noise out.")
        noise, given = as_noise(noise, self.k), forward.levels if isinstance(forward, Beside) else ()
        if noise is not None and noise.levels and list(map(id, noise.levels)) != list(map(id, given)):
            inner, own = (forward.inner, forward.prior) if isinstance(forward, Beside) else (forward, self.prior)
            extended, forward = with_levels(own, inner, noise.levels)
            object.__setattr__(self, "prior", extended)
        object.__setattr__(self, "forward", forward)
        object.__setattr__(self, "noise", noise)

    @property
    def V(self) -> WithGeometry:
        """Space of the field before any transform: that of latents."""
        return self.prior.core.V

    @property
    def M(self) -> WithGeometry:
        """Space of the parameter."""
        return self.prior.V

    @property
    def U(self) -> WithGeometry | None:
        """Space of the state; None where neither a solver nor an instrument of the user's own tells."""
        return self.forward.U or getattr(self.observation, "U", None)

    @property
    def comm(self) -> MPI.Comm:
        """MPI communicator of the mesh."""
        return self.M.comm

    @property
    def family(self) -> bool:
        """Whether measurements differ in their sensors."""
        return isinstance(self.observation, SensorFamily)

    @property
    def k(self) -> int | None:
        """Number of readings; None of a family, and where an instrument of the user's own does not tell."""
        return len(self.observation) if isinstance(self.observation, Observation) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sensors, where they have any."""
        return self.observation.names if isinstance(self.observation, Observation) else ()

    @property
    def levels(self) -> tuple[Marginal, ...]:
        """Laws of the unknown standard deviations of the noise, the last numbers of the parameter."""
        return () if self.noise is None else self.noise.levels

    def normal_levels(self, fields: np.ndarray) -> np.ndarray:
        """Standard normal numbers (B, l), global, of the levels in fields (B, n_owned of V) before any transform."""
        return self._last(self.V, fields)

    def _last(self, V: WithGeometry, values: np.ndarray) -> np.ndarray:
        """The last numbers (B, l), one for each level, global, of coefficients (B, n_owned)."""
        count = len(self.levels)
        parts = by_component(V, values)[-count:] if count else []
        return np.hstack([np.empty((len(values), 0)), *(np.hstack(self.comm.allgather(part)) for part in parts)])

    def readings(self, parameters: np.ndarray) -> np.ndarray:
        """What the sensors read without noise, shape (B, k), global, of parameters (B, n_owned of M) (collective)."""
        if isinstance(self.observation, SensorFamily):
            raise InputError("A family has no readings: choose sensors, and make an InverseProblem of those.")
        if isinstance(self.observation, Observation):
            known = vars(self).get("_derivative")
            # One solve serves the readings of a parameter and their derivative.
            solver = known if isinstance(known, Taped) and len(parameters) == 1 else self.forward
            return self.observation.apply(self.states(parameters, solver))
        with stop_annotating():
            rows = [self.read(row, self.forward) for row in parameters]
        return together(self.comm, lambda: check_array(rows, "The readings", (len(rows), "k")))

    def states(self, parameters: np.ndarray, solver: Forward, **options: object) -> np.ndarray:
        """Owned coefficients (B, n_owned of U) of what a solver gives for parameters (B, n_owned of M) (collective).

        `options` are those of its ``solve_many``.
        What it raises on one rank is raised on all; InputError where its states are not those that the sensors see. A
        solver that does not tell their space is called once more for that, the first time.
        """
        found = together(self.comm, lambda: np.array(solver.solve_many(parameters.copy(), **options), dtype=float),
                         watched=True)
        U, seen = solver.U, getattr(self.observation, "U", None)
        width = found.shape[1:] if seen is None else (owned_size(seen),)
        fits = found.shape == (len(parameters), *width) and (None in (U, seen) or U == seen)
        if not self.comm.allreduce(fits, MPI.LAND):
            raise InputError(f"The forward problem gave states of shape {found.shape}"
                             + (f" in {U}" if U is not None else "")
                             + f", and the sensors see states in {seen}, here of shape {(len(parameters), *width)}: "
                             "build both on the same space.")
        if U is None and seen is not None and len(found) and "_looked" not in vars(self):
            # Numbers alone do not tell a space from another one of the same size.
            together(self.comm, lambda: check_state(solver(field(self.M, parameters[0])), seen), watched=True)
            object.__setattr__(self, "_looked", True)
        return found

    def read(self, parameter: np.ndarray, solver: Forward) -> np.ndarray:
        """What an instrument of the user's own reads (k,) for a parameter (n_owned of M) (collective).

        What solver or instrument raise on one rank is raised on all.
        """
        instrument: Any = self.observation
        state = together(self.comm, lambda: solver(field(self.M, parameter)), watched=True)
        return together(self.comm, lambda: np.array(instrument(state), ndmin=1), watched=True)

    def beside_levels(self, clean: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Readings without noise (B, k) of parameters (B, n_owned of M) as the noise takes them, (B, k + l)."""
        known = self._last(self.M, parameters)
        normal = [level.to_normal(x).clip(-_FAR, _FAR) for level, x in zip(self.levels, known.T)]
        return np.column_stack([clean, *normal])

    def measurements(self, parameters: np.ndarray, *, seed: int) -> np.ndarray:
        """Readings with noise, shape (B, k), as for `readings`; without, where the problem has no noise of its own."""
        seed, = alike(self.comm, lambda: {"seed": check_seed(seed)})
        clean, noise = torch.from_numpy(self.beside_levels(self.readings(parameters), parameters)), self.noise
        generator = torch.Generator().manual_seed(stream(seed, "noise"))
        return on_root(self.comm, lambda: clean if noise is None else noise.sample(clean, generator)).numpy()

    def sensitivity(self, m: Function, rows: spmatrix | np.ndarray | None = None,
                    state: Function | None = None) -> np.ndarray:
        """Derivative by the parameter at `m`, owned dual coefficients (k, n_owned of M) (collective).

        Of the readings, or of what other `rows` over the owned coefficients of the state see, (k, n_owned of U). The
        `state` at m, where it is known, saves a solver of ours a solve. Raises InputError where sensors or forward
        problem have no derivative, or give no such array.
        """
        forward, observation = self.differentiable()
        known = {"state": state} if isinstance(forward, BlockForward) else {}
        seen = observation.rows if rows is None else dense_rows(rows, observation.U)
        shape = seen.shape[0], owned_size(self.M)

        def run() -> np.ndarray:
            # Copies, because a solver of the user's own may write into what it gets, and return the same array again.
            found: Any = forward.sensitivity(m.copy(deepcopy=True), seen.copy(), **known)
            dense = found.toarray() if issparse(found) else np.array(found)
            return check_array(dense, "The sensitivity of the forward problem", shape)
        with stop_annotating():
            return together(self.comm, run, watched=True)

    def differentiable(self) -> tuple[Differentiable, Observation]:
        """Forward problem and sensors, with a derivative; InputError where there is none (collective).

        A solver that knows none of its own is recorded by ``firedrake.adjoint``, and compared with differences of
        itself, when it is first asked for: some ten solves, once for a problem.
        """
        if not isinstance(self.observation, Observation):
            raise InputError(f"The observation is of type {type(self.observation).__name__}: a derivative takes an "
                             "Observation, such as point_sensors(U, points).")
        if isinstance(self._derivative, str):
            raise InputError(self._derivative)
        return self._derivative, self.observation

    @property
    def derived(self) -> bool:
        """Whether the forward problem has a derivative of its own, without a tape."""
        forward = self.forward.inner if isinstance(self.forward, Beside) else self.forward
        return isinstance(self.forward, Differentiable) and not (isinstance(forward, BlockForward) and forward.jumps)

    @cached_property
    def _derivative(self) -> Differentiable | str:
        """The forward problem with its derivative, or why there is none, as far as its sensors see it."""
        if isinstance(self.forward, Beside):
            own = InverseProblem(self.forward.prior, self.forward.inner, self.observation)._derivative
            return own if isinstance(own, str) else beside(own, self.forward)   # pyright: ignore[reportReturnType]
        forward, rows, error = self.forward, getattr(self.observation, "rows", None), None
        if isinstance(forward, BlockForward) and forward.jumps:
            return JUMPS
        if isinstance(forward, Differentiable) and not isinstance(forward, Taped):
            return forward
        taped = forward if isinstance(forward, Taped) else Taped(
            getattr(forward, "function", forward), self.M, forward.U)
        for seed in range(_TRIALS):
            # Between two draws: what holds of all parameters, such as a sign, mostly holds there as well.
            one, other = self.prior.transform_many(self.prior.core.sample_many(2, seed))
            try:
                with stop_annotating():
                    taped.check(field(self.M, (one + other) / 2), field(self.M, other - one), rows)
                return taped
            except InputError as found:
                error = found
                break
            except Exception as found:   # whatever a solver of the user's own raises where it finds no state
                error = found
        return f"The forward problem, of type {type(forward).__name__}, has no derivative. {error}"

    def __repr__(self) -> str:
        sensors = "any sensors of a family" if self.family else "a function" if self.k is None else f"{self.k} sensors"
        forward = self.forward.inner if isinstance(self.forward, Beside) else self.forward
        noise = "no noise of its own" if self.noise is None else type(self.noise).__name__
        return (f"InverseProblem: {type(self.prior).__name__} of {self.M.dim()} unknowns, "
                f"{type(forward).__name__}, {sensors}, {noise}{' of unknown level' * bool(self.levels)}")

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("An InverseProblem holds a mesh and cannot be copied or pickled: build it again.")


def check_problem(problem: InverseProblem) -> InverseProblem:
    """An InverseProblem; InputError where it is something else."""
    return check_kind(problem, "problem", InverseProblem, "an InverseProblem(prior, forward, observation, noise)")
