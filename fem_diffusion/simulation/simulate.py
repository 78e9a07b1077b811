"""Joint samples of parameter and observation, written block by block to a resumable data set."""

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from firedrake import Ensemble, Function
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from tqdm import tqdm

from fem_diffusion.simulation.data_set import Block, Folder
from fem_diffusion.simulation.solves import Job, Solved, Tally, block_seed, check_lengths, check_share
from fem_diffusion.checks import check_choice, check_count, check_flag, check_kind, check_number, check_seed, together
from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields.coefficients import field, on_root, owned_size, require_real
from fem_diffusion.observation.linear import no_sensors
from fem_diffusion.prior.protocol import check_prior

__all__ = ["DataSet", "SkippedWarning", "load_pairs", "simulate", "simulated_parameter"]


class SkippedWarning(UserWarning):
    """Samples whose solve failed are missing in a data set, which conditions the prior on success."""


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
    skipped : tuple of (int, str)
        Number and reason of each sample that is missing because its solve failed; `simulated_parameter` gives its
        parameter.
    """

    fields: np.ndarray
    observations: np.ndarray
    states: np.ndarray | None = None
    skipped: tuple = ()

    def __len__(self) -> int:
        return len(self.observations)


def simulate(prior, forward: Callable[[Function], Function], observation: Callable, n: int, *, seed: int,
             path: str | os.PathLike | None = None, keep_states: bool = False, block: int = 256,
             ensemble: Ensemble | None = None, on_failure: str = "raise", most_failures: float = 0.1,
             progress: bool = True) -> DataSet:
    """Draw parameters from the prior, solve the forward problem, observe the state.

    Every block of samples has a seed of its own, made from `seed` and its number, so the data do not depend on
    interruptions or on the number of ensemble members. On several ranks an exception of the forward problem has to come
    on all of them; where one rank waits in vain for the others, for 5 minutes or 20 times as long as its own solve
    took, the run is aborted with a message.

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
        there is kept and completed. One run at a time works in a folder. In memory only where left out.
    keep_states : bool
        Keep the states as well.
    block : int
        Samples a block.
    ensemble : firedrake.Ensemble, optional
        Its members share the blocks; the mesh lives on ``ensemble.comm``. Needs `path`.
    on_failure : {"raise", "skip"}
        What to do where the forward problem raises an exception for a sample, or parameter, state or readings are not
        finite: stop, with all finished solves kept; or leave the sample out and record it in `DataSet.skipped`. In a
        folder, "raise" gives samples that were left out another turn.
    most_failures : float
        Share of failed samples above which skipping stops, too.
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
        If an argument is out of range, spaces do not fit, an ensemble comes without `path`, or the observation does not
        give equally many real numbers each time, the same on all ranks.
    DataError
        If the folder holds another data set, or a sample of the prior is not finite.
    FileError
        If a file is damaged or cannot be written, or another run works in the folder.
    SolveError
        If the forward problem fails for a sample, or, where failures are skipped, for too many.

    Warns
    -----
    SkippedWarning
        If samples are missing.
    """
    require_real()
    n, block, seed = check_count(n), check_count(block, "block"), check_seed(seed)
    check_choice(on_failure, "on_failure", ("raise", "skip"))
    most_failures = check_number(most_failures, "most_failures", least=0, most=1)
    keep_states, progress = check_flag(keep_states, "keep_states"), check_flag(progress, "progress")
    if isinstance(observation, WithGeometry):
        observation, keep_states = no_sensors(observation), True
    if not isinstance(ensemble, (Ensemble, type(None))):
        raise InputError(f"ensemble is of type {type(ensemble).__name__}: give a firedrake.Ensemble.")
    if ensemble is not None and path is None:
        raise InputError("An ensemble shares its samples through files: give `path`.")
    _check_spaces(prior, forward, observation, keep_states)
    V, U = prior.core.V, observation.U if keep_states else None
    stop = 0.0 if on_failure == "raise" else most_failures
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(contextlib.closing(Job(prior, forward, observation, seed, keep_states)))
        quiet = not progress or bool(prior.V.comm.rank) or (ensemble is not None and bool(ensemble.ensemble_rank))
        bar = stack.enter_context(tqdm(total=n, desc="simulate", disable=quiet))
        if path is None:
            blocks = _all_blocks(job, n, block, bar, stop)
            return _told(_joined(blocks, block, n, stop))
        folder = Folder(path, V, U)
        member, members = (0, 1) if ensemble is None else (ensemble.ensemble_rank, ensemble.ensemble_size)
        everyone = V.comm if ensemble is None else ensemble.global_comm
        on_root(everyone, lambda: stack.enter_context(folder.lock()) or folder.clean())
        together(everyone, lambda: member or folder.exists() or folder.create(job.seed, block, *job.probe))
        together(everyone, lambda: _check_former(folder, job, block))
        together(everyone, lambda: _complete(folder, job, n, bar, stop, member, members))
        # Whoever is done waits, because the folder is unlocked by one of all.
        return _told(together(everyone, lambda: _joined(map(folder.read, range(-(-n // block))), block, n, stop)))


def load_pairs(path: str | os.PathLike, V, n: int | None = None, U=None) -> DataSet:
    """Read a data set that `simulate` wrote, on any number of ranks.

    Parameters
    ----------
    path : path
        Its folder.
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the prior's fields, on the same mesh as when the data were written.
    n : int, optional
        Number of samples to read, with those that failed; all where left out.
    U : firedrake.functionspaceimpl.WithGeometry, optional
        Space of the states; they are left out without it.

    Returns
    -------
    DataSet

    Raises
    ------
    InputError
        If n is no positive integer.
    DataError
        If the folder is no data set, is empty or incomplete, or holds no states.
    FileError
        If a file is damaged, or belongs to another mesh, space or data set.

    Warns
    -----
    SkippedWarning
        If samples are missing because their solves failed.
    """
    n = None if n is None else check_count(n)
    check_kind(V, "V", WithGeometry, "the space of the prior's fields")
    folder = Folder(path, V, U)
    folder.open()
    there = folder.blocks()
    if not there:
        raise DataError(f"{folder.path} holds no samples: run simulate(..., path={str(path)!r}) first.")
    last = there[-1] if n is None else (n - 1) // folder.size
    blocks = {i: folder.read(i) for i in there if i <= last}
    n = last * folder.size + blocks[last].count if n is None else n
    wanted = [folder.size] * last + [n - last * folder.size]
    if any(i not in blocks or blocks[i].count < count for i, count in enumerate(wanted)):
        raise DataError(f"{folder.path} holds {sum(block.count for block in blocks.values())} of {n} pairs: run "
                        "simulate again to complete it.")
    return _told(_joined(blocks.values(), folder.size, n, most=1.0))


def simulated_parameter(prior, number: int, *, seed: int, block: int = 256) -> Function:
    """The parameter of one sample of `simulate`, for example of one whose solve failed.

    Parameters
    ----------
    prior
        The prior of the simulation.
    number : int
        Of the sample, from 0 on, as in `DataSet.skipped` and in error messages.
    seed, block : int
        As for the simulation.

    Returns
    -------
    firedrake.Function
        In the space of the parameter.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    number, block = check_count(number, "number", least=0), check_count(block, "block")
    index, position = divmod(number, block)
    return field(prior.V, prior.sample_many(position + 1, block_seed(check_seed(seed), index))[position])


