"""Orders of convergence on meshes of many kinds, for continuous and discontinuous states."""

import numpy as np
import pytest
from firedrake import (ExtrudedMesh, FacetNormal, Function, FunctionSpace, IcosahedralSphereMesh, Mesh,
                       PeriodicUnitSquareMesh, SpatialCoordinate, UnitDiskMesh, UnitIntervalMesh, UnitSquareMesh,
                       VectorFunctionSpace, as_vector, assemble, cos, div, dot, ds, dx, errornorm, grad, pi, sin)

from channel import grouped, manufactured_error
from fem_diffusion import AdvectionDiffusion, Boundary, Physics, TimeSteps, TransientAdvectionDiffusion
from fem_diffusion.errors import InputError

slow = pytest.mark.slow
both = pytest.mark.parametrize("family", ["CG", "DG"])
quick_cg = pytest.mark.parametrize("family", ["CG", pytest.param("DG", marks=slow)])
quick_dg = pytest.mark.parametrize("family", ["DG", pytest.param("CG", marks=slow)])


def order(error, coarse, fine):
    """Observed order between two meshes, the second of half the width."""
    return np.log2(error(coarse) / error(fine))


def write_gmsh(file, n):
    """A unit square of 2 n² triangles as a gmsh file; physical lines 11 (left), 12 (right), 13 (bottom), 14 (top)."""
    node = np.arange((n + 1)**2).reshape(n + 1, n + 1) + 1   # [row, column]
    lines = [(marker, a, b) for marker, side in ((11, node[:, 0]), (12, node[:, -1]), (13, node[0]), (14, node[-1]))
             for a, b in zip(side, side[1:])]
    corners = [(node[i, j], node[i, j + 1], node[i + 1, j], node[i + 1, j + 1]) for i in range(n) for j in range(n)]
    cells = [cell for a, b, c, d in corners for cell in ((a, b, d), (a, d, c))]
    text = ["$MeshFormat", "2.2 0 8", "$EndMeshFormat", "$Nodes", str(node.size)]
    text += [f"{node[i, j]} {j / n + 0.3 / n * (i % 2) * (0 < j < n)} {i / n} 0"
             for i in range(n + 1) for j in range(n + 1)]
    text += ["$EndNodes", "$Elements", str(len(lines) + len(cells))]
    text += [f"{k} 1 2 {marker} {marker} {a} {b}" for k, (marker, a, b) in enumerate(lines, start=1)]
    text += [f"{k} 2 2 1 1 {a} {b} {c}" for k, (a, b, c) in enumerate(cells, start=len(lines) + 1)]
    file.write_text("\n".join(text + ["$EndElements", ""]))
    return Mesh(str(file))


@quick_cg
def test_gmsh(tmp_path, family):
    def error(n):
        mesh = write_gmsh(tmp_path / f"square{n}.msh", n)
        return manufactured_error(mesh, 1, 0.05, markers=(11, 12, 13, 14), family=family)
    assert order(error, 8, 16) >= 1.85


@slow
@both
def test_extruded(family):
    def error(n):
        mesh = ExtrudedMesh(UnitIntervalMesh(n), n)
        return manufactured_error(mesh, 1, [[0.1, 0.03], [0.03, 0.05]], markers=(1, 2, "bottom", "top"),
                                  family={"CG": "CG", "DG": "DQ"}[family])
    assert order(error, 8, 16) >= 1.85


@slow
@both
def test_extruded_prisms(family):
    """Three dimensions, triangles times intervals."""
    def error(n):
        mesh = ExtrudedMesh(UnitSquareMesh(n, n), n)
        x, y, z = SpatialCoordinate(mesh)
        V = FunctionSpace(mesh, {"CG": "CG", "DG": "DQ"}[family], 1)
        exact, v = sin(2 * x + y) * cos(z) + z * z, as_vector([1, 0.5 - x, 0.3])
        f, q = dot(v, grad(exact)) - 0.1 * div(grad(exact)), 0.1 * dot(FacetNormal(mesh), grad(exact))
        problem = AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=0.1),
                                     Boundary(dirichlet={1: exact, 2: exact, "bottom": exact},
                                              flux=dict.fromkeys(("top", 3, 4), q)))
        return errornorm(exact, problem(Function(V)), degree_rise=2)
    assert order(error, 4, 8) >= 1.75


@quick_dg
def test_periodic(family):
    """No boundary: a reaction that depends on u determines the state, and nothing else does."""
    def problem(n, **reaction):
        mesh = PeriodicUnitSquareMesh(n, n)
        V, (x, y) = FunctionSpace(mesh, family, 1), SpatialCoordinate(mesh)
        exact, v = sin(2 * pi * x) * cos(2 * pi * y), as_vector([1.0, 0.5])
        f = dot(v, grad(exact)) - 0.02 * div(grad(exact)) + 2 * exact
        return exact, AdvectionDiffusion(V, V, "source", **grouped(source=lambda m: m + f, velocity=v, diffusivity=0.02,
                                                                   **reaction))

    def error(n):
        exact, there = problem(n, reaction=lambda u: 2 * u)
        return errornorm(exact, there(Function(there.V)), degree_rise=2)
    assert order(error, 12, 24) >= 1.8
    with pytest.raises(InputError, match="only up to a constant"):
        problem(4)


