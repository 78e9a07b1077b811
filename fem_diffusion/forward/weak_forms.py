r"""Weak forms of ``∂u/∂t + v·∇u - ∇·(κ∇u) + r(u) - f`` for continuous and for discontinuous states.

Continuous ones have the SUPG terms of `advection_diffusion`. Of discontinuous ones advection is that of ``v·∇u``, where
v need not be divergence-free: a jump counts where a cell's velocity points inwards. Diffusion is the symmetric interior
penalty method (Arnold, Brezzi, Cockburn & Marini 2002, doi:10.1137/S0036142901384162) with normals of the two sides
taken separately, which on a surface are no opposites (Dedner, Madhavan & Stinner 2013, doi:10.1093/imanum/drs033). The
penalty is that of the discrete trace inequality
(Shahbazi 2005, doi:10.1016/j.jcp.2004.11.017), ``C κ_n |∂K|/|K|`` with C = (p+1)(p+d)/d on simplices and (p+1)² on
tensor products, κ_n = n·κn, the larger of both sides. Degree 0 has the two-point flux instead, which is consistent
where lines between the centres of neighbours are normal to their facets, as on rectangles.
"""

import warnings
from typing import NamedTuple

import numpy as np
from firedrake import (CellVolume, FacetArea, FacetNormal, Function, FunctionSpace, JacobianInverse, Measure,
                       MeshGeometry, TestFunction, as_matrix, assemble, div, dot, grad, inner, sqrt)
from firedrake.functionspaceimpl import WithGeometry
from scipy.linalg import block_diag
from ufl import AbstractCell, Form, TensorProductCell, max_value
from ufl.algorithms import estimate_total_polynomial_degree, expand_derivatives
from ufl.core.expr import Expr

from fem_diffusion.fields.checks import exterior_measures

__all__ = ["Terms", "residual"]

Conditions = list[tuple[Expr, Measure]]


class Terms(NamedTuple):
    """UFL coefficients of the equation; those that may be missing are None."""

    velocity: Expr | None
    diffusivity: Expr
    source: Expr
    reaction: Expr          # r(u)
    slope: Expr | None      # r', where r is linear
    change: Expr | None     # ∂u/∂t


def residual(u: Function, terms: Terms, natural: Conditions, weak: Conditions | None, supg: bool | str,
             rate: Expr | float) -> tuple[Form, Form | None]:
    """The residual as the part that is affine in u, a one-form, and the rest, where the reaction is nonlinear.

    `natural` are pairs of ``n·κ∇u`` and where it is imposed; `weak` pairs of a Dirichlet value and where, for a
    discontinuous state, else None; `rate` is the transient part of 1/τ.
    """
    V, v, kappa, rest, N = u.function_space(), terms.velocity, terms.diffusivity, -terms.source, None
    w, dx = TestFunction(V), Measure("dx", V.mesh())
    if terms.slope is None:
        N = terms.reaction * w * dx
    else:
        rest += terms.reaction
    if terms.change is not None:
        rest += terms.change
    F = rest * w * dx
    if v is not None:
        F += dot(v, grad(u)) * w * dx
    F += dot(_flux(kappa, u), grad(w)) * dx
    if weak is not None:
        F += _across_facets(u, v, kappa, weak)
    elif v is not None and supg:
        # The exact solution has no strong residual at any point, so this quadrature need not resolve τ.
        over = dx(degree=2 * V.ufl_element().embedded_superdegree)
        tested = _supg_tau(V, v, kappa, terms.slope, rate) * dot(v, grad(w))
        F += tested * (dot(v, grad(u)) - div(_flux(kappa, u)) + rest) * over
        if N is not None:
            N += tested * terms.reaction * over
    for q, over in natural:
        F -= q * w * over
    return _fix_quadrature(F), N and _fix_quadrature(N)


def _flux(kappa: Expr, u: Expr) -> Expr:
    """κ∇u for a scalar or a tensor κ."""
    return dot(kappa, grad(u)) if kappa.ufl_shape else kappa * grad(u)


def _fix_quadrature(F: Form) -> Form:
    """Write the estimated quadrature degree into every integral.

    Derivatives of F would get estimates of their own otherwise, and an adjoint with another quadrature than
    its forward problem is wrong by 1e-3 where a coefficient is an exponential.
    """
    integrals = []
    for integral in F.integrals():
        data = integral.metadata()
        if "quadrature_degree" not in data:
            degree = estimate_total_polynomial_degree(expand_derivatives(integral.integrand()))
            integral = integral.reconstruct(metadata={**data, "quadrature_degree": degree})
        integrals.append(integral)
    return Form(integrals)


