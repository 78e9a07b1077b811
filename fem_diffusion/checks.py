"""Checks of arguments at the door, for every room: each returns the value in one type or raises InputError.

No Firedrake and no torch at import.
"""

import argparse
import contextlib
import inspect
import os
import pickle
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import numpy as np

from fem_diffusion.errors import FileError, InputError, InstallError

if TYPE_CHECKING:
    import torch
    from mpi4py.MPI import Comm

__all__ = ["LARGEST", "MISTAKES", "alike", "check_all", "check_array", "check_callable", "check_choice",
           "check_choices", "check_count", "check_device", "check_file", "check_flag", "check_kind", "check_number",
           "check_options", "check_path", "check_readings", "check_seed", "check_text", "portable", "read_arguments",
           "shape_fits", "shape_words", "stream", "together"]

LARGEST = 1e100   # beyond, sums of squares leave the range of double precision
# What every further solve would repeat: never a failure of one solve.
MISTAKES = (InputError, FileError, InstallError)
# A rank that is done waits so long for the others, in seconds, and in units of its own time: then they hang.
_PATIENCE, _TIMES = 300.0, 20.0

T = TypeVar("T")


def shape_fits(shape: Collection[int], wanted: tuple) -> bool:
    """Whether a shape is the wanted one, of numbers and of words that each stand for one number."""
    words = {}
    return len(shape) == len(wanted) and all(
        n == (words.setdefault(want, n) if isinstance(want, str) else want) for n, want in zip(shape, wanted))


def shape_words(wanted: tuple) -> str:
    """A wanted shape for messages: (n, r)."""
    return f"({', '.join(map(str, wanted))}{',' * (len(wanted) == 1)})"


def check_all(x: Any, name: str, kind: type[T], words: str | None = None) -> tuple[T, ...]:
    """Several objects of one class, as a tuple; `words` say what they are where the class does not."""
    words, items = words or kind.__name__, None
    if np.iterable(x) and not isinstance(x, (str, bytes, Mapping, Set)):   # sets have no order
        with contextlib.suppress(TypeError, NotImplementedError):   # UFL expressions and Constants only look iterable
            items = tuple(x)
    if items is None:
        raise InputError(f"{name} is {x!r}: give a sequence of {words}.")
    if not all(isinstance(item, kind) for item in items):
        found = sorted({type(item).__name__ for item in items})
        raise InputError(f"{name} holds {', '.join(found)}: give a sequence of {words}.")
    return items


def check_array(x: Any, name: str, *shapes: tuple, names: Sequence[str] | None = None) -> np.ndarray:
    """A copy in double precision of finite real numbers whose squares do not overflow, of one of several shapes.

    Shapes hold numbers, and words that each stand for one number: ("n", "r"). Messages use the names of the entries
    along the last axis, where they are given, or the numbers of the rows of a matrix. Without a shape any will do.
    """
    wanted = " or ".join(map(shape_words, dict.fromkeys(shapes))) or "(n,)"
    if np.ma.is_masked(x):
        raise InputError(f"{name} has masked values, which are no numbers: leave them out, or fill them.")
    if hasattr(x, "ufl_shape"):   # NumPy would take entries of a UFL expression without end
        raise InputError(f"{name} holds object values, of type {type(x).__name__}: give numbers of shape {wanted}.")
    try:
        array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{name} is no array of numbers ({error}): give one of shape {wanted}.") from error
    if array.dtype.kind not in "fiu":
        remedy = "give real and imaginary parts by themselves" if array.dtype.kind == "c" else "give real numbers"
        raise InputError(f"{name} holds {array.dtype} values: {remedy}.")
    if shapes and not any(shape_fits(array.shape, shape) for shape in shapes):
        raise InputError(f"{name} has the shape {array.shape}: give {wanted}.")
    array = array.astype(float)   # first, because the bound is beyond single precision
    wild = ~(np.abs(array) <= LARGEST)
    if wild.any():
        of = f" in rows {np.flatnonzero(wild.any(axis=1))[:5].tolist()}" if array.ndim == 2 and names is None else ""
        if names is not None and array.ndim:
            of = f" of {', '.join(str(names[i]) for i in np.unique(np.nonzero(wild)[-1]))}"
        raise InputError(f"{name} holds values{of} that are not finite, or beyond {LARGEST:g}: leave those out, mend "
                         "where they come from, or take other units.")
    return array


def check_seed(seed: Any, name: str = "seed") -> int:
    """A non-negative integer, Python's or NumPy's."""
    if not isinstance(seed, Integral) or isinstance(seed, (bool, np.bool_)) or seed < 0:
        raise InputError(f"{name} is {seed!r}: give a non-negative integer, so that the draw can be repeated.")
    return int(seed)