@pytest.mark.parametrize("family, kind", [("CG", "dirichlet"), ("DQ", "robin"),
                                          pytest.param("CG", "robin", marks=slow),
                                          pytest.param("DQ", "dirichlet", marks=slow)])
def test_the_seam_of_a_periodic_extrusion_is_no_boundary(family, kind):
    """The boundary is the sides; what is given there is not the solution at the seam."""
    def problem(n, conditions):
        mesh = ExtrudedMesh(UnitIntervalMesh(n), n, periodic=True)
        V, (x, z) = FunctionSpace(mesh, family, 1), SpatialCoordinate(mesh)
        exact, v = cos(2 * pi * z + 0.3) * cos(pi * x), as_vector([0.3, 1.0])
        f = dot(v, grad(exact)) - 0.1 * div(grad(exact))
        sides = (1 - 2 * x) * cos(2 * pi * z + 0.3)
        values = {"dirichlet": sides, "robin": (0.7, sides)}
        return exact, AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=0.1),
                                         Boundary(**{kind: dict.fromkeys(conditions, values[kind])}))

    def error(n):
        exact, there = problem(n, ["on_boundary"])
        return errornorm(exact, there(Function(there.V)), degree_rise=2)
    assert order(error, 8, 16) >= 1.75
    with pytest.raises(InputError, match="the markers of this mesh are 1, 2; its extrusion is periodic"):
        problem(2, [1, 2, "top"])


def disc(refinements, curved):
    """The unit disc by triangles, with edges on the boundary that are arcs of parabolas or straight."""
    mesh = UnitDiskMesh(refinements)
    if not curved:
        return mesh
    X = Function(VectorFunctionSpace(mesh, "CG", 2)).interpolate(SpatialCoordinate(mesh))
    rim = X.function_space().boundary_nodes("on_boundary")
    X.dat.data[rim] /= np.linalg.norm(X.dat.data_ro[rim], axis=1)[:, None]
    return Mesh(X)


@quick_cg
@pytest.mark.parametrize("curved", [True, pytest.param(False, marks=slow)])
def test_disc(family, curved):
    """Values on a circle: third order needs curved cells, because a polygon has its boundary in the wrong place."""
    def error(refinements):
        mesh = disc(refinements, curved)
        V, (x, y) = FunctionSpace(mesh, family, 2), SpatialCoordinate(mesh)
        exact, v = cos(pi / 2 * (x * x + y * y)), as_vector([-y, x + 0.5])
        f = dot(v, grad(exact)) - 0.1 * div(grad(exact))
        problem = AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=0.1),
                                     Boundary(dirichlet={"on_boundary": 0.0}))
        return errornorm(exact, problem(Function(V)), degree_rise=2)
    assert (order(error, 2, 3) >= 2.7) == curved


def sphere(refinements, degree=1):
    mesh = IcosahedralSphereMesh(1.0, refinements, degree=degree)
    mesh.init_cell_orientations(SpatialCoordinate(mesh))
    return mesh


@quick_dg
def test_sphere(family):
    """A solid rotation over the sphere; harmonics of degree 1 and 2 are eigenfunctions of its Laplacian."""
    def error(refinements):
        mesh = sphere(refinements)
        V, (x, y, z) = FunctionSpace(mesh, family, 1), SpatialCoordinate(mesh)
        exact, v = x * y + z, as_vector([-y, x, 0])
        f = x * x - y * y + 0.1 * (6 * x * y + 2 * z) + exact
        problem = AdvectionDiffusion(V, V, "source", Physics(source=lambda m: m + f, velocity=v, diffusivity=0.1,
                                                             reaction=lambda u: u))
        return errornorm(exact, problem(Function(V)), degree_rise=2)
    assert order(error, 2, 3) >= 1.8


@slow
@both
def test_decay_on_the_sphere(family):
    """∂u/∂t + v·∇u = κΔu for a rotating harmonic: x cos t + y sin t, decaying with exp(-2κt)."""
    mesh = sphere(3)
    V, (x, y, _) = FunctionSpace(mesh, family, 1), SpatialCoordinate(mesh)
    problem = TransientAdvectionDiffusion(V, V, "initial", TimeSteps(times=[1.0], time_step=0.05),
                                          Physics(velocity=as_vector([-y, x, 0]), diffusivity=0.1))
    last = Function(V)
    last.dat.data[:] = problem(Function(V).interpolate(x)).dat.data_ro.ravel()
    exact = np.exp(-0.2) * (np.cos(1.0) * x + np.sin(1.0) * y)
    assert errornorm(exact, last) < 0.02 * assemble(exact**2 * dx)**0.5


@slow
@both
def test_what_flows_in_flows_out(family):
    """Without sources, the fluxes of a divergence-free flow over the boundary add up to nearly zero."""
    mesh = UnitSquareMesh(16, 16)
    V, y = FunctionSpace(mesh, family, 1), SpatialCoordinate(mesh)[1]
    v, n = as_vector([6 * y * (1 - y), 0]), FacetNormal(mesh)
    problem = AdvectionDiffusion(V, V, ("dirichlet", 1), Physics(velocity=v, diffusivity=0.05))
    u = problem(Function(V).interpolate(1 + y))
    inflow = assemble(dot(v, n) * u * ds(1)) - 0.05 * assemble(dot(n, grad(u)) * ds(1))
    outflow = assemble(dot(v, n) * u * ds(2))
    assert abs(inflow + outflow) < 0.01 * outflow
