"""A small channel with every kind of condition, which the tests of the forward problems share."""

import numpy as np
from firedrake import (Constant, FacetNormal, Function, FunctionSpace, SpatialCoordinate, UnitSquareMesh,
                       VectorFunctionSpace, as_vector, cos, div, dot, errornorm, exp, grad, sin)

from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary, Physics, TimeSteps


def grouped(**given):
    """Arguments of a problem class by their own names, sorted into physics, boundary and steps."""
    groups = {"physics": Physics, "bcs": Boundary, "steps": TimeSteps}
    taken = {name: {key: given.pop(key) for key in kind.__dataclass_fields__ if key in given}
             for name, kind in groups.items()}
    return given | {name: kind(**taken[name]) for name, kind in groups.items() if taken[name]}


def quadratic(u):
    return 0.3 * u**2


def channel(n=8, unknown=("flux", 3), M=None, degree=1, family="CG", **change):
    """A small problem with all four kinds of conditions; the parameter acts where `unknown` says."""
    mesh = change.pop("mesh", None) or UnitSquareMesh(n, n)
    V = FunctionSpace(mesh, family, degree)
    x, y = SpatialCoordinate(mesh)
    given = dict(velocity=as_vector([1 + y, 0.2 - 0.1 * x]), diffusivity=0.1 + 0.05 * x, source=sin(3 * x),
                 dirichlet={1: 0.5 + y}, robin={4: (1.0, 0.2)}, outflow=(2,))
    kind = unknown if isinstance(unknown, str) else unknown[0]
    if isinstance(unknown, str):
        given.pop(kind, None)
    elif kind == "dirichlet":
        given["dirichlet"] = {2: 0.3}
        del given["outflow"]
    return AdvectionDiffusion(V, M or V, unknown, **grouped(**given | change))


# A positive diffusivity, a velocity that never vanishes, and plain values elsewhere.
CASES = {
    "source": dict(unknown="source"),
    "source with offset": dict(unknown="source", source=lambda m: 1 + m),
    "flux": dict(unknown=("flux", 3)),
    "exponential flux": dict(unknown=("flux", 3), flux={3: exp}),
    "dirichlet": dict(unknown=("dirichlet", 1)),
    "squared dirichlet": dict(unknown=("dirichlet", 1), dirichlet={1: lambda m: m**2, 3: 0.1}, flux={}),
    "diffusivity": dict(unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m)),
    "velocity": dict(unknown="velocity", velocity=lambda m: as_vector([1, 0]) + m),
}


def case(name, reaction=None, **change):
    options = CASES[name] | {"reaction": reaction} | change
    if options["unknown"] == "velocity":
        options["mesh"] = UnitSquareMesh(8, 8)
        options["M"] = VectorFunctionSpace(options["mesh"], "CG", 1)
    return channel(**options)


def draws(problem, n, scale=0.5, seed=1):
    """Owned coefficients of n parameters, in serial."""
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, Function(problem.M).dat.data_ro.size))


def as_function(M, values):
    m = Function(M)
    with m.dat.vec_wo as x:
        x.array[:] = values
    return m


def owned(f):
    with f.dat.vec_ro as x:
        return x.array.copy()


def manufactured_error(mesh, degree, kappa, reaction=None, supg="auto", markers=(1, 2, 3, 4), family="CG"):
    """L2 error for a smooth solution with Dirichlet, Robin and flux conditions; kappa: a number or an array."""
    V = FunctionSpace(mesh, family, degree)
    x, y = SpatialCoordinate(mesh)
    exact = sin(2 * x + y) + cos(3 * y - x * x)
    v, kappa = as_vector([1 + 0.3 * y, 0.5 - 0.2 * x]), Constant(kappa) * (1 + 0.5 * x * y)
    carried = dot(kappa, grad(exact)) if kappa.ufl_shape else kappa * grad(exact)
    q = dot(FacetNormal(mesh), carried)
    f = dot(v, grad(exact)) - div(carried) + (reaction(exact) if reaction else 0)
    left, right, bottom, top = markers
    problem = AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=kappa,
                                                         reaction=reaction),
                                 Boundary(dirichlet={left: exact, bottom: exact}, flux={top: q},
                                          robin={right: (0.7, exact + q / 0.7)}), supg=supg)
    return errornorm(exact, problem(Function(V)), degree_rise=3)