def _check_spaces(prior, forward, observation, keep_states) -> None:
    """Raise InputError where prior, forward problem and observation do not follow each other."""
    check_prior(prior)
    for name, ours, theirs in (("prior", prior.V, getattr(forward, "M", prior.V)),
                               ("forward problem", getattr(forward, "state_space", None),
                                getattr(observation, "U", None))):
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(f"The {name} gives Functions in {ours}, but {theirs} is expected next: build prior, "
                             "forward problem and observation on the same spaces.")
    if keep_states and not hasattr(observation, "U"):
        raise InputError("States are kept in the space of an Observation: use point_sensors or functionals.")
    for name, part in (("forward problem", forward), ("observation", observation)):
        if not callable(part):
            raise InputError(f"The {name} is of type {type(part).__name__}: give a callable.")


def _all_blocks(job: Job, n: int, size: int, bar, most: float) -> list[Block]:
    """Blocks in memory."""
    blocks, tally = [], Tally(job.seed, size, n, most)
    for index in range(-(-n // size)):
        blocks.append(_solved_block(job, index, min(size, n - index * size), tally))
        tally.add(index, blocks[-1])
        bar.update(blocks[-1].count)
    return blocks


def _check_former(folder: Folder, job: Job, block: int) -> None:
    """Raise DataError unless the folder holds this very data set."""
    header = folder.open()
    former = {"seed": header.value("seed", int), "block": folder.size,
              "keep_states": header.value("states.element", str, type(None)) is not None}
    wanted = {"seed": job.seed, "block": block, "keep_states": job.keep_states}
    changed = [name for name in wanted if former[name] != wanted[name]]
    if changed:
        raise DataError(f"{folder.path} holds another data set ({', '.join(changed)} differ): name another folder, or "
                        "delete this one.")
    same = all(new.shape == old.shape and _near(new, old) for new, old in zip(job.probe, folder.probe()))
    if not folder.comm.allreduce(same, MPI.LAND):
        raise DataError(f"{folder.path} was simulated with another prior, forward problem or observation, or one of "
                        "them does not repeat itself: name another folder, or delete this one.")


def _near(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether two arrays agree as far as solvers do; a failed solve, NaN, agrees with anything."""
    known = np.isfinite(new) & np.isfinite(old)
    size = np.abs(np.where(known, old, 0.0))
    # Each sensor and coefficient in its own units; the last term is rounding, as of a sensor that sees nothing.
    tolerance = 1e-6 * size + 1e-8 * size.max(axis=0, initial=0.0) + 1e-13 * size.max(initial=0.0)
    return bool((np.abs(new - old)[known] <= tolerance[known]).all())


def _complete(folder: Folder, job: Job, n: int, bar, most: float, member: int, members: int) -> None:
    """Solve what is missing, this ensemble member's share of it."""
    size, there, tally = folder.size, set(folder.blocks()), Tally(job.seed, folder.size, n, most)
    for index in range(-(-n // size)):
        wanted = min(size, n - index * size)
        if index % members == member:
            block = folder.read(index) if index in there else None
            if block is not None and block.failed and tally.stops:
                block = _retried(job, index, block, tally, folder)
            if block is None or block.count < wanted:
                block = _solved_block(job, index, wanted, tally, block, folder)
            tally.add(index, block)
        bar.update(wanted)


def _solved_block(job: Job, index: int, size: int, tally: Tally, former: Block | None = None,
                  folder: Folder | None = None) -> Block:
    """Solve the samples of a block that a former run has not; in a folder, what is solved is kept."""
    fields, parameters = job.draw(index, size)
    start = 0 if former is None else former.count
    if former is not None and not job.prior.V.comm.allreduce(_near(fields[former.rows], former.fields), MPI.LAND):
        raise DataError(f"{folder.file(index)} holds other draws of the prior: name another folder, or delete this.")
    found = Solved()
    try:
        job.solve(parameters[start:], found, start, tally.exceeded)
    except KeyboardInterrupt:
        # On several ranks they are interrupted at different places, and writing needs them all.
        if folder is not None and found.rows and job.prior.V.comm.size == 1:
            folder.write(index, _block(job, fields, found, former, folder))
        raise
    if tally.stops and found.failed:
        # It has another turn in the next run.
        (position, reason), = found.failed.items()
        found.failed = {}
        if folder is not None and found.rows:
            folder.write(index, _block(job, fields, found, former, folder))
        raise tally.error(index, position, reason, folder is not None)
    block = _block(job, fields, found, former, folder)
    if folder is not None:
        folder.write(index, block)
    return block


def _retried(job: Job, index: int, former: Block, tally: Tally, folder: Folder) -> Block:
    """A block with another turn for the samples that a former run has left out; raises where one fails again."""
    fields, parameters = job.draw(index, former.count)
    missing, found = sorted(former.failed), Solved()
    job.solve(parameters[missing], found, 0, tally.exceeded)
    solved = [missing[i] for i in found.rows]
    new = _block(job, fields[missing], found, None, folder)
    order = np.argsort(former.rows + solved)
    parts = [None if a is None else np.concatenate([a, b])[order] for a, b in (
        (former.fields, new.fields), (former.observations, new.observations), (former.states, new.states))]
    block = Block(*parts, former.count, {i: reason for i, reason in former.failed.items() if i not in solved})
    if solved:
        folder.write(index, block)
    if found.failed:
        (place, reason), = found.failed.items()
        raise tally.error(index, missing[place], reason, True)
    return block


def _block(job: Job, fields: np.ndarray, found: Solved, former: Block | None, folder: Folder | None) -> Block:
    """New results as a block, behind those of a former run."""
    known = [] if folder is None else [np.empty(folder.sensors)]
    check_lengths(found.observations + known)
    k = len((found.observations + known or [()])[0])
    # An interruption may have left a result that has no row yet.
    rows = len(found.rows)
    observations = np.array(found.observations[:rows]).reshape(rows, k)
    states = None
    if job.keep_states:
        states = np.array(found.states[:rows]).reshape(rows, owned_size(job.observation.U))
    new = Block(fields[found.rows], observations, states, found.count, found.failed)
    if former is None:
        return new
    if states is not None:
        states = np.concatenate([former.states, states])
    fields, observations = (np.concatenate(parts) for parts in ((former.fields, new.fields),
                                                                (former.observations, observations)))
    return Block(fields, observations, states, former.count + new.count, former.failed | new.failed)


def _joined(blocks, size: int, n: int, most: float) -> DataSet:
    """The first n samples of consecutive blocks."""
    fields, observations, states, skipped = [], [], [], []
    for index, block in enumerate(blocks):
        inside = [i for i, position in enumerate(block.rows) if index * size + position < n]
        skipped += [(index * size + i, reason) for i, reason in block.failed.items() if index * size + i < n]
        if inside:
            fields.append(block.fields[inside])
            observations.append(block.observations[inside])
            states.append(None if block.states is None else block.states[inside])
    check_share([reason for _, reason in skipped], n, most)
    if not fields:
        raise SolveError(f"The forward problem failed for all of {n} samples; the first: {skipped[0][1]}. Mend the "
                         "solver or the prior.")
    check_lengths([x[0] for x in observations])
    return DataSet(np.concatenate(fields), np.concatenate(observations),
                   None if states[0] is None else np.concatenate(states), tuple(skipped))


def _told(data: DataSet) -> DataSet:
    """The same data; warns its reader where samples are missing."""
    missing, n = len(data.skipped), len(data) + len(data.skipped)
    if missing:
        number, reason = data.skipped[0]
        warnings.warn(f"{missing} of {n} samples ({missing / n:.1%}) are missing, because their solves failed (the "
                      f"first: sample {number}, {reason}). What is learned from the others belongs to the prior on "
                      "condition that the solver succeeds. simulate(..., on_failure='raise') in the same folder gives "
                      "them another turn.", SkippedWarning, stacklevel=3)
    return data
