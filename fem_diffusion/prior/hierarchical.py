r"""Gaussian fields whose standard deviation and correlation length are unknown, too.

The eigenfunctions of the Matérn operator with natural boundary conditions are those of the Laplacian,
:math:`A \varphi = \mu M \varphi`, whatever the length: only the variances along them depend on it,
:math:`\lambda_k(\ell) = (1 + \ell^2 \mu_k / 2\nu)^{-m}`. So the field is

.. math:: f = \bar m + s \sum_k \sqrt{\lambda_k(\ell)}\, w_k\, \varphi_k \Big/
    \Big(\sum_k \lambda_k(\ell)\, \varphi_k^2\Big)^{1/2}

with independent standard normal w, which do not depend on s and ℓ (non-centred: Papaspiliopoulos, Roberts and Sköld
2007), and the denominator makes s the standard deviation at every node. With Dirichlet conditions the sum is over the
modes that vanish there, and the denominator stays that of the natural ones: as for `GaussianPrior`, the standard
deviation falls to zero towards such parts and is s away from them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from firedrake import (
    DirichletBC, FunctionSpace, Function, MixedFunctionSpace, TestFunction, TrialFunction, assemble, dx, grad,
    homogenize, inner,
)
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from pyadjoint import no_annotations
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.linalg import eigsh
from ufl.core.expr import Expr

from fem_diffusion.checks import alike, check_count, check_number, check_seed
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_rows
from fem_diffusion.fields.coefficients import by_component, coefficients, on_root, owned_size
from fem_diffusion.fields.modes import mass_action, without_conditions
from fem_diffusion.marginal import Marginal
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.protocol import GaussianCore, Prior

__all__ = ["HierarchicalPrior"]

_MODES = 256
_SHARE = 0.95   # of the variance that modes hold at a length that one in a hundred draws falls below


class HierarchicalPrior(Prior):
    """Matérn field with a standard deviation and a correlation length of unknown size, which have posteriors as well.

    The parameter is mixed: a number for each of the two that is unknown, named "std" and "correlation_length", then the
    field, ``m.subfunctions[-1]``. Latents are standard normal. Two numbers and the modes of the field take part in all
    that takes a `ProductPrior`.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Scalar space of CG elements.
    std, correlation_length : float or scipy.stats frozen distribution
        Of positive numbers, in the units of field and mesh, one of them at least a distribution: see `Marginal`.
    mean : float | ufl.core.expr.Expr
        Of the field.
    bcs : firedrake.DirichletBC | sequence of firedrake.DirichletBC | None
        On V, which every field satisfies exactly, as for `GaussianPrior`.
    smoothness : float, optional
        As for `GaussianPrior`.
    modes : int, optional
        Of the Laplacian, found on one rank; 256, or as many as V has free unknowns, where left out.

    Raises
    ------
    InputError
        If neither is a distribution, one may be negative, the modes do not resolve short lengths, or as for
        `GaussianPrior`.
    """

    @no_annotations
    def __init__(self, V: WithGeometry, std: Any, correlation_length: Any, *, mean: float | Expr = 0.0,
                 bcs: DirichletBC | Sequence[DirichletBC] | None = (), smoothness: float | None = None,
                 modes: int | None = None) -> None:
        given = {"std": std, "correlation_length": correlation_length}
        self._laws = {name: Marginal(law, name) for name, law in given.items() if not np.isscalar(law)}
        self._fixed = {name: check_number(law, name, above=0) for name, law in given.items() if name not in self._laws}
        if not self._laws:
            raise InputError("std and correlation_length are numbers: take GaussianPrior, or give a distribution.")
        for name, law in self._laws.items():
            if law.bounds[0] < 0:
                raise InputError(f"{name} ~ {law} may be negative: give a law of positive numbers, as lognorm(0.5).")
        middle = {name: float(law.of_normal(np.zeros(1))[0]) for name, law in self._laws.items()} | self._fixed
        field = GaussianPrior(V, 1.0, middle["correlation_length"], mean=mean, bcs=bcs, smoothness=smoothness)
        if V.value_shape or owned_size(field._space) != owned_size(V):
            raise InputError(f"V is {V.ufl_element()}: give a scalar space.")
        free = without_conditions(V, field.bcs, np.ones((1, owned_size(V))))[0] > 0
        unknowns = V.comm.allreduce(int(free.sum()))
        count = min(_MODES, unknowns) if modes is None else check_count(modes, "modes", least=2)
        if count > unknowns:
            raise InputError(f"modes is {count}: the space has {unknowns} unknowns, ask for at most as many.")
        self._mean, self._order = coefficients(field.mean), field._order
        self._twice = 2 * self._order - V.mesh().topological_dimension      # 2ν
        self._modes, self._rates = _laplacian(V, count, middle["correlation_length"], free)
        natural, self._natural = self._modes, self._rates
        if unknowns < V.dim():
            natural, self._natural = _laplacian(V, V.dim() if count == unknowns else count,
                                                middle["correlation_length"], np.ones_like(free))
        self._dual, self._squares = mass_action(V)(self._modes), natural**2
        self._check_resolved(V, unknowns)
        self._root = np.sqrt(self._variances(np.array([middle["correlation_length"]]), self._rates)[0][0])
        numbers = [FunctionSpace(V.mesh(), "R", 0, name=name) for name in self._laws]
        self._core = ProductPrior([*(GaussianPrior(R, std=1.0) for R in numbers), _Expansion(field, self)])
        self.V = MixedFunctionSpace([*numbers, V])
        self.V.dim()    # collective the first time, which __repr__ must not be

    def _variances(self, lengths: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """λ (n, modes) at lengths (n,), up to a factor, of the Laplacian's eigenvalues, and d log λ by the length."""
        scale = 1 + lengths[:, None]**2 * rates / self._twice
        slope = -self._order * 2 * lengths[:, None] * rates / self._twice / scale
        return scale**-self._order, slope

    def _check_resolved(self, V: WithGeometry, unknowns: int) -> None:
        """InputError where the modes past ours matter, by their asymptotic number (Weyl's law)."""
        if len(self._rates) == unknowns:
            return
        law = self._laws.get("correlation_length")
        short = self._fixed.get("correlation_length") or float(law.of_normal(np.array([-2.33]))[0])  # type: ignore
        count, d = len(self._rates), V.mesh().topological_dimension
        more = self._rates[-1] * (np.arange(count + 1, 200 * count) / count)**(2 / d)
        rest = ((1 + short**2 * more / self._twice)**-self._order).sum()
        share = (held := self._variances(np.array([short]), self._rates)[0].sum()) / (held + rest)
        if share < _SHARE:
            raise InputError(f"{count} modes hold {share:.0%} of the variance at a correlation length of {short:.3g}: "
                             "give more modes, or a law of longer lengths.")

    @property
    def core(self) -> ProductPrior:
        """Standard normal numbers, and the field at the median length, before all scaling."""
        return self._core

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`."""
        return self.transform_many(self.core.sample_many(n, seed))

    def _read(self, values: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
        """Normal scores and sizes (n,) of std and length by name, and w (n, modes), of rows (n, n_owned of core.V)."""
        *numbers, field = by_component(self.core.V, check_rows(values, self.core.V, "values"))
        comm = self.V.comm
        scores = {name: comm.allreduce(part.sum(axis=1)) for name, part in zip(self._laws, numbers)}
        sizes = {name: np.full(len(field), x) for name, x in self._fixed.items()} | {
            name: self._laws[name].of_normal(z) for name, z in scores.items()}
        return scores, sizes, comm.allreduce(field @ self._dual.T) / self._root

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.transform_many`."""
        scores, sizes, w = self._read(values)
        variances, natural = (self._variances(sizes["correlation_length"], rates)[0]
                              for rates in (self._rates, self._natural))
        shape = (w * np.sqrt(variances)) @ self._modes / np.sqrt(natural @ self._squares)
        numbers = [sizes[name][:, None][:, :owned_size(W)] for name, W in zip(scores, self.V)]
        return np.hstack([*numbers, self._mean + sizes["std"][:, None] * shape])

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`."""
        *numbers, rows = by_component(self.V, check_rows(rows, self.V, "rows"))
        scores, sizes, w = self._read(np.asarray(at)[None])
        (variances,), (slope,) = self._variances(sizes["correlation_length"], self._rates)
        (natural,), (bend,) = self._variances(sizes["correlation_length"], self._natural)
        std, comm, roots = float(sizes["std"][0]), self.V.comm, np.sqrt(variances)
        total = natural @ self._squares
        shape = (w[0] * roots) @ self._modes / np.sqrt(total)
        bent = (w[0] * roots * slope / 2) @ self._modes / np.sqrt(total)
        bent -= shape * ((natural * bend) @ self._squares) / (2 * total)
        by_size = {"std": shape, "correlation_length": std * bent}
        found = []
        for (name, z), row in zip(scores.items(), numbers):
            change = comm.allreduce(rows @ by_size[name])
            found.append((row + change[:, None][:, :row.shape[1]]) * self._laws[name].slope(z))
        by_w = comm.allreduce(rows / np.sqrt(total) @ self._modes.T) * std * roots / self._root
        return np.hstack([*found, by_w @ self._dual])

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """InputError: the field depends on its size and length everywhere, so `pull_back` serves."""
        raise InputError("The transform is not pointwise: use pull_back.")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} ~ {law}" for name, law in self._laws.items())
        fixed = "".join(f", {name}={x:g}" for name, x in self._fixed.items())
        return f"HierarchicalPrior({self.V[-1].dim()} unknowns, {len(self._rates)} modes, {sizes}{fixed})"


