r"""Advection and diffusion of a discontinuous state: upwind and symmetric interior penalty terms.

Advection is that of ``v·∇u``, which need not be divergence-free: a jump counts where a cell's velocity points
inwards. Diffusion is the symmetric interior penalty method (Arnold, Brezzi, Cockburn & Marini 2002,
doi:10.1137/S0036142901384162) with normals of the two sides taken separately, which on a surface are no opposites
(Dedner, Madhavan & Stinner 2013, doi:10.1093/imanum/drs033). The penalty is that of the discrete trace inequality
(Shahbazi 2005, doi:10.1016/j.jcp.2004.11.017), ``C κ_n |∂K|/|K|`` with C = (p+1)(p+d)/d on simplices and (p+1)² on
tensor products, κ_n = n·κn, the larger of both sides. Degree 0 has the two-point flux instead, which is consistent
where lines between the centres of neighbours are normal to their facets, as on rectangles.
"""

import warnings

from firedrake import (CellVolume, FacetArea, FacetNormal, Function, FunctionSpace, Measure, TestFunction, assemble,
                       dot, grad, inner)
from ufl import TensorProductCell, max_value

from fem_diffusion.fields.checks import exterior_measures

__all__ = ["transport"]


def _normal(a, n):
    """Normal component of a vector or, for κ, n·κn."""
    if len(a.ufl_shape) == 2:
        return dot(n, dot(a, n))
    return dot(a, n) if a.ufl_shape else a


def _degree(V):
    """Highest degree in one direction."""
    degree = V.ufl_element().degree()
    return max(degree) if isinstance(degree, tuple) else degree


def _trace_constant(V):
    """The constant of the discrete trace inequality."""
    cell, p, d = V.mesh().ufl_cell(), _degree(V), V.mesh().topological_dimension
    if isinstance(cell, TensorProductCell) or cell.cellname in ("quadrilateral", "hexahedron"):
        return (p + 1)**2
    return (p + 1) * (p + d) / d


def _interior(mesh):
    """Interior facets; those of a periodic seam are among them."""
    return Measure("dS_h", mesh) + Measure("dS_v", mesh) if mesh.extruded else Measure("dS", mesh)


def _surface_over_volume(mesh):
    """|∂K|/|K| as a Function."""
    Q = FunctionSpace(mesh, "DG", 0)
    w, ratio = TestFunction(Q), Function(Q)
    surface = (w("+") + w("-")) * _interior(mesh) + sum(w * ds for ds in exterior_measures(mesh).values())
    ratio.dat.data[:] = assemble(surface).dat.data_ro / assemble(w * Measure("dx", mesh)).dat.data_ro
    return ratio


def transport(u, v, kappa, boundary):
    """``∫ (v·∇u - ∇·(κ∇u)) w`` of a discontinuous state, with weak Dirichlet conditions.

    Parameters
    ----------
    u : Function
        The state.
    v : ufl.core.expr.Expr or None
        Velocity, of shape (gdim,).
    kappa : ufl.core.expr.Expr
        Diffusivity, of shape () or (gdim, gdim).
    boundary : list of tuple
        Pairs (measure, value) of the Dirichlet conditions; elsewhere the boundary terms of diffusion are left to flux
        and Robin conditions.

    Returns
    -------
    ufl.Form
        Linear in its test function.
    """
    V = u.function_space()
    mesh, w = V.mesh(), TestFunction(V)
    n, dx = FacetNormal(mesh), Measure("dx", mesh)
    if _degree(V) == 0:
        size, scale = FacetArea(mesh) / CellVolume(mesh), 2
    else:
        size, scale = _surface_over_volume(mesh), _trace_constant(V)

    def flux(f):
        """κ∇f."""
        return dot(kappa, grad(f)) if kappa.ufl_shape else kappa * grad(f)

    if _degree(V) == 0 and mesh.ufl_cell().cellname in ("triangle", "tetrahedron"):
        warnings.warn("Diffusion of a discontinuous state of degree 0 does not converge on triangles and tetrahedra: "
                      "take degree 1, or rectangles.", stacklevel=6)
    F = inner(flux(u), grad(w)) * dx
    k, jump_u, jump_w = _normal(kappa, n), u("+") - u("-"), w("+") - w("-")
    if _degree(V) == 0:
        sigma = 2 * max_value(k("+"), k("-")) / (1 / size("+") + 1 / size("-"))
    else:
        sigma = scale * max_value(k("+"), k("-")) * max_value(size("+"), size("-"))

    def normal_flux(f):
        """Mean of the two sides' κ∇f, along the normal of the first."""
        q = dot(flux(f), n)
        return (q("+") - q("-")) / 2

    inside = sigma * jump_u * jump_w - normal_flux(u) * jump_w - normal_flux(w) * jump_u
    if v is not None:
        F += dot(v, grad(u)) * w * dx
        inflow = (abs(dot(v, n)) - dot(v, n)) / 2   # of the cell whose normal it is
        inside += jump_u * (inflow("+") * w("+") - inflow("-") * w("-"))
    F += inside * _interior(mesh)
    for over, g in boundary:
        q, p = dot(flux(u), n), dot(flux(w), n)
        there = scale * k * size * (u - g) * w - q * w - p * (u - g)
        if v is not None:
            there += inflow * (u - g) * w
        F += there * over
    return F
