"""What `AdvectionDiffusion` is made of: checks of its arguments and the pieces of its residual."""

from collections.abc import Callable
from numbers import Number

import numpy as np
from firedrake import (Constant, DirichletBC, Function, JacobianInverse, Measure, SpatialCoordinate,
                       TestFunction, TrialFunction, as_matrix, as_vector, assemble, derivative, div, dot,
                       grad, inner, interpolate, sqrt)
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import DEFAULT_DIRECT_SOLVER
from scipy.linalg import block_diag
from ufl import H1, Form, TensorProductCell, as_ufl, diff, variable
from ufl.algorithms import estimate_total_polynomial_degree, expand_derivatives, extract_coefficients
from ufl.core.expr import Expr

from fem_diffusion.errors import InputError

# Up to so many unknowns, by dimension, PETSc's own LU has less overhead than MUMPS; supernodes win above.
PETSC_LU_LIMIT = {1: 50_000, 2: 5_000, 3: 1_000}
UNKNOWNS = "'source', 'diffusivity', 'velocity', ('flux', marker) or ('dirichlet', marker)"


def parse_unknown(unknown):
    """Split the name of the unknown into its kind and marker (None where it has none)."""
    if unknown in ("source", "diffusivity", "velocity"):
        return unknown, None
    if isinstance(unknown, tuple) and len(unknown) == 2 and unknown[0] in ("flux", "dirichlet"):
        return unknown
    raise InputError(f"unknown must be one of {UNKNOWNS}, got {unknown!r}.")


def check_spaces(V, M, unknown):
    """Refuse spaces that do not fit the unknown or each other."""
    kind, _ = parse_unknown(unknown)
    for name, space in (("V", V), ("M", M)):
        if not isinstance(space, WithGeometry):
            raise InputError(f"{name} must be a FunctionSpace, got {type(space).__name__}.")
    if V.value_shape != () or V.ufl_element() not in H1:
        raise InputError(f"V must be scalar and continuous, such as FunctionSpace(mesh, 'CG', 1); got {V}.")
    shape = (V.mesh().geometric_dimension,) if kind == "velocity" else ()
    if M.value_shape != shape:
        space = "VectorFunctionSpace" if shape else "FunctionSpace"
        raise InputError(f"a {kind} unknown has value shape {shape}, but M has {M.value_shape}; "
                         f"take M = {space}(mesh, 'CG', 1), say.")
    here, there = V.mesh().topology, M.mesh().topology
    if there is not here and (kind != "flux" or getattr(there, "submesh_parent", None) is not here):
        raise InputError("M must live on V's mesh; only a ('flux', marker) unknown may live on "
                         "Submesh(mesh, mesh.topological_dimension - 1, marker) of that same mesh.")


def apply_unknown(name, given, default, m, kind=None):
    """A coefficient as it was given, or for the unknown: m, or what a callable makes of it."""
    if kind is not None and kind != name:
        return given
    if given is default or (isinstance(given, Number) and given == default):
        return m
    if callable(given) and not isinstance(given, Expr):
        return given(m)
    raise InputError(f"{name} is the unknown, so its value is the parameter: leave it out, "
                     "or give a callable m -> UFL expression.")


def mesh_markers(mesh):
    """Markers of the exterior facets, the same on every rank."""
    markers = tuple(int(i) for i in mesh.exterior_facets.unique_markers)
    return markers + ("bottom", "top") if mesh.extruded else markers


def check_markers(mesh, conditions):
    """Refuse markers that the mesh lacks, and markers named twice, in {condition: iterable of markers}."""
    known = mesh_markers(mesh)
    listing = "the markers of this mesh are " + (", ".join(map(repr, known)) or "none (use 'on_boundary')")
    owner = {}
    for name, keys in conditions.items():
        for key in keys:
            atoms = key if isinstance(key, tuple) else (key,)
            if key == "on_boundary":
                atoms = known or atoms
            for atom in atoms:
                if atom not in known and atom != "on_boundary":
                    raise InputError(f"{name} names marker {atom!r}, but {listing}.")
                if atom in owner:
                    raise InputError(f"marker {atom!r} is named by both {owner[atom]} and {name}; "
                                     f"give each marker one condition ({listing}).")
                owner[atom] = name


def coefficient(value, shape, name, positive=False):
    """A UFL expression of the given shape from a number, a sequence of numbers or an expression."""
    if isinstance(value, Number):
        if positive and not value > 0:
            raise InputError(f"{name} must be positive, got {value}.")
        value = Constant(value)
    elif not isinstance(value, Expr):
        try:
            value = as_vector([coefficient(c, (), name) for c in value]) if shape else as_ufl(value)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be a number or a UFL expression of shape {shape}, "
                             f"got {type(value).__name__}.") from None
    if value.ufl_shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {value.ufl_shape}.")
    return value


