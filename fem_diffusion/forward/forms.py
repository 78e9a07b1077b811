"""What the problem classes are made of: checks of their arguments and the pieces of their residuals."""

import numpy as np
from firedrake import (Constant, JacobianInverse, Measure, SpatialCoordinate, TestFunction, as_matrix, as_vector,
                       assemble, div, dot, grad, inner, sqrt)
from firedrake.petsc import DEFAULT_DIRECT_SOLVER
from scipy.linalg import block_diag
from ufl import Form, TensorProductCell, as_tensor, as_ufl, diff, variable
from ufl.algorithms import estimate_total_polynomial_degree, expand_derivatives, extract_coefficients
from ufl.core.expr import Expr

from fem_diffusion.errors import InputError
from fem_diffusion.forward import dg
from fem_diffusion.fields.checks import exterior_measures
from fem_diffusion.forward.unknowns import apply_unknown, is_discontinuous

# Up to so many unknowns, by dimension, PETSc's own LU has less overhead than MUMPS; supernodes win above.
PETSC_LU_LIMIT = {1: 50_000, 2: 5_000, 3: 1_000}


def mesh_markers(mesh):
    """Markers of the exterior facets, the same on every rank."""
    return (*(int(i) for i in mesh.exterior_facets.unique_markers), *list(exterior_measures(mesh))[1:])


def check_markers(mesh, conditions):
    """Refuse markers that the mesh lacks, and markers named twice, in {condition: iterable of markers}."""
    known = mesh_markers(mesh)
    listing = "the markers of this mesh are " + (", ".join(map(repr, known)) or "none (use 'on_boundary')")
    if mesh.extruded and "top" not in known:
        listing += "; its extrusion is periodic, without top and bottom"
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


def coefficient(value, name):
    """A UFL expression from what `check_coefficients` lets through, unless it is a callable for something known."""
    if isinstance(value, Expr):
        return value
    if callable(value):
        raise InputError(f"{name} is a callable, which only an unknown may be: give a number or a UFL expression.")
    return as_vector([coefficient(c, name) for c in value]) if isinstance(value, tuple) else Constant(value)


def diffusivity_tensor(value):
    """The diffusivity as a UFL scalar or a UFL tensor of shape (gdim, gdim)."""
    if not isinstance(value, (list, np.ndarray)):
        return coefficient(value, "diffusivity")
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        return as_tensor(value)   # rows of UFL scalars
    if not np.allclose(array, array.T) or np.linalg.eigvalsh(array).min() <= 0:
        raise InputError(f"a diffusivity of numbers must be positive, or symmetric positive definite, got {value!r}.")
    return Constant(array)


def diffusive_flux(kappa, u):
    """κ∇u for a scalar or a tensor κ."""
    return dot(kappa, grad(u)) if kappa.ufl_shape else kappa * grad(u)


def facet_measure(mesh, marker, submesh=None):
    """Boundary measure over a marker, intersected with a codimension-one submesh where there is one."""
    parts = exterior_measures(mesh)
    if marker in parts:
        return parts[marker]
    sides = parts.pop("sides")
    if marker != "on_boundary":
        sides = sides(marker)
    if submesh is not None:
        sides = sides.reconstruct(intersect_measures=(Measure("dx", submesh),))
    return sum(parts.values(), sides) if marker == "on_boundary" else sides


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
    r = coefficient(reaction(u), "reaction(u)")
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


def supg_tau(V, v, kappa, slope, rate):
    """The SUPG time scale of the module docstring of `advection_diffusion`, a UFL scalar."""
    K = JacobianInverse(V.mesh())
    degree = V.ufl_element().embedded_superdegree
    G = 4 * degree**2 * dot(K.T, dot(as_matrix(_cell_metric(V.mesh().ufl_cell()).tolist()), K))
    D = dot(kappa, G) if kappa.ufl_shape else kappa * G
    return 1 / sqrt(dot(v, dot(G, v)) + 9 * inner(D, D.T) + (slope or 0)**2 + rate**2)