def stream(seed: int, purpose: str) -> int:
    """The seed of one use of a user's seed: draws for other purposes are independent of it."""
    return int(np.random.SeedSequence([seed, crc32(purpose.encode())]).generate_state(1, np.uint64)[0] >> 1)


def check_count(n: Any, name: str = "n", least: int = 1) -> int:
    """An integer of at least `least`, Python's or NumPy's."""
    if not isinstance(n, Integral) or isinstance(n, (bool, np.bool_)) or not least <= int(n) <= sys.maxsize:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise InputError(f"{name} is {n!r}: give {kind}.")
    return int(n)


def check_number(x: Any, name: str, above: float = -np.inf, least: float = -np.inf, below: float = np.inf,
                 most: float = np.inf) -> float:
    """A finite real number with above < x < below and least <= x <= most."""
    try:
        value = float(x) if isinstance(x, Real) and not isinstance(x, (bool, np.bool_)) else None
    except OverflowError:   # an integer beyond the range of double precision
        value = np.inf
    if value is None or not (np.isfinite(value) and above < value < below and least <= value <= most):
        # Bounds that keep arithmetic from overflowing are told to those alone who reach them.
        reach = max(LARGEST, abs(value or 0))
        words = {"above": above, "at least": least, "below": below, "at most": most}
        bounds = [f"{word} {bound:g}" for word, bound in words.items() if abs(bound) < reach]
        raise InputError(f"{name} is {x if value is None else value!r}: give a number that is "
                         f"{' and '.join(bounds) or 'finite'}.")
    return value


def check_flag(x: Any, name: str) -> bool:
    """True or False; a word like "no" would count as true."""
    if not isinstance(x, (bool, np.bool_)):
        raise InputError(f"{name} is {x!r}: give True or False.")
    return bool(x)


def check_choice(x: Any, name: str, choices: Collection[str]) -> str:
    """One of several words."""
    if not isinstance(x, str) or x not in choices:
        raise InputError(f"{name} is {x!r}: choose one of {', '.join(map(repr, choices))}.")
    return x


def check_readings(y: Any, count: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Readings of `count` sensors as floats, shape (count,): real and of a size with which one can calculate.

    NaN stands for a sensor that failed, and so does a mask. Messages use the names of the sensors, or their numbers.
    """
    try:
        # What is behind a mask is no reading.
        array = np.ma.filled(y.astype(float), np.nan) if isinstance(y, np.ma.MaskedArray) else np.asarray(y)
    except ValueError:      # rows of unlike lengths
        array = np.empty(0, dtype=object)
    if array.shape != (count,) or (array.dtype.kind not in "biuf" and count):
        raise InputError(f"y has shape {array.shape} and type {array.dtype}: give a real number for each of the "
                         f"{count} sensors.")
    y = array.astype(float)
    if len(bad := np.flatnonzero(~(np.abs(y) <= LARGEST) & ~np.isnan(y))):
        which = ", ".join(f"{i if names is None else names[i]} ({y[i]:g})" for i in bad[:5])
        raise InputError(f"Readings are not finite or too large to calculate with: sensor {which}"
                         f"{' and others' if len(bad) > 5 else ''}. Repair them, choose other units, or "
                         "give NaN for a sensor that failed.")
    return y


def check_path(path: Any, name: str = "path") -> Path:
    """A path as such; a number, say, would open whatever has that number."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "\0" in str(path):
        raise InputError(f"{name} is {path!r}: give the name of a file or folder.")
    return Path(path).absolute()   # as seen from here: a solver of the user's own may change the folder


def check_choices(index: Any, n: int, words: str) -> np.ndarray:
    """Numbers of some of n things, at least one, by a slice, a mask or a sequence of integers."""
    try:
        chosen = np.arange(n)[index if isinstance(index, slice) else np.asarray(index)]
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(f"There are {n} {words}, and no such choice of them ({error}): give a slice, a mask of that "
                         "length, or their numbers.") from error
    if chosen.ndim != 1 or not len(chosen):
        raise InputError(f"The choice of {words} is empty, or no flat list: give a slice, a mask or numbers that keep "
                         "at least one.")
    return chosen


def check_options(x: Any, kind: type[T], name: str = "options") -> T:
    """An object of a class of settings; a dict of them is a frequent mistake."""
    if not isinstance(x, kind) or not is_dataclass(x):
        inside = f"**{name}" if isinstance(x, dict) else "..."
        raise InputError(f"{name} is of type {type(x).__name__}: pass {kind.__name__}({inside}).")
    return x


def check_device(device: "str | torch.device") -> "torch.device":
    """A torch device that is there."""
    import torch
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {str(device)!r}, which torch cannot use here ({str(error).splitlines()[0]}): take "
                         "'cpu', or a device that this machine has.") from error
    return device