def robin_pair(pair, marker):
    """The transfer coefficient h and the outer value u_ext of a Robin condition, as UFL scalars."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"robin[{marker!r}] must be a pair (h, u_ext) for n·κ∇u = h (u_ext - u).")
    return tuple(coefficient(c, (), f"robin[{marker!r}]") for c in pair)


def facet_measure(mesh, marker, submesh=None):
    """Boundary measure over a marker, intersected with a codimension-one submesh where there is one."""
    if marker in ("top", "bottom"):
        return Measure("ds_t" if marker == "top" else "ds_b", mesh)
    extra = {} if marker == "on_boundary" else {"subdomain_id": marker}
    if submesh is not None:
        extra["intersect_measures"] = (Measure("dx", submesh),)
    measure = Measure("ds_v" if mesh.extruded else "ds", mesh, **extra)
    if mesh.extruded and marker == "on_boundary":
        measure += Measure("ds_t", mesh) + Measure("ds_b", mesh)
    return measure


def check_submesh(mesh, marker, submesh):
    """Refuse a submesh that is not the named part of the boundary: the measure would not notice."""
    ds, dx = facet_measure(mesh, marker), Measure("dx", submesh)
    x, s = SpatialCoordinate(mesh), SpatialCoordinate(submesh)
    size = assemble(Constant(1) * ds), assemble(Constant(1) * dx)
    place = [assemble(sum(c / (2.0 + i) for i, c in enumerate(p)) * over) for p, over in ((x, ds), (s, dx))]
    if not np.allclose((size[0], place[0]), (size[1], place[1]), rtol=1e-8, atol=1e-8 * size[0]):
        raise InputError(f"M's submesh is not the boundary with marker {marker!r}; build it as "
                         f"Submesh(mesh, mesh.topological_dimension - 1, {marker!r}).")


def reaction_terms(reaction, u):
    """The reaction r(u) and, where r is linear, its derivative (else None): two UFL scalars."""
    if reaction is None:
        return as_ufl(0), as_ufl(0)
    if not isinstance(reaction, Callable) or isinstance(reaction, Expr):
        raise InputError("reaction must be a callable u -> UFL expression, e.g. reaction=lambda u: 0.3*u**2.")
    r = coefficient(reaction(u), (), "reaction(u)")
    w = variable(u)
    slope = expand_derivatives(diff(as_ufl(reaction(w)), w))
    return r, (None if u in extract_coefficients(slope) else slope)


def _cell_metric(cell):
    """Metric in which the simplices of the reference cell are regular.

    So τ does not depend on how vertices are numbered, which another partition of the mesh changes.
    """
    if isinstance(cell, TensorProductCell):
        return block_diag(*(_cell_metric(c) for c in cell.sub_cells))
    one = np.eye(cell.topological_dimension)
    return (one + 1) / 2 if cell.cellname in ("triangle", "tetrahedron") else one


def supg_tau(V, v, kappa, slope):
    """The SUPG time scale of the module docstring of `advection_diffusion`, a UFL scalar."""
    K = JacobianInverse(V.mesh())
    degree = V.ufl_element().embedded_superdegree
    G = 4 * degree**2 * dot(K.T, dot(as_matrix(_cell_metric(V.mesh().ufl_cell()).tolist()), K))
    return 1 / sqrt(dot(v, dot(G, v)) + 9 * kappa**2 * inner(G, G) + (slope or 0)**2)


def equation(u, m, unknown, *, velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow,
             supg):
    """Put the parameter in its place, check everything, and write the residual F = A + N.

    Parameters
    ----------
    u, m : Function
        State and parameter.
    unknown, velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow, supg
        As for `AdvectionDiffusion`.

    Returns
    -------
    A : ufl.Form
        The part of F that is affine in u; a linear form in its test function.
    N : ufl.Form or None
        The rest, where the reaction is nonlinear.
    values : dict
        Dirichlet values by marker, UFL scalars.
    marker
        The marker of an unknown Dirichlet value, else None.
    """
    mesh, there = u.function_space().mesh(), m.function_space().mesh()
    kind, marker = parse_unknown(unknown)
    dirichlet, flux, robin = dict(dirichlet or {}), dict(flux or {}), dict(robin or {})
    if kind in ("flux", "dirichlet"):
        table = flux if kind == "flux" else dirichlet
        # Last in its table, so that it wins at corners shared with other Dirichlet conditions.
        table[marker] = apply_unknown(f"{kind}[{marker!r}]", table.pop(marker, None), None, m)
    source = apply_unknown("source", source, 0, m, kind)
    diffusivity = apply_unknown("diffusivity", diffusivity, 1, m, kind)
    velocity = apply_unknown("velocity", velocity, None, m, kind)
    outflow = (outflow,) if isinstance(outflow, (int, str)) else tuple(outflow)
    check_markers(mesh, {"dirichlet": dirichlet, "flux": flux, "robin": robin, "outflow": outflow})
    if there.topology is not mesh.topology:
        check_submesh(mesh, marker, there)

    v = None if velocity is None else coefficient(velocity, (mesh.geometric_dimension,), "velocity")
    r, slope = reaction_terms(reaction, u)
    if not dirichlet and not robin and u not in extract_coefficients(r):
        raise InputError("without a Dirichlet or Robin condition or a reaction that depends on u, the state "
                         "is determined only up to a constant; add one of them.")
    if supg not in ("auto", True, False) or (supg is True and v is None):
        raise InputError(f"supg must be 'auto', False or, where there is a velocity, True; got {supg!r}.")
    terms = dict(velocity=v, kappa=coefficient(diffusivity, (), "diffusivity", positive=True), reaction=r,
                 slope=slope, source=coefficient(source, (), "source"), flux=flux, robin=robin, supg=supg)
    A, N = residual(u, terms, (marker, there) if there.topology is not mesh.topology else (None, None))
    if kind != "dirichlet" and m not in A.coefficients():
        raise InputError(f"the callable given for {unknown!r} makes no use of the parameter.")
    values = {key: coefficient(g, (), f"dirichlet[{key!r}]") for key, g in dirichlet.items()}
    return A, N, values, marker if kind == "dirichlet" else None


def residual(u, terms, on_submesh):
    """The residual as the two forms of `equation`, from UFL coefficients.

    Parameters
    ----------
    u : Function
        The state.
    terms : dict
        ``velocity`` (or None), ``kappa``, ``reaction``, ``slope`` (or None), ``source``; ``flux`` and
        ``robin`` by marker; ``supg``.
    on_submesh : tuple
        ``(marker, submesh)`` of a flux that lives on a submesh, or ``(None, None)``.
    """
    V = u.function_space()
    mesh, w, v, kappa = V.mesh(), TestFunction(V), terms["velocity"], terms["kappa"]
    rest, N, dx = -terms["source"], None, Measure("dx", mesh)
    if terms["slope"] is None:
        N = terms["reaction"] * w * dx
    else:
        rest += terms["reaction"]
    F = kappa * dot(grad(u), grad(w)) * dx + rest * w * dx
    if v is not None:
        F += dot(v, grad(u)) * w * dx
    if v is not None and terms["supg"]:
        # The exact solution has no strong residual at any point, so this quadrature need not resolve τ.
        over = dx(degree=2 * V.ufl_element().embedded_superdegree)
        tested = supg_tau(V, v, kappa, terms["slope"]) * dot(v, grad(w))
        F += tested * (dot(v, grad(u)) - div(kappa * grad(u)) + rest) * over
        if N is not None:
            N += tested * terms["reaction"] * over
    for key, q in terms["flux"].items():
        over = facet_measure(mesh, key, on_submesh[1] if key == on_submesh[0] else None)
        F -= coefficient(q, (), f"flux[{key!r}]") * w * over
    for key, pair in terms["robin"].items():
        h, u_ext = robin_pair(pair, key)
        F -= h * (u_ext - u) * w * facet_measure(mesh, key)
    return fix_quadrature(F), N and fix_quadrature(N)


def integrals_with(m, F):
    """The integrals of a form that contain a coefficient, as a form."""
    return Form([integral for integral in F.integrals() if m in extract_coefficients(integral.integrand())])


def fix_quadrature(F):
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


def linear_options(given, V, advective):
    """PETSc options from the words "direct" and "iterative" or from a dict."""
    if isinstance(given, dict):
        return dict(given)
    if given == "direct":
        own = V.mesh().comm.size == 1 and V.dim() <= PETSC_LU_LIMIT[V.mesh().topological_dimension]
        return {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu",
                "pc_factor_mat_solver_type": "petsc" if own else DEFAULT_DIRECT_SOLVER}
    if given == "iterative":
        # Multigrid needs diffusion to smooth; with advection overlapping ILU is the robust choice.
        asm = {"pc_type": "asm", "sub_pc_type": "ilu", "sub_pc_factor_levels": 1}
        pc = asm if advective else {"pc_type": "gamg"}
        return {"mat_type": "aij", "ksp_type": "gmres", "ksp_gmres_restart": 100, "ksp_rtol": 1e-11,
                "ksp_max_it": 1000, **pc}
    raise InputError("solver_parameters must be 'direct', 'iterative' or a dict of PETSc options, "
                     f"got {given!r}.")


class Lift:
    """Boundary values of a problem with unknown Dirichlet data, as a Function that is zero at free nodes.

    The tape of firedrake.adjoint keeps the values of a DirichletBC fixed when it replays a variational
    solver, so the unknown enters the residual through this lift and the solver sees homogeneous ones.

    Parameters
    ----------
    V : FunctionSpace
        State space.
    values : dict
        Dirichlet values by marker, all of them.
    marker
        The marker whose value is the parameter.
    m : Function
        The parameter.
    """

    def __init__(self, V, values, marker, m):
        self.g = Function(V, name="boundary values")
        known, mask = Function(V), Function(V)
        for key, g in values.items():
            if key != marker:
                DirichletBC(V, g, key).apply(known)
        DirichletBC(V, 0, marker).apply(known)
        DirichletBC(V, 1, marker).apply(mask)
        self._V, self._m, self._masked, self._known = V, m, mask * values[marker], known

    def update(self):
        """Interpolate the current parameter (recorded if a tape is running)."""
        self.g.interpolate(self._masked + self._known)

    def derivative(self):
        """∂g/∂m, a UFL two-form (rows over V, columns over M)."""
        direction = TrialFunction(self._m.function_space())
        return interpolate(expand_derivatives(derivative(self._masked, self._m, direction)), self._V)
