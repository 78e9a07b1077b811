"""Joint samples of parameter and readings, block by block; in a folder they are kept, whatever stops a run."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable

import numpy as np
from firedrake import Ensemble, Function
from firedrake.adjoint import stop_annotating
from mpi4py import MPI

from fem_diffusion.checks import alike, check_count, check_flag, check_number, check_seed, together
from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.checks import check_ensemble
from fem_diffusion.fields.coefficients import field, on_root, owned_size, require_real
from fem_diffusion.fields.events import event
from fem_diffusion.forward.blocks import SkippedWarning
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.problem import InverseProblem, check_problem
from fem_diffusion.progress import LOG, bar
from fem_diffusion.simulation.data_set import Block, DataSet, Folder
from fem_diffusion.simulation.solves import Job, Solved, Tally, block_seed, check_lengths

__all__ = ["DataSet", "load_pairs", "simulate", "simulated_parameter"]

# What the parts of a block are called in a data set.
_PARTS = "coefficients", "readings", "states", "derivatives"


def simulate(problem: InverseProblem, n: int, *, seed: int, path: str | os.PathLike | None = None,
             keep_states: bool | None = None, derivatives: bool | ModalBasis = False, block: int = 256,
             ensemble: Ensemble | None = None, skip: float = 0.0, progress: bool = True) -> DataSet:
    """Draw parameters from the prior, solve the forward problem, observe the state.

    Every block of samples has a seed of its own, made from `seed` and its number, so the data do not depend on
    interruptions or on the number of ensemble members. On several ranks an exception of the forward problem has to come
    on all of them; where one rank waits in vain for the others, for 5 minutes or 20 times as long as its own solve
    took, the run is aborted with a message.

    Parameters
    ----------
    problem : InverseProblem
        Of a family nothing is observed: the states are the data.
    n, seed : int
        Number of pairs, and the seed of all draws.
    path : path, optional
        Folder of the data set; each block is a file, written atomically. What a former run of the same call left
        there is kept and completed. One run at a time works in a folder. In memory only where left out.
    keep_states : bool, optional
        Keep the states as well; where left out, for a family only.
    derivatives : bool or ModalBasis
        Keep the derivative of the readings by the latents as well, which `fit` learns from: then a few hundred pairs
        do what takes thousands without. k adjoint solves a sample, of fixed sensors, with the factorisation of its
        solve where the solver is one of ours. Latents are those of ``karhunen_loeve(problem.prior)``, or of a basis.
    block : int
        Samples a block.
    ensemble : firedrake.Ensemble, optional
        Its members share the blocks; the mesh lives on ``ensemble.comm``. Needs `path`.
    skip : float
        Share of samples that may be left out because the forward problem raises an exception, or parameter, state or
        readings are not finite; they are recorded in `DataSet.skipped`. With more of them the run stops, without any
        leave at the first one, with all finished solves kept; in a folder, those left out have another turn then.

    Returns
    -------
    DataSet
        The same on every ensemble member; this rank's part of the coefficients. SkippedWarning tells of missing ones.

    Raises
    ------
    InputError
        If an argument is out of range, an ensemble comes without `path`, or the observation does not give equally many
        real numbers each time, the same on all ranks, or solver, sensors or the prior's transform have no derivative
        where it is asked for; InstallError on a complex PETSc build.
    DataError
        If the folder holds another data set, or a sample of the prior is not finite; FileError if a file is damaged or
        cannot be written, or another run works in the folder.
    SolveError
        If the forward problem fails for more samples than may be left out.
    """
    require_real()
    check_problem(problem)
    everyone = problem.comm if ensemble is None else check_ensemble(ensemble).global_comm
    n, block, seed, skip = alike(everyone, lambda: {
        "n": check_count(n), "block": check_count(block, "block"), "seed": check_seed(seed),
        "skip": check_number(skip, "skip", least=0, most=1)})
    progress = check_flag(progress, "progress")
    keep_states = problem.family if keep_states is None else check_flag(keep_states, "keep_states")
    if (keep_states or problem.family) and problem.U is None:
        raise InputError("The space of the states is not known: give the solver as CallableForward(solver, M, U).")
    if ensemble is not None and path is None:
        raise InputError("An ensemble shares its samples through files: give `path`.")
    member, members = (0, 1) if ensemble is None else (ensemble.ensemble_rank, ensemble.ensemble_size)
    with event("simulate"), stop_annotating(), contextlib.ExitStack() as stack:
        folder = None if path is None else Folder(path, problem.V, problem.U)
        if folder is not None:
            opened = folder
            on_root(everyone, lambda: stack.enter_context(opened.lock()) or opened.clean())
        basis = _modes(problem, derivatives, folder, member, everyone)
        job = stack.enter_context(contextlib.closing(Job(problem, seed, keep_states, basis)))
        shown = stack.enter_context(bar(n, "simulate", progress and not problem.comm.rank and not member))
        LOG.info("simulate: %s samples, seed %s, %s", n, seed, "in memory" if path is None else f"in {path}")
        tally = Tally(seed, block, n, skip)
        if folder is None:
            job.compare()
            blocks = _advance(job, n, shown.update, tally)
            return _told(_joined((blocks.pop(0) for _ in range(len(blocks))), tally, basis))
        together(everyone, lambda: member or folder.exists() or job.compare() or folder.create(
            seed, block, keep_states, basis and basis.r, *job.probe))
        together(everyone, lambda: _check_former(folder, job, block))
        together(everyone, lambda: _advance(job, n, shown.update, tally, folder, member, members))
        # Whoever is done waits, because the folder is unlocked by one of all.
        return _told(together(everyone, lambda: _joined(map(folder.read, range(-(-n // block))), tally, basis)))


def load_pairs(path: str | os.PathLike, problem: InverseProblem, n: int | None = None) -> DataSet:
    """Read a data set that `simulate` wrote of the same problem, with states where they were kept, on any ranks.

    Of n samples, all where left out, those that failed are counted, and SkippedWarning tells of them. Two of them are
    solved again, to see that prior, forward problem and sensors are still the same, unless the solver draws the noise
    of its readings; a warning tells where it fails. DataError where they are not, or the folder is no data set, is
    empty or incomplete; FileError if a file is damaged, or belongs to another mesh, space or data set.
    """
    check_problem(problem)
    n, = alike(problem.comm, lambda: {"n": None if n is None else check_count(n)})
    folder = Folder(path, problem.V, problem.U)
    folder.open()
    k, found = 0 if problem.family else problem.k, folder.readings.shape[1]
    if k not in (None, found):
        raise DataError(f"{folder.path} holds {found} readings of each sample, and the problem has {k}: pass the "
                        "problem that was simulated.")
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
    with stop_annotating(), contextlib.closing(Job(problem, folder.seed, folder.states)) as job:
        try:
            together(problem.comm, lambda: _check_same(folder, job))
        except SolveError as error:
            warnings.warn(f"Whether {folder.path} is of this problem cannot be told: {error}", stacklevel=2)
    basis = folder.modes(problem.prior) if folder.derivatives else None
    return _told(_joined(blocks.values(), Tally(folder.seed, folder.size, n, 1.0), basis))


def simulated_parameter(problem: InverseProblem, number: int, *, seed: int, block: int = 256) -> Function:
    """The parameter of one sample of `simulate`, for example of one whose solve failed, with the same seed and block.

    The number is that of `DataSet.skipped` and of error messages, from 0 on.
    """
    check_problem(problem)
    number, block, seed = alike(problem.comm, lambda: {
        "number": check_count(number, "number", least=0), "block": check_count(block, "block"),
        "seed": check_seed(seed)})
    index, position = divmod(number, block)
    fields = problem.prior.core.sample_many(position + 1, block_seed(seed, index))
    return field(problem.M, problem.prior.transform_many(fields[position:])[0])


def _modes(problem: InverseProblem, derivatives: bool | ModalBasis, folder: Folder | None, member: int,
           everyone: MPI.Comm) -> ModalBasis | None:
    """The modes whose latents derivatives are by; None where there are to be none."""
    given = derivatives if isinstance(derivatives, ModalBasis) else None
    if given is None and not check_flag(derivatives, "derivatives"):
        return None
    problem.differentiable()
    if given is not None and given.V != problem.V:
        raise InputError("The basis of derivatives is not in the space of the prior's fields: give "
                         "karhunen_loeve(problem.prior).")
    basis = karhunen_loeve(problem.prior) if given is None else given
    if folder is None:
        return basis

    def keep() -> None:
        if folder.exists():
            folder.open()
            if not folder.derivatives:
                raise _other(folder, ["derivatives"])
        if not member:
            folder.keep_modes(basis)
    # Signs of modes are those of a run: what is in the folder counts, for all members.
    together(everyone, keep)
    kept = together(everyone, lambda: folder.modes(problem.prior))
    if given is not None and not folder.comm.allreduce(_near(given.scaled_modes, kept.scaled_modes), MPI.LAND):
        raise DataError(f"{folder.path} holds other modes than those of the basis: name another folder.")
    return kept


def _check_former(folder: Folder, job: Job, block: int) -> None:
    """Raise DataError unless the folder holds this very data set."""
    folder.open()
    changed = [name for name, former, wanted in (
        ("seed", folder.seed, job.seed), ("block", folder.size, block), ("keep_states", folder.states, job.keep_states),
        ("derivatives", folder.derivatives, job.basis is not None))
        if former != wanted]
    if changed:
        raise _other(folder, changed)
    _check_same(folder, job)


def _other(folder: Folder, changed: list[str]) -> DataError:
    return DataError(f"{folder.path} holds a data set with other {' and '.join(changed)}: name another folder, or "
                     "delete this one.")


def _check_same(folder: Folder, job: Job) -> None:
    """Raise DataError unless the first samples are those of the folder, and read what they read there."""
    def agree(new: np.ndarray, old: np.ndarray) -> bool:
        return folder.comm.allreduce(_near(new, old), MPI.LAND)
    fields, readings = job.probe
    same = agree(fields, folder.coefficients)
    if same and not agree(readings, folder.readings):
        # A solver that draws its readings' noise gives others each time.
        same = job.problem.noise is None and not agree(job.look()[1], readings)
    if not same:
        raise DataError(f"{folder.path} was simulated with another prior, forward problem or observation, or one of "
                        "them does not repeat itself: pass the problem that was simulated, or name another folder.")


def _near(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether two arrays agree as far as solvers do; a failed solve, NaN, agrees with anything."""
    if new.shape != old.shape:
        return False
    known = np.isfinite(new) & np.isfinite(old)
    size = np.abs(np.where(known, old, 0.0))
    # Each sensor and coefficient in its own units; the last term is rounding, as of a sensor that sees nothing.
    tolerance = 1e-6 * size + 1e-8 * size.max(axis=0, initial=0.0) + 1e-13 * size.max(initial=0.0)
    return bool((np.abs(new - old)[known] <= tolerance[known]).all())