class _Expansion(GaussianCore):
    """The field ``Σ sqrt(λ_k) w_k φ_k`` at the median length, without mean and scaling."""

    def __init__(self, field: GaussianPrior, of: HierarchicalPrior) -> None:
        self.V, self.mean, self._of, self._noise = field.V, Function(field.V), of, field._matern
        self.bcs = tuple(homogenize(list(field.bcs)))

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`: white noise, projected onto the modes."""
        n, seed = alike(self.V.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        rng, block = np.random.default_rng(seed), self._noise.block()
        parts = [self._noise.white_noise(rng, min(block, n - start)) @ self._of._modes.T
                 for start in range(0, n, block)]
        w = self.V.comm.allreduce(np.concatenate(parts))
        return (w * self._of._root) @ self._of._modes

    def apply_covariance(self, x: np.ndarray) -> np.ndarray:
        """As `GaussianCore.apply_covariance`."""
        x = check_rows(x, self.V, "x")
        return (self.V.comm.allreduce(x @ self._of._modes.T) * self._of._root**2) @ self._of._modes

    def __repr__(self) -> str:
        return f"the field of {self._of!r}"


def _laplacian(V: WithGeometry, count: int, length: float, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Modes (count, n_owned), orthonormal in L2, and eigenvalues (count,) of the Laplacian.

    They vanish at nodes that are not `free` (n_owned,), and have natural conditions elsewhere.
    """
    u, v = TrialFunction(V), TestFunction(V)
    forms = inner(grad(u), grad(v)) * dx, inner(u, v) * dx
    A, M = (_whole(assemble(form, mat_type="aij").petscmat) for form in forms)
    some = np.flatnonzero(np.concatenate(V.comm.allgather(free)))

    def solve() -> tuple[np.ndarray, np.ndarray]:
        assert A is not None and M is not None
        stiffness, mass = A[some][:, some], M[some][:, some]
        if 2 * count > len(some):
            values, vectors = eigh(stiffness.toarray(), mass.toarray(), subset_by_index=[0, count - 1])
        else:
            start = np.random.default_rng(0).standard_normal(V.dim())[some]
            values, vectors = eigsh(stiffness, count, mass, sigma=-1 / length**2, v0=start)
        order, whole = np.argsort(values), np.zeros((count, V.dim()))
        whole[:, some] = vectors[:, order].T
        return np.maximum(values[order], 0.0), whole
    values, modes = on_root(V.comm, solve)
    first = sum(V.comm.allgather(owned_size(V))[:V.comm.rank])
    return np.ascontiguousarray(modes[:, first:first + owned_size(V)]), values


def _whole(matrix: PETSc.Mat) -> csr_matrix | None:
    """A distributed matrix on rank 0."""
    indptr, indices, values = matrix.getValuesCSR()
    part = csr_matrix((values, indices, indptr), shape=(len(indptr) - 1, matrix.getSize()[1]))
    parts = matrix.comm.tompi4py().gather(part)
    return None if parts is None else vstack(parts).tocsr()
