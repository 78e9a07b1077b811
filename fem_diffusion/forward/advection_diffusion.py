r"""Steady advection-diffusion-reaction with unknown coefficients, and fast ways to solve it many times.

Find u with  ``v·∇u - ∇·(κ∇u) + r(u) = f``  in the mesh and, on its boundary, ``u = g`` (Dirichlet), ``n·κ∇u = q``
(flux), ``n·κ∇u = h (u_ext - u)`` (Robin) or ``n·κ∇u = 0`` (outflow, and wherever nothing is named).

One of f, κ, v, g, q is the parameter m, or several of them are.  For inversion the map m -> u is needed thousands
of times, so the ways through it are graded by what the unknown touches:

- J = ∂F/∂u depends neither on u nor on m: one factorisation for ever, u = -J⁻¹ F(0; m) in blocks, and where F is
  affine in m and m has few coefficients, a dense product with the responses to each of them;
- J depends on u but not on m: the whole block iterates with J at a reference state (chord Newton);
- J depends on m: the block iterates with J in the midst of its parameters, scaled to each member (`differing`).

SUPG adds  Σ_K ∫_K τ (v·∇w) (v·∇u - ∇·(κ∇u) + r(u) - f)  with the metric form of τ (Shakib, Hughes & Johan 1991,
doi:10.1016/0045-7825(91)90041-4), which follows stretched cells: ``τ⁻² = v·Gv + 9 κG:(κG)ᵀ + σ²``,
``G = 4 p² KᵀSK``, p the degree, K the inverse cell Jacobian, S the metric in which the reference cell is regular,
σ = r' where that does not depend on u.

A discontinuous V has upwind advection and interior penalty diffusion instead: see `weak_forms`.
"""

from collections.abc import Mapping

from firedrake import Function
from firedrake.functionspaceimpl import WithGeometry
from pyadjoint import no_annotations

from fem_diffusion.checks import check_options
from fem_diffusion.fields.checks import check_coefficients, check_solver
from fem_diffusion.fields.coefficients import require_real
from fem_diffusion.forward.equation import Equation, equation
from fem_diffusion.forward.one_step import OneStep
from fem_diffusion.forward.physics import Boundary, Physics, TimeSteps
from fem_diffusion.forward.solvers import linear_options
from fem_diffusion.forward.steady import Steady
from fem_diffusion.forward.unknowns import Name, check_spaces, read

__all__ = ["AdvectionDiffusion", "posed"]


def posed(V: WithGeometry, M: WithGeometry, unknown: Name | list[Name], physics: Physics, bcs: Boundary,
          solver: tuple[str | Mapping, str | None], steps: TimeSteps | None = None, **given: object
          ) -> tuple[Equation, Function, dict]:
    """The equation, its parameter and the options of PETSc, from what users give, checked."""
    require_real()
    check_spaces(V, M)
    given = check_coefficients(V.mesh(), **vars(check_options(physics, Physics, "physics")),
                               **vars(check_options(bcs, Boundary, "bcs")), **given)
    parameters, m = check_solver(*solver, V.comm), Function(M, name="parameter")
    unknowns = read(unknown, V, M, m, given, steps)
    advective = physics.velocity is not None or any(x.kind == "velocity" for x in unknowns)
    return equation(V, unknowns, given, steps), m, linear_options(parameters, V, advective)


class AdvectionDiffusion(Steady):
    """The map from unknown coefficients to the state of ``v·∇u - ∇·(κ∇u) + r(u) = f``.

    Parameters
    ----------
    V : FunctionSpace
        State space, scalar, any degree, any mesh: continuous (CG, Q; Dirichlet values strongly, SUPG) or
        discontinuous (DG, DQ; Dirichlet values weakly, upwind, interior penalty; degree 0 on rectangles only,
        because its diffusion is wrong elsewhere).
    M : FunctionSpace
        Parameter space, on V's mesh; for ``("flux", marker)`` also on ``Submesh(mesh, dim - 1, marker)``.
    unknown : str, tuple or list
        The coefficient that is the parameter: ``"source"``, ``"diffusivity"``, ``"velocity"``, ``("flux", marker)`` or
        ``("dirichlet", marker)``.  Leave that coefficient out, or give it as a callable ``m -> UFL expression``, e.g.
        ``Physics(diffusivity=ufl.exp)``; with a callable, M may have any value shape.  Several unknowns: a list of
        these, with ``M = MixedFunctionSpace([...])`` in the same order.
    physics, bcs : Physics, Boundary
        Taken as fixed after construction, because factorisations are kept.
    supg : "auto" or bool
        Streamline-upwind Petrov-Galerkin terms; "auto" has them where V is continuous and there is a velocity.
    solver_parameters, options_prefix
        As for `Steady`, and so are the attributes.

    Raises
    ------
    InputError, InstallError
        Wrong spaces, shapes, unknown, markers or options, or conditions that leave u undetermined; a complex PETSc.
    """

    @no_annotations
    def __init__(self, V: WithGeometry, M: WithGeometry, unknown: Name | list[Name], physics: Physics = Physics(),
                 bcs: Boundary = Boundary(), *, supg: bool | str = "auto", solver_parameters: str | dict = "direct",
                 options_prefix: str | None = None) -> None:
        e, parameter, options = posed(V, M, unknown, physics, bcs, (solver_parameters, options_prefix), supg=supg)
        self._pose(OneStep(e, M, options, options_prefix, parameter))