def _advance(job: Job, n: int, show: Callable, tally: Tally, folder: Folder | None = None, member: int = 0,
             members: int = 1) -> list[Block]:
    """Solve what is missing, this ensemble member's share of it; blocks are returned where there is no folder."""
    blocks, there = [], () if folder is None else set(folder.blocks())
    for index in range(-(-n // tally.size)):
        wanted = min(tally.size, n - index * tally.size)
        if index % members == member:
            block = folder.read(index) if folder is not None and index in there else None
            if block is None or block.count < wanted or (block.failed and tally.stops):
                block = _turn(job, index, wanted, block, tally, folder)
            tally.add(index, block)
            if folder is None:
                blocks.append(block)
        show(wanted)
    return blocks


def _turn(job: Job, index: int, wanted: int, former: Block | None, tally: Tally, folder: Folder | None) -> Block:
    """A block with the samples that have had no turn, and those that have failed where none may.

    In a folder, what is solved is kept, whatever stops the rest.
    """
    done = 0 if former is None else former.count
    fields = job.draw(index, max(done, wanted))
    if former is not None and folder is not None and not job.problem.comm.allreduce(
            _near(fields[former.rows], former.coefficients), MPI.LAND):
        raise DataError(f"{folder.file(index)} holds other draws of the prior: name another folder, or delete this.")
    again = sorted(former.failed) if former is not None and tally.stops else []
    turn, found = [*again, *range(done, wanted)], Solved()

    def keep() -> Block:
        block = _merged(job, fields, found, former, folder)
        if folder is not None and block.count:
            folder.write(index, block)
        return block
    try:
        job.solve(fields, turn, found, tally.exceeded)
    except KeyboardInterrupt:
        # On several ranks they are interrupted at different places, and writing needs them all.
        if job.problem.comm.size == 1:
            keep()
        raise
    if tally.stops and found.failed:
        # A sample that has failed before keeps its reason; a new one has another turn in the next run.
        (position, reason), = found.failed.items()
        found.failed = {}
        if found.results:
            keep()
        raise tally.error(index, position, reason, folder is not None)
    return keep()


def _merged(job: Job, fields: np.ndarray, found: Solved, former: Block | None, folder: Folder | None) -> Block:
    """New results as a block, with those of a former run."""
    rows = sorted(found.results)
    states, readings = [found.results[i][0] for i in rows], [found.results[i][1] for i in rows]
    known = [] if folder is None else [folder.readings[0]]
    check_lengths(readings + known)
    k = next((len(x) for x in readings + known), 0)
    failed, count, order = dict(found.failed), max([*rows, *found.failed, -1]) + 1, np.arange(len(rows))
    old = 4 * (None,)
    if former is not None:
        old, order, count = former.parts, np.argsort(former.rows + rows), max(count, former.count)
        failed |= {i: reason for i, reason in former.failed.items() if i not in rows}

    def both(old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
        return new if old is None else np.concatenate([old, new])[order]
    # Without a copy where nothing is left out.
    return Block(both(old[0], fields if rows == list(range(len(fields))) else fields[rows]),
                 both(old[1], np.array(readings).reshape(len(rows), k)),
                 both(old[2], np.array(states).reshape(len(rows), owned_size(job.problem.U))) if job.keep_states
                 else None, count, failed,
                 both(old[3], np.array([found.results[i][2] for i in rows]).reshape(len(rows), k, job.basis.r))
                 if job.basis is not None else None)


def _joined(blocks: Iterable[Block], tally: Tally, basis: ModalBasis | None) -> DataSet:
    """The first samples of consecutive blocks, as many as the tally wants; derivatives are by latents of the basis.

    Blocks are taken one by one and let go, so that they are not in memory twice.
    """
    whole: dict[str, np.ndarray] = {}
    kept, skipped, n = 0, [], tally.n
    for index, block in enumerate(blocks):
        start = index * tally.size
        inside = [i for i, position in enumerate(block.rows) if start + position < n]
        skipped += [(start + i, reason) for i, reason in sorted(block.failed.items()) if start + i < n]
        parts = {name: part for name, part in zip(_PARTS, block.parts) if part is not None}
        if len(inside) == n:   # all there is
            whole, kept = parts, n
        elif inside:
            # Memory counts where it is written to.
            whole = whole or {name: np.empty((n, *part.shape[1:])) for name, part in parts.items()}
            check_lengths([whole["readings"][0], block.readings[0]])
            for name, part in parts.items():
                whole[name][kept:kept + len(inside)] = part[inside]
            kept += len(inside)
    tally.check([reason for _, reason in skipped], n)
    if not kept:
        raise SolveError(f"The forward problem failed for all of {n} samples; the first: {skipped[0][1]}. Mend the "
                         "solver or the prior.")
    whole = {name: part[:kept] for name, part in whole.items()}
    return DataSet(whole["coefficients"], whole["readings"], whole.get("states"), tuple(skipped),
                   derivatives=whole.get("derivatives"), basis=basis)


def _told(data: DataSet) -> DataSet:
    """The same data; warns its reader where samples are missing."""
    missing, n = len(data.skipped), len(data) + len(data.skipped)
    if missing:
        number, reason = data.skipped[0]
        warnings.warn(f"{missing} of {n} samples ({missing / n:.1%}) are missing, because their solves failed (the "
                      f"first: sample {number}, {reason}). What is learned from the others belongs to the prior on "
                      "condition that the solver succeeds. simulate(..., skip=0) in the same folder gives them another "
                      "turn.", SkippedWarning, stacklevel=3)
    return data
