"""Samples of a parameter: a sequence of Functions with summaries, files and pictures."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from firedrake import Function, FunctionSpace, conditional
from firedrake.functionspaceimpl import WithGeometry
from ufl.conditional import Condition

from fem_diffusion import files
from fem_diffusion.certificate import Certificate, pack_certificate, unpack_certificate
from fem_diffusion.checks import check_callable, check_count, check_kind, check_number, check_path, together
from fem_diffusion.errors import InputError, InstallError
from fem_diffusion.fields.checks import prepared_interpolation
from fem_diffusion.fields.export import write_checkpoint, write_vtk
from fem_diffusion.fields.coefficients import by_component, coefficients, field, is_real, on_root, owned_size
from fem_diffusion.fields.keyed import element_of, gather_keys, gather_rows, own_columns, read_everywhere

__all__ = ["Samples", "load_samples"]

_FILE = "samples.safetensors"
# Samples in the files for other programs, which are slow to write.
_VIEWED = 20
# Coefficients for which a summary is made at a time.
_WIDTH = 8192
# Numbers that a summary tells, of one component.
_TOLD = 12


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Samples of the parameter: a sequence of Functions with summaries.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the parameter.
    values : numpy.ndarray
        Owned coefficients, shape (n, n_owned).
    latents : numpy.ndarray
        Shape (n, r), global; r is 0 where there is no basis.
    certificate : Certificate or None
        How they were made, of corrected samples.
    """

    V: WithGeometry
    values: np.ndarray
    latents: np.ndarray
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        self.V.dim()    # collective the first time, which __repr__ must not be

    @classmethod
    def later(cls, V: WithGeometry, values: Callable[[], np.ndarray], latents: np.ndarray) -> "Samples":
        """Samples whose coefficients are made when they are first asked for; on several ranks at once."""
        if V.comm.size > 1:   # later not all ranks may ask, and all are needed
            return cls(V, values(), latents)
        samples = object.__new__(cls)
        vars(samples).update(V=V, latents=latents, certificate=None, _values=values)
        return samples

    def __getattr__(self, name: str) -> np.ndarray:
        if name != "values" or "_values" not in vars(self):
            raise AttributeError(f"Samples have no {name!r}.")
        vars(self)["values"] = vars(self).pop("_values")()
        return self.values

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        certificate = "" if self.certificate is None else f"\n{self.certificate}"
        return (f"Samples: {len(self)} with {self.V.dim()} unknowns in {self.V.ufl_element()} and "
                f"{self.latents.shape[1]} latents{''.join(self._numbers())}{certificate}")

    def _numbers(self) -> Iterator[str]:
        """A line for each component of numbers that this rank holds: "rate: 0.31 ± 0.04"."""
        parts = by_component(self.V, self.values) if any(map(is_real, self.V)) else ()
        for i, (W, part) in enumerate(zip(self.V, parts)):
            if is_real(W) and 1 < len(part) and 0 < part.shape[1] <= _TOLD:
                texts = (f"{mean:.4g} ± {std:.2g}" for mean, std in zip(part.mean(axis=0), part.std(axis=0, ddof=1)))
                yield f"\n{W.name or (f'component {i}' if len(self.V) > 1 else 'parameter')}: {', '.join(texts)}"

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> "Function | Samples":
        """One sample as a Function; some of them as Samples, by a slice, a boolean mask, or a sequence of integers."""
        if isinstance(index, (slice, list, tuple, np.ndarray)):
            try:
                chosen = np.arange(len(self))[index if isinstance(index, slice) else np.asarray(index)]
            except (IndexError, ValueError) as error:
                raise InputError(f"There are {len(self)} samples, and no such choice of them ({error}): give a slice, "
                                 "a mask of that length, or their numbers.") from error
            if chosen.ndim != 1:
                raise InputError("Samples are chosen in one dimension: give a flat mask or sequence of numbers.")
            return replace(self, values=self.values[chosen], latents=self.latents[chosen])
        if not isinstance(index, Integral) or isinstance(index, bool):
            raise InputError(f"Samples are numbered by integers, slices, masks and sequences of integers, not by "
                             f"{type(index).__name__}.")
        # An IndexError ends a loop over a sequence, so it stays one.
        return field(self.V, self.values[index], name=f"sample_{range(len(self))[index]}")

    def __iter__(self) -> Iterator[Function]:
        return (self[i] for i in range(len(self)))

    def component(self, i: int) -> "Samples":
        """Samples of component i of a mixed parameter, in its own space; `latents` stay those of all."""
        if not isinstance(i, Integral) or not 0 <= i < len(self.V):
            raise InputError(f"There is no component {i!r}: the parameter has {len(self.V)}, counted from 0.")
        V = self.V[i].collapse() if len(self.V) > 1 else self.V
        return replace(self, V=V, values=by_component(self.V, self.values)[i])

    def mean(self) -> Function:
        """Pointwise mean at the nodes."""
        self._check_some()
        return field(self.V, self.values.mean(axis=0), name="mean")

    def std(self) -> Function:
        """Pointwise standard deviation at the nodes."""
        if len(self) < 2:
            raise InputError("A standard deviation needs at least 2 samples.")
        return field(self.V, self._columns(lambda x: x.std(axis=0, ddof=1)), name="std")

    def quantile(self, q: float) -> Function:
        """Pointwise quantile at the nodes, 0 <= q <= 1."""
        self._check_some()
        q = check_number(q, "q", least=0, most=1)
        return field(self.V, self._columns(lambda x: np.quantile(x, q, axis=0)), name=f"quantile_{q:g}")

    def _columns(self, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What f makes of all samples at each coefficient (n_owned,), some coefficients at a time to save memory."""
        width = self.values.shape[1]
        return np.concatenate([f(self.values[:, i:i + _WIDTH]) for i in range(0, max(width, 1), _WIDTH)])

    def map(self, f: Callable[[Function], Any]) -> np.ndarray:
        """A quantity of interest of every sample, shape (n, ...) (collective).

        f maps a Function, a copy, to a number or an array, for example ``lambda m: assemble(m * dx)``. InputError is
        raised if there are no samples, or f gives something else, or arrays of different shapes.
        """
        self._check_some()
        check_callable(f, "f", "a function of a Function", 1)
        rows = [together(self.V.comm, lambda: np.array(f(m)), watched=True) for m in self]
        if len({row.shape for row in rows}) > 1:
            raise InputError("f gives arrays of different shapes: let it give equally many numbers for each sample.")
        found = np.stack(rows)
        if found.dtype.kind not in "biufc":
            raise InputError(f"f gives {found.dtype} values: let it return numbers, such as assemble(m * dx).")
        return found

    def probability(self, condition: Callable[[Function], Any]) -> "float | Function":
        """Share of the samples for which something holds; of a UFL condition the share at each node (collective).

        The condition maps a Function to True or False, or to a scalar UFL condition, such as ``lambda m: m > 1.6``.
        InputError is raised if it gives something else, there are no samples, or the parameter has no nodes for UFL.
        """
        self._check_some()
        check_callable(condition, "condition", "a function of a Function, such as lambda m: m > 1.6", 1)
        m, W = field(self.V, self.values[0]), self.V
        try:
            found = together(self.V.comm, lambda: condition(m), watched=True)
        except ValueError as error:
            if not self.V.value_shape:
                raise
            raise InputError(f"condition fails with a Function of value shape {self.V.value_shape} ({error}): take "
                             "component(i), or compare a component, such as m[0] > 1.6.") from error
        if not isinstance(found, Condition):
            found = self.map(condition)
            if found.dtype != bool or found.ndim != 1:
                raise InputError("condition gives neither True or False nor a UFL condition: return one, such as m > "
                                 "1.6 (pointwise) or bool(assemble(m * dx) > 1.6).")
            return float(found.mean())
        if W.value_shape and len(W) == 1 and W.ufl_element().sub_elements:
            W = FunctionSpace(W.mesh(), W.ufl_element().sub_elements[0])
        if len(W) > 1 or W.value_shape or not (is_real(W) or W.finat_element.has_pointwise_dual_basis):
            raise InputError(f"{self.V.ufl_element()} has no nodes of its own for a UFL condition: take component(i), "
                             "or return True or False.")
        share, total = Function(W), np.zeros(owned_size(W))
        run = prepared_interpolation(conditional(found, 1.0, 0.0), share)
        for row in self.values:
            with m.dat.vec_wo as vector:
                vector.array[:] = row
            run()
            total += coefficients(share)
        return field(W, total / len(self), name="probability")

    def to_arviz(self, chains: int = 1) -> Any:
        """The samples as so many chains of equal length, one after the other, for ArviZ (collective).

        The variables are ``parameter``, all coefficients on every rank, and ``latents``. InputError is raised if the
        samples are no so many chains, InstallError if ArviZ is not installed.
        """
        try:
            import arviz  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InstallError("ArviZ is not installed: pip install 'fem_diffusion[arviz]'.") from error
        self._check_some()
        if len(self) % check_count(chains, "chains"):
            raise InputError(f"{len(self)} samples are not {chains} chains of equal length: give their number.")
        variables = {"parameter": np.concatenate(self.V.comm.allgather(self.values), axis=1), "latents": self.latents}
        convert = getattr(arviz, "convert_to_datatree", None) or arviz.convert_to_inference_data
        return convert({name: x.reshape(chains, -1, x.shape[1]) for name, x in variables.items() if x.shape[1]})

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("Samples hold a mesh and cannot be copied or pickled: use their save, and load_samples.")

    def save(self, folder: str | os.PathLike, count: int | None = None) -> None:
        """Write the samples, for `load_samples`, and their summaries for other programs.

        Parameters
        ----------
        folder : path
            Receives ``samples.safetensors``, with the samples and their latents; ``samples.h5``, a CheckpointFile of
            mesh, mean, standard deviation, 2.5 and 97.5 % quantiles and the first 20 samples; and ``summary.pvd`` for
            viewing. Of a mixed parameter the last two are in a folder for each component, ``component_0`` and so on;
            of one that does not live on the cells of a mesh (Real space) there is the first one only.
        count : int, optional
            Number of samples to write; all where left out.

        FileError is raised if a file cannot be written, InstallError if VTK is not installed; the other files are
        written all the same. Firedrake runs code that it finds in a CheckpointFile: open none of a stranger's.
        """
        self._check_some()
        folder, comm = check_path(folder, "folder"), self.V.comm
        chosen = self if count is None else self[:check_count(count, "count")]
        arrays = {"key": gather_keys(self.V), "values": gather_rows(self.V, chosen.values),
                  "latents": np.asarray(chosen.latents, dtype=float)}

        values = {"element": element_of(self.V), "certificate": pack_certificate(self.certificate)}

        def write():
            files.make_folder(folder)
            files.write(folder / _FILE, "samples", arrays, values)
        on_root(comm, write)
        for i in range(len(self.V)):
            part = self.component(i)
            if part.V.ufl_element().family() != "Real":
                part._export(folder / f"component_{i}" if len(self.V) > 1 else folder, min(_VIEWED, len(chosen)))

    def _export(self, folder: Path, count: int) -> None:
        """Write summaries and some samples for other programs."""
        summary = [self.mean(), *([self.std()] if len(self) > 1 else []), self.quantile(0.025), self.quantile(0.975)]
        write_checkpoint(folder / "samples.h5", [*summary, *self[:count]])
        write_vtk(folder / "summary.pvd", summary)

    def _check_some(self) -> None:
        if not len(self):
            raise InputError("There are no samples: choose at least one.")

    def plot(self, axes: Any = None, truth: Function | None = None, **kwargs: Any) -> Any:
        """Draw the samples; see `fem_diffusion.plot.plot_samples`."""
        from fem_diffusion.plot import plot_samples

        self._check_some()
        return plot_samples(self, axes=axes, truth=truth, **kwargs)


def load_samples(folder: str | os.PathLike, V: WithGeometry) -> Samples:
    """Read what `Samples.save` wrote, on any number of ranks; no code in the file is run.

    V is the space of the parameter, on the mesh of the samples. FileError is raised if the file is damaged, foreign, or
    belongs to another mesh or space.
    """
    check_kind(V, "V", WithGeometry, "the space of the parameter")
    folder = check_path(folder, "folder")
    if folder.is_file():
        raise InputError(f"{folder} is a file: give the folder that Samples.save wrote.")
    content = read_everywhere(V.comm, folder / _FILE, "samples", "Copy it again, or sample anew.")
    columns = own_columns(content, "key", "element", V)
    values = content.array("values", None, len(content.arrays["key"]))
    return Samples(V, values[:, columns], content.array("latents", len(values), None),
                   unpack_certificate(content, "certificate"))