def equation(u, unknowns, *, velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow, supg,
             change=None, time_step=None):
    """Put the unknowns in their places, check what belongs together, and write the residual F = A + N.

    Parameters
    ----------
    u : Function
        State.
    unknowns : list of Unknown
        What is unknown; their values stand for them.
    velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow, supg
        What `check_coefficients` makes of those of `AdvectionDiffusion`.
    change : Function, optional
        ∂u/∂t of a transient problem.
    time_step : float, optional
        Its time step.

    Returns
    -------
    A : ufl.Form
        The part of F that is affine in u; a linear form in its test function.
    N : ufl.Form or None
        The rest, where the reaction is nonlinear.
    values : dict
        Strong Dirichlet values by marker, UFL scalars; empty where V is discontinuous.
    """
    mesh = u.function_space().mesh()
    tables = {"dirichlet": dict(dirichlet), "flux": dict(flux), "robin": robin}
    single = {"source": source, "diffusivity": diffusivity, "velocity": velocity}
    defaults = {"source": 0, "diffusivity": 1, "velocity": None}
    for x in unknowns:
        if x.kind in ("flux", "dirichlet"):
            # Last in its table, so that it wins at corners shared with other Dirichlet conditions.
            table = tables[x.kind]
            table[x.marker] = apply_unknown(f"{x.kind}[{x.marker!r}]", table.pop(x.marker, None), None, x.value)
        elif x.kind in single:
            single[x.kind] = apply_unknown(x.kind, single[x.kind], defaults[x.kind], x.value)
            if x.shape is not None:
                single[x.kind] = single[x.kind] * coefficient(x.shape, "the shape of the source")
    check_markers(mesh, tables | {"outflow": outflow})
    discontinuous = is_discontinuous(u.function_space())
    if mesh.extruded and not discontinuous and "on_boundary" in tables["dirichlet"]:
        # Firedrake's strong condition on "on_boundary" leaves out top and bottom.
        if any(x.marker == "on_boundary" for x in unknowns if x.kind == "dirichlet"):
            raise InputError("on an extruded mesh an unknown Dirichlet value belongs to one marker, not to "
                             f"'on_boundary': name one of {', '.join(map(repr, mesh_markers(mesh)))}.")
        whole = tables["dirichlet"].pop("on_boundary")
        tables["dirichlet"] |= dict.fromkeys(mesh_markers(mesh), whole)
    for x in unknowns:
        if x.submesh is not None:
            check_submesh(mesh, x.marker, x.submesh)

    v = single["velocity"]
    v = None if v is None else coefficient(v, "velocity")
    r, slope = reaction_terms(reaction, u)
    if change is None and not tables["dirichlet"] and not tables["robin"] and u not in extract_coefficients(r):
        raise InputError("without a Dirichlet or Robin condition or a reaction that depends on u, the state "
                         "is determined only up to a constant; add one of them.")
    if supg is True and (v is None or discontinuous):
        raise InputError("supg must be 'auto', False or, where V is continuous and there is a velocity, True.")
    values = {key: coefficient(g, f"dirichlet[{key!r}]") for key, g in tables["dirichlet"].items()}
    terms = dict(velocity=v, kappa=diffusivity_tensor(single["diffusivity"]), reaction=r,
                 slope=slope, source=coefficient(single["source"], "source"), flux=tables["flux"],
                 robin=tables["robin"], supg=supg, change=change, time_step=time_step)
    submeshes = {x.marker: x.submesh for x in unknowns if x.submesh is not None}
    if discontinuous:
        A, N = dg_residual(u, terms | {"dirichlet": values}, submeshes)
        values = {}
    else:
        A, N = residual(u, terms, submeshes)
    for x in unknowns:
        used = x.kind == "initial" or x.value in extract_coefficients(A) or any(
            x.value in extract_coefficients(g) for g in values.values())
        if not used:
            raise InputError(f"the callable given for {x.name!r} makes no use of the parameter.")
    return A, N, values


