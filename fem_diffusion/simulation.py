"""Joint samples of parameter and observation, written block by block to a resumable HDF5 data set."""

import json
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from firedrake import Ensemble, Function
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from tqdm import tqdm

from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields import coefficients, field, geometric_key, on_root, owned_columns, require_real
from fem_diffusion.problem.observation import no_sensors

__all__ = ["DataSet", "load_pairs", "simulate"]

_FORMAT = "fem_diffusion pairs 1"


@dataclass(frozen=True)
class DataSet:
    """Training pairs.

    Parameters
    ----------
    fields : numpy.ndarray
        Owned coefficients of the prior's fields, before any transform, shape (n, n_owned).
    observations : numpy.ndarray
        Noise-free observations, shape (n, k), global.
    states : numpy.ndarray or None
        Owned coefficients of the states, shape (n, n_owned of U), where they were kept.
    """

    fields: np.ndarray
    observations: np.ndarray
    states: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.observations)


def simulate(prior, forward: Callable[[Function], Function], observation: Callable, n: int, *, seed: int,
             path: str | os.PathLike | None = None, keep_states: bool = False, block: int = 256,
             ensemble: Ensemble | None = None, progress: bool = True) -> DataSet:
    """Draw parameters from the prior, solve the forward problem, observe the state.

    Every block of samples has a seed of its own, made from `seed` and its number, so the data do not depend on
    interruptions or on the number of ensemble members.

    Parameters
    ----------
    prior : GaussianPrior, TransformedPrior, CallablePrior or ProductPrior
        Prior of the parameter.
    forward : Callable
        Maps a parameter Function to a state Function, mixed where there are several of either; where it has a method
        ``solve_many``, blocks of owned coefficients (B, n_owned) are given to that.
    observation : Observation, Callable or firedrake.functionspaceimpl.WithGeometry
        Maps a state Function to k numbers; the space of the states itself to keep the states and observe nothing, for
        a model of many observation operators.
    n : int
        Number of pairs.
    seed : int
        Of all draws.
    path : path, optional
        Folder of the data set; each block is a file, written atomically. What a former run of the same call left
        there is kept and completed. In memory only where left out.
    keep_states : bool
        Keep the states as well.
    block : int
        Samples a block.
    ensemble : firedrake.Ensemble, optional
        Its members share the blocks; the mesh lives on ``ensemble.comm``. Needs `path`.
    progress : bool
        Show a progress bar on rank 0.

    Returns
    -------
    DataSet
        The same on every ensemble member; this rank's part of the coefficients.

    Raises
    ------
    InstallError
        On a complex PETSc build.
    InputError
        If a number is out of range, or an ensemble comes without `path`.
    DataError
        If the folder holds another data set, or a sample is not finite.
    SolveError
        If the forward problem has no solution for a sample.
    """
    require_real()
    try:
        n, block, seed = (operator.index(number) for number in (n, block, seed))
    except TypeError as error:
        raise InputError(f"n, block and seed of simulate are integers ({error}).") from error
    if n < 1 or block < 1 or seed < 0:
        raise InputError(f"simulate needs n >= 1, block >= 1 and seed >= 0, not {n}, {block} and {seed}.")
    if isinstance(observation, WithGeometry):
        observation, keep_states = no_sensors(observation), True
    if ensemble is not None and path is None:
        raise InputError("An ensemble shares its samples through files: give `path`.")
    comm = prior.V.comm
    member, members = (0, 1) if ensemble is None else (ensemble.ensemble_rank, ensemble.ensemble_size)
    blocks = [(i, min(block, n - i * block)) for i in range(-(-n // block))]
    folder = None if path is None else Path(path)
    state_space = getattr(forward, "state_space", None)
    for name, ours, theirs in (("prior", prior.V, getattr(forward, "M", prior.V)),
                               ("forward problem", state_space, getattr(observation, "U", None))):
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(f"The {name} gives Functions in {ours}, but {theirs} is expected next: build prior, "
                             "forward problem and observation on the same spaces.")
    if keep_states and not hasattr(observation, "U"):
        raise InputError("States are kept in the space of an Observation: use point_sensors or functionals.")
    V, U = getattr(prior, "base", prior).V, observation.U if keep_states else None
    header = {"format": _FORMAT, "seed": seed, "block": block, "keep_states": keep_states, "dofs": V.dim()}
    if folder is not None:
        _open_folder(folder, header, comm)
        _check_former(folder, V, prior, forward, observation, seed)
    quiet = not progress or comm.rank or member
    parts = []
    failure = None
    try:
        with tqdm(total=n, desc="simulate", disable=bool(quiet)) as bar:
            for index, size in blocks:
                done = folder is not None and _exists(_block_file(folder, index), size, comm)
                if not done and index % members == member:
                    part = _run_block(prior, forward, observation, size, [seed, index], keep_states)
                    if folder is None:
                        parts.append(part)
                    else:
                        _write(_block_file(folder, index), part, V, U)
                bar.update(size)
    except Exception as error:
        failure = error
    # Members wait for each other, so a failure of one has to reach all.
    failures = [failure] if ensemble is None else ensemble.global_comm.allgather(failure)
    for error in failures:
        if error is not None:
            raise error
    if folder is None:
        return _join(parts)
    return load_pairs(folder, V, n, U)


def load_pairs(path: str | os.PathLike, V, n: int | None = None, U=None) -> DataSet:
    """Read a data set that `simulate` wrote, on any number of ranks.

    Parameters
    ----------
    path : path
        Its folder.
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the prior's fields, on the same mesh as when the data were written.
    n : int, optional
        Number of pairs to read; all where left out.
    U : firedrake.functionspaceimpl.WithGeometry, optional
        Space of the states; they are left out without it.

    Returns
    -------
    DataSet

    Raises
    ------
    DataError
        If the folder is empty, incomplete, inconsistent, holds no states, or belongs to another mesh or space.
    """
    folder = Path(path)
    header = _read_header(folder)
    if U is not None and not header["keep_states"]:
        raise DataError(f"{folder} holds no states: simulate with keep_states=True in another folder.")
    count = len(list(folder.glob("block-*.h5"))) if n is None else -(-n // header["block"])
    if count == 0:
        raise DataError(f"{folder} holds no samples: run simulate(..., path={str(folder)!r}) first.")
    data = _join([_read(_block_file(folder, index), V, U) for index in range(count)])
    if n is not None and len(data) < n:
        raise DataError(f"{folder} holds {len(data)} of {n} pairs: run simulate again to complete it.")
    return data if n is None else DataSet(data.fields[:n], data.observations[:n],
                                          None if data.states is None else data.states[:n])


def _run_block(prior, forward, observation, size: int, seed: list[int], keep_states: bool) -> DataSet:
    """Draw, solve and observe one block."""
    # A SeedSequence spreads the pair (seed, block) over 32 bits without overlap between neighbours.
    block_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    gaussian = getattr(prior, "base", prior)
    fields = gaussian.sample_many(size, block_seed)
    parameters = fields if gaussian is prior else prior.transform_many(fields)
    many = getattr(forward, "solve_many", None)
    if many is not None and hasattr(observation, "apply"):
        states = many(parameters)
        observations = observation.apply(states)
    else:
        states, observations = [], []
        for values in parameters:
            state = forward(field(prior.V, values))
            observations.append(np.atleast_1d(np.asarray(observation(state), dtype=float)))
            if keep_states:
                states.append(coefficients(state))
        states, observations = np.array(states), np.stack(observations)
    parts = (fields, observations, states) if keep_states else (fields, observations)
    broken = sum(~np.isfinite(part).all(axis=1) for part in parts)
    bad = np.flatnonzero(prior.V.comm.allreduce(broken, MPI.SUM))
    if len(bad):
        raise DataError(f"Samples {bad.tolist()} of block {seed[1]} (seed {seed[0]}) are not finite; check prior and "
                        "forward problem there. Finished blocks are kept.")
    return DataSet(fields, observations, states if keep_states else None)


def _join(parts: list[DataSet]) -> DataSet:
    if len({part.observations.shape[1] for part in parts}) != 1:
        raise DataError("Blocks of the data set differ in their number of sensors: delete its folder, simulate anew.")
    states = None if parts[0].states is None else np.concatenate([part.states for part in parts])
    return DataSet(np.concatenate([p.fields for p in parts]), np.concatenate([p.observations for p in parts]), states)


def _block_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.h5"


def _open_folder(folder: Path, header: dict, comm) -> None:
    """Write the header of a new data set, or check that the folder continues this one."""
    def write():
        if not (folder / "header.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"header.json.partial{os.getpid()}"
            partial.write_text(json.dumps(header))
            partial.replace(folder / "header.json")
    on_root(comm, write)
    former = _read_header(folder)
    changed = [key for key in header if former.get(key) != header[key]]
    if changed:
        raise DataError(f"{folder} holds another data set ({', '.join(changed)} differ): name another folder, "
                        "or delete this one.")


def _read_header(folder: Path) -> dict:
    try:
        header = json.loads((folder / "header.json").read_text())
        valid = header["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no data set of fem_diffusion ({error}): name one that simulate wrote.") from error
    if not valid:
        raise DataError(f"{folder} is of format {header['format']!r}, this version reads {_FORMAT!r}: simulate anew.")
    return header


def _check_former(folder: Path, V, prior, forward, observation, seed: int) -> None:
    """Simulate the first block again: a changed prior, forward problem or sensor shows at once."""
    first = _block_file(folder, 0)
    if not V.comm.bcast(first.exists()):
        return
    former = _read(first, V, None)
    again = _run_block(prior, forward, observation, len(former), [seed, 0], False)
    same = again.observations.shape == former.observations.shape
    for new, old in ((again.fields, former.fields), (again.observations, former.observations)):
        same = same and np.allclose(new, old, rtol=1e-6, atol=1e-8 * max(np.abs(old).max(initial=0.0), 1e-300))
    if not V.comm.allreduce(bool(same), MPI.LAND):
        raise DataError(f"{folder} was simulated with another prior, forward problem or observation: name another "
                        "folder, or delete this one.")


def _exists(file: Path, size: int, comm) -> bool:
    """True on all ranks where the block is there with at least `size` samples; a shorter one is made again."""
    def look():
        if not file.exists():
            return False
        try:
            with h5py.File(file, "r") as h5:
                return len(h5["observations"]) >= size
        except (OSError, KeyError) as error:
            raise DataError(f"{file} is damaged ({error}): delete that file and run simulate again.") from error
    return on_root(comm, look)


def _write(file: Path, part: DataSet, V, U) -> None:
    """Gather a block on rank 0 of the mesh and write it, whole or not at all."""
    gathered = {}
    for name, values, space in (("fields", part.fields, V), ("states", part.states, U)):
        if values is not None:
            gathered[name], gathered[f"{name}_key"] = V.comm.gather(values), V.comm.gather(geometric_key(space))

    def write():
        partial = file.with_suffix(".partial")
        with h5py.File(partial, "w") as h5:
            h5["observations"] = part.observations
            for name, parts in gathered.items():
                h5[name] = np.concatenate(parts, axis=-1)
        partial.replace(file)
    on_root(V.comm, write)


def _read(file: Path, V, U) -> DataSet:
    """This rank's part of one block."""
    columns = {"fields": V} if U is None else {"fields": V, "states": U}
    problem, part = None, {}
    try:
        with h5py.File(file, "r") as h5:
            part["observations"] = h5["observations"][:]
            for name in columns:
                part[name], part[f"{name}_key"] = h5[name][:], h5[f"{name}_key"][:]
                if part[name].shape != (len(part["observations"]), len(part[f"{name}_key"])):
                    raise ValueError(f"{name} of shape {part[name].shape}, {len(part['observations'])} observations")
        if not all(np.isfinite(x).all() for x in part.values()):
            raise ValueError("values that are not finite")
    except (OSError, KeyError, ValueError) as error:
        problem = error
    if any(V.comm.allgather(problem is not None)):
        raise DataError(f"{file} is damaged ({problem}): delete that file and run simulate again.") from problem
    chosen = {name: part[name][:, _columns(part[f"{name}_key"], space, file)] for name, space in columns.items()}
    return DataSet(observations=part["observations"], **chosen)


def _columns(stored: np.ndarray, V, file: Path) -> np.ndarray:
    """Columns of a file that hold this rank's degrees of freedom, shape (n_owned,)."""
    columns = owned_columns(stored, V)
    if columns is None:
        raise DataError(f"{file} belongs to another mesh or space: use those of the simulation, or simulate anew.")
    return columns