def check_kind(x: Any, name: str, kind: type[T] | tuple[type[T], ...], remedy: str) -> T:
    """An object of a class, or of one of several."""
    if not isinstance(x, kind):
        raise InputError(f"{name} is of type {type(x).__name__}: give {remedy}.")
    return x


def check_text(x: Any, name: str) -> str:
    """A string, such as a label."""
    return check_kind(x, name, str, "a string")


def check_callable(x: Any, name: str, remedy: str, arguments: int | None = None) -> Callable:
    """A function (no class, no UFL expression or form) that takes so many arguments, as far as its signature tells."""
    if not callable(x) or isinstance(x, type) or hasattr(x, "ufl_shape") or hasattr(x, "ufl_domains"):
        raise InputError(f"{name} is {x!r}: give {remedy}.")
    if arguments is not None:
        try:
            signature = inspect.signature(x)
        except (TypeError, ValueError):   # some functions that are written in C tell nothing
            return x
        try:
            signature.bind(*range(arguments))
        except TypeError as error:
            raise InputError(f"{name} does not take {arguments} arguments ({error}): give {remedy}.") from error
    return x


def check_file(path: Any, name: str = "path") -> Path:
    """Path of a file that can be written: its folder is there; FileError otherwise."""
    path = check_path(path, name)
    if not (folder := path.parent).is_dir():
        raise FileError(f"{path} cannot be written, because {folder} is no folder: make it first, or name another.")
    if path.is_dir():
        raise FileError(f"{path} is a folder: add the name of a file.")
    if not os.access(folder, os.W_OK):
        raise FileError(f"{path} cannot be written: you have no permission to write in {folder}; name another folder.")
    return path


def portable(error: Exception) -> Exception:
    """An exception that other ranks can read: one that cannot be pickled would leave them waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def together(comm: "Comm", run: Callable[[], T], watched: bool = False) -> T:
    """Result of `run()`; what it raises on one rank of an MPI communicator is raised on all of them.

    Mistakes come before failures. What the user's own code does is `watched`: it is one collective step of all ranks,
    and where one waits in vain for the others, for 5 minutes or 20 times as long as its own part took, the run is
    aborted with a message.
    """
    result: Any = None
    error, start = None, time.monotonic()
    try:
        result = run()
    except Exception as caught:
        # PETSc turns what is raised in its callbacks into errors of its own.
        if _interrupted(caught):
            raise KeyboardInterrupt from caught
        error = caught
    if comm.size == 1:
        found = [error]
    else:
        error = None if error is None else portable(error)
        if watched:
            _wait(comm, error, max(_PATIENCE, _TIMES * (time.monotonic() - start)))
        found = comm.allgather(error)
    for one in sorted((x for x in found if x is not None), key=lambda x: not isinstance(x, MISTAKES)):
        raise one
    return result


def _interrupted(error: BaseException | None) -> bool:
    """Whether an exception comes from an interruption by the user."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _wait(comm: "Comm", mine: Exception | None, patience: float) -> None:
    """Wait for all ranks; the run ends where one of them never comes."""
    # A barrier that does not block meets none of the collectives that another rank may be stuck in.
    request, start = comm.Ibarrier(), time.monotonic()
    while not request.Test():
        waited = time.monotonic() - start
        if waited > patience:
            print(f"fem_diffusion: rank {comm.rank} has waited {patience:.0f} s for the other ranks to end a step of "
                  f"the user's code (its own outcome: {mine or 'no exception'}). They wait for it in turn: an "
                  "exception on one rank only, perhaps caught there. Raise exceptions on all ranks, or on none.",
                  file=sys.stderr, flush=True)
            comm.Abort(1)
        time.sleep(0 if waited < 0.01 else 1e-3)


def alike(comm: "Comm", check: Callable[[], dict[str, Any]]) -> tuple[Any, ...]:
    """Arguments in the order in which `check` returns them by name (collective).

    What it raises on one rank is raised on all, and InputError where an argument is another one on other ranks, which
    would mix parts of two answers.
    """
    mine = together(comm, check)
    if comm.size > 1:
        marks = [crc32(x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode()) for x in mine.values()]
        differ = [name for name, *found in zip(mine, *comm.allgather(marks)) if len(set(found)) > 1]
        if differ:
            others = "is another one" if len(differ) == 1 else "are others"
            raise InputError(f"{' and '.join(differ)} {others} on other ranks: read or draw on one, and give all "
                             f"comm.bcast({differ[0]}).")
    return tuple(mine.values())


def read_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of a script, but for PETSc's with one dash; the folder `output` is made, or the script ends."""
    arguments, rest = parser.parse_known_args()
    if unknown := [word for word in rest if word.startswith("--")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        if not os.access(arguments.output, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        parser.error(f"--output {arguments.output}: {error.strerror or error}; name another folder")
    return arguments