# --- SUPG

def _cell_metric(cell: AbstractCell) -> np.ndarray:
    """Metric in which the reference cell's simplices are regular: so numberings of vertices do not matter to τ."""
    if isinstance(cell, TensorProductCell):
        return block_diag(*(_cell_metric(c) for c in cell.sub_cells))
    one = np.eye(cell.topological_dimension)
    return (one + 1) / 2 if cell.cellname in ("triangle", "tetrahedron") else one


def _supg_tau(V: WithGeometry, v: Expr, kappa: Expr, slope: Expr | None, rate: Expr | float) -> Expr:
    """The SUPG time scale of the module docstring of `advection_diffusion`, a UFL scalar."""
    K, degree = JacobianInverse(V.mesh()), V.ufl_element().embedded_superdegree
    G = 4 * degree**2 * dot(K.T, dot(as_matrix(_cell_metric(V.mesh().ufl_cell()).tolist()), K))
    D = dot(kappa, G) if kappa.ufl_shape else kappa * G
    return 1 / sqrt(dot(v, dot(G, v)) + 9 * inner(D, D.T) + (slope or 0)**2 + rate**2)


# --- upwind and interior penalty terms

def _degree(V: WithGeometry) -> int:
    """Highest degree in one direction."""
    degree = V.ufl_element().degree()
    return max(degree) if isinstance(degree, tuple) else degree


def _trace_constant(V: WithGeometry) -> float:
    """The constant of the discrete trace inequality."""
    cell, p, d = V.mesh().ufl_cell(), _degree(V), V.mesh().topological_dimension
    if isinstance(cell, TensorProductCell) or cell.cellname in ("quadrilateral", "hexahedron"):
        return (p + 1)**2
    return (p + 1) * (p + d) / d


def _interior(mesh: MeshGeometry) -> Measure:
    """Interior facets; those of a periodic seam are among them."""
    return Measure("dS_h", mesh) + Measure("dS_v", mesh) if mesh.extruded else Measure("dS", mesh)


def _surface_over_volume(mesh: MeshGeometry) -> Function:
    """|∂K|/|K|."""
    Q = FunctionSpace(mesh, "DG", 0)
    w, ratio = TestFunction(Q), Function(Q)
    surface = (w("+") + w("-")) * _interior(mesh) + sum(w * ds for ds in exterior_measures(mesh).values())
    ratio.dat.data[:] = assemble(surface).dat.data_ro / assemble(w * Measure("dx", mesh)).dat.data_ro
    return ratio


def _across_facets(u: Function, v: Expr | None, kappa: Expr, boundary: Conditions) -> Form:
    """What advection and diffusion of a discontinuous state add on facets, also those of weak Dirichlet conditions."""
    V = u.function_space()
    mesh, w, n = V.mesh(), TestFunction(V), FacetNormal(V.mesh())
    k, jump_u, jump_w = dot(n, dot(kappa, n)) if kappa.ufl_shape else kappa, u("+") - u("-"), w("+") - w("-")
    if _degree(V) == 0:
        if mesh.ufl_cell().cellname in ("triangle", "tetrahedron"):
            warnings.warn("Diffusion of a discontinuous state of degree 0 does not converge on triangles and "
                          "tetrahedra: take degree 1, or rectangles.", stacklevel=7)
        size, scale = FacetArea(mesh) / CellVolume(mesh), 2
        sigma = 2 * max_value(k("+"), k("-")) / (1 / size("+") + 1 / size("-"))
    else:
        size, scale = _surface_over_volume(mesh), _trace_constant(V)
        sigma = scale * max_value(k("+"), k("-")) * max_value(size("+"), size("-"))

    def normal_flux(f: Expr) -> Expr:
        """Mean of the two sides' κ∇f, along the normal of the first."""
        q = dot(_flux(kappa, f), n)
        return (q("+") - q("-")) / 2

    inside = sigma * jump_u * jump_w - normal_flux(u) * jump_w - normal_flux(w) * jump_u
    penalty = scale * k * size
    if v is not None:
        inflow = (abs(dot(v, n)) - dot(v, n)) / 2   # of the cell whose normal it is
        inside += jump_u * (inflow("+") * w("+") - inflow("-") * w("-"))
        penalty += inflow
    q, p = dot(_flux(kappa, u), n), dot(_flux(kappa, w), n)
    return inside * _interior(mesh) + sum((penalty * (u - g) * w - q * w - p * (u - g)) * over for g, over in boundary)