def _volume(u, terms):
    """Galerkin terms in the cells, without diffusion and advection: A, N and the known part of the residual."""
    w, dx, rest, N = TestFunction(u.function_space()), Measure("dx", u.function_space().mesh()), -terms["source"], None
    if terms["slope"] is None:
        N = terms["reaction"] * w * dx
    else:
        rest += terms["reaction"]
    if terms["change"] is not None:
        rest += terms["change"]
    return rest * w * dx, N, rest


def _natural(u, terms, submeshes):
    """Flux and Robin conditions, the same for continuous and discontinuous states."""
    mesh, w, F = u.function_space().mesh(), TestFunction(u.function_space()), Form([])
    for key, q in terms["flux"].items():
        F -= coefficient(q, f"flux[{key!r}]") * w * facet_measure(mesh, key, submeshes.get(key))
    for key, pair in terms["robin"].items():
        h, u_ext = (coefficient(c, f"robin[{key!r}]") for c in pair)
        F -= h * (u_ext - u) * w * facet_measure(mesh, key)
    return F


def residual(u, terms, submeshes):
    """The residual of a continuous state as the two forms of `equation`, from UFL coefficients.

    Parameters
    ----------
    u : Function
        The state.
    terms : dict
        ``velocity`` (or None), ``kappa``, ``reaction``, ``slope`` (or None), ``source``; ``flux`` and
        ``robin`` by marker; ``supg``; ``change`` and ``time_step`` (or None).
    submeshes : dict
        The submesh of a flux by its marker, where it lives on one.
    """
    V = u.function_space()
    w, v, kappa, dx = TestFunction(V), terms["velocity"], terms["kappa"], Measure("dx", V.mesh())
    F, N, rest = _volume(u, terms)
    F += dot(diffusive_flux(kappa, u), grad(w)) * dx
    if v is not None:
        F += dot(v, grad(u)) * w * dx
    if v is not None and terms["supg"]:
        # The exact solution has no strong residual at any point, so this quadrature need not resolve τ.
        over = dx(degree=2 * V.ufl_element().embedded_superdegree)
        rate = 2 / Constant(terms["time_step"]) if terms["time_step"] else 0
        tested = supg_tau(V, v, kappa, terms["slope"], rate) * dot(v, grad(w))
        F += tested * (dot(v, grad(u)) - div(diffusive_flux(kappa, u)) + rest) * over
        if N is not None:
            N += tested * terms["reaction"] * over
    F += _natural(u, terms, submeshes)
    return fix_quadrature(F), N and fix_quadrature(N)


def dg_residual(u, terms, submeshes):
    """The residual of a discontinuous state, as `residual`, with ``dirichlet`` values by marker in its terms."""
    F, N, _ = _volume(u, terms)
    boundary = [(facet_measure(u.function_space().mesh(), key), g) for key, g in terms["dirichlet"].items()]
    F += dg.transport(u, terms["velocity"], terms["kappa"], boundary)
    F += _natural(u, terms, submeshes)
    return fix_quadrature(F), N and fix_quadrature(N)


def integrals_with(unknowns, F):
    """The integrals of a form that contain an unknown, as a form."""
    values = {x.value for x in unknowns}
    return Form([integral for integral in F.integrals() if values & set(extract_coefficients(integral.integrand()))])


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
    """PETSc options from what `check_solver` returns: the words "direct" and "iterative", or a dict."""
    if isinstance(given, dict):
        return given
    if given == "direct":
        own = V.mesh().comm.size == 1 and V.dim() <= PETSC_LU_LIMIT[V.mesh().topological_dimension]
        return {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu",
                "pc_factor_mat_solver_type": "petsc" if own else DEFAULT_DIRECT_SOLVER}
    # Multigrid needs diffusion to smooth; with advection overlapping ILU is the robust choice.
    asm = {"pc_type": "asm", "sub_pc_type": "ilu", "sub_pc_factor_levels": 1}
    pc = asm if advective else {"pc_type": "gamg"}
    return {"mat_type": "aij", "ksp_type": "gmres", "ksp_gmres_restart": 100, "ksp_rtol": 1e-11,
            "ksp_max_it": 1000, **pc}
