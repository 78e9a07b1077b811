r"""Transient advection-diffusion-reaction with unknown coefficients, and fast ways to solve it many times.

Find u with  ``∂u/∂t + v·∇u - ∇·(κ∇u) + r(u) = f``  for ``0 < t <= T``, ``u = u_0`` at t = 0, and the boundary
conditions of `Boundary`.

The θ-scheme takes constant steps Δt.  With ``u_θ = θ uⁿ⁺¹ + (1-θ) uⁿ`` and F the steady residual (with its upwind or
SUPG terms), one step solves

    ``∫ (uⁿ⁺¹ - uⁿ)/Δt (w + τ v·∇w) + F(u_θ; t_n + θΔt; w) = 0``  for all w,

so ∂u/∂t is part of the residual that SUPG weights, and the exact solution satisfies the scheme up to its error in
time: second order for θ = 1/2 (Crank-Nicolson), first for θ = 1 (implicit Euler).  τ has the transient term of Shakib:
``τ⁻² = (2/Δt)² + v·Gv + 9 κG:(κG)ᵀ + σ²`` (see `advection_diffusion`).  Strong Dirichlet values are those at
the new time.

Of the parameter, the initial state and the boundary values only the values on V's nodes count: the initial state is
interpolated, and takes the Dirichlet values (at t = 0) at Dirichlet nodes.

Samples march together, as in `advection_diffusion`: while ∂F/∂u contains no unknown, a step of a block is one sparse
product and one solve with a block of right-hand sides, and one factorisation serves all steps (one each where the
operator depends on time).  A nonlinear reaction's block iterates with the Jacobian at a typical state; what that loses
goes to Newton's method.  Where the operator contains the unknown, each sample has one factorisation for all its steps.
"""

from firedrake.functionspaceimpl import WithGeometry
from pyadjoint import no_annotations
from ufl.core.expr import Expr

from fem_diffusion.checks import check_options
from fem_diffusion.forward.advection_diffusion import posed
from fem_diffusion.forward.march import March
from fem_diffusion.forward.physics import Boundary, Physics, TimeSteps
from fem_diffusion.forward.stepper import Stepper
from fem_diffusion.forward.unknowns import Name

__all__ = ["TransientAdvectionDiffusion"]


class TransientAdvectionDiffusion(March):
    """The map from unknown coefficients to the states of ``∂u/∂t + v·∇u - ∇·(κ∇u) + r(u) = f`` at chosen times.

    The state is one Function in ``U``, a vector-valued space whose component j is u at ``times[j]``:
    ``point_sensors(problem.U, points)`` reads a time series at every point.

    Parameters
    ----------
    V : FunctionSpace
        Space of the state at one time, scalar, continuous or discontinuous, as for `AdvectionDiffusion`.
    M : FunctionSpace
        Parameter space.  Of an unknown in space: on V's mesh, for ``("flux", marker)`` also on
        ``Submesh(mesh, dim - 1, marker)``.  Of an unknown in time alone: CG1 on ``IntervalMesh(n, T)``, T the last
        time or more.  Of an unknown in space and time: a VectorFunctionSpace in space whose components are the
        values at the ``parameter_times`` of `steps`.
    unknown : str, tuple or list
        ``"initial"``, ``"source"``, ``("source", shape)`` (a strength in time times the UFL scalar ``shape``),
        ``"diffusivity"``, ``"velocity"``, ``("flux", marker)`` or ``("dirichlet", marker)``.  Leave that coefficient
        out, or give it as a callable ``m -> UFL expression``, m being the parameter at one time.  Several unknowns: a
        list, with ``M = MixedFunctionSpace([...])`` in the same order.
    steps, initial : TimeSteps, and UFL scalar or float
        The second is u_0.
    physics, bcs
        As for `AdvectionDiffusion`; they may contain ``steps.t``.
    supg, solver_parameters, options_prefix
        As for `AdvectionDiffusion`, and so is what it raises, also where times do not fit.

    Attributes are those of `March`.
    """

    @no_annotations
    def __init__(self, V: WithGeometry, M: WithGeometry, unknown: Name | list[Name], steps: TimeSteps,
                 physics: Physics = Physics(), bcs: Boundary = Boundary(), *, initial: Expr | float = 0,
                 supg: bool | str = "auto", solver_parameters: str | dict = "direct",
                 options_prefix: str | None = None) -> None:
        steps = check_options(steps, TimeSteps, "steps")
        e, parameter, options = posed(V, M, unknown, physics, bcs, (solver_parameters, options_prefix), steps,
                                      initial=initial, supg=supg)
        self._pose(Stepper(e, M, options, options_prefix), parameter, steps)
