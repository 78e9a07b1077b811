r"""Every file that the package writes for itself, and reads again: one format, one way to write, no code.

A file is a safetensors file (numbers and one JSON text, nothing that runs) whose metadata hold

    checksum    BLAKE2b of the whole file, with zeros in the checksum's own place
    version     of this format
    kind        "model", "block", ...
    values      settings and identity of the content, whatever JSON holds

It is written beside its place, flushed to the disk, read back against the checksum, and then renamed: a path holds a
whole file or what it held before, whatever fails or is killed in between. What a killed run leaves is overwritten by
the next one. No Firedrake and no torch here.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import DTypeLike
from safetensors import SafetensorError

from fem_diffusion.checks import LARGEST, check_path
from fem_diffusion.errors import FileError

__all__ = ["Content", "VERSION", "adopt", "check_room", "locked", "make_folder", "read", "write", "write_bytes"]

VERSION = 2
_DIGITS = 64
_ZEROS = b"0" * _DIGITS
_MARK = b'\\"checksum\\":\\"'   # JSON inside JSON: quotes are escaped
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_FOREIGN = {b"\x89HDF": "an HDF5 file, as version 0.1.0 wrote bases and data sets",
            b"PK\x03\x04": "a zip file, as version 0.1.0 wrote checkpoints"}


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    path: Path
    remedy: str                     # what a user does where it is of no use: the end of every error
    arrays: dict[str, np.ndarray]
    values: dict[str, Any]          # settings and identity
    checksum: str = ""              # of the file: what belongs together can name it

    def error(self, reason: str) -> FileError:
        """The error that the content is of no use, to be raised."""
        return FileError(f"{self.path} {reason}. {self.remedy}")

    def array(self, name: str, *shape: int | None, dtype: DTypeLike = np.float64, finite: bool = True) -> np.ndarray:
        """An array of this shape (None: any size along that axis) and type; FileError if there is none."""
        if (found := self.arrays.get(name)) is None:
            raise self.error(f"holds no {name!r}")
        fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape))
        if not fits or found.dtype != dtype:
            raise self.error(f"holds {name!r} of shape {found.shape} and type {found.dtype}, where {shape} and "
                             f"{np.dtype(dtype)} are expected")
        if finite and not (np.abs(found.astype(float)) <= LARGEST).all():
            raise self.error(f"holds values in {name!r} that are not finite, or beyond {LARGEST:g}")
        return found

    def value(self, name: str, *kinds: type) -> Any:
        """A setting of one of these types (a whole number will do for a float); FileError if there is none."""
        found: Any = self.values.get(name)
        whole = isinstance(found, int) and not isinstance(found, bool)
        if name not in self.values or not (isinstance(found, kinds) or (float in kinds and whole)) or (
                isinstance(found, bool) and bool not in kinds):
            raise self.error(f"holds no setting {name!r} of type {' or '.join(kind.__name__ for kind in kinds)}")
        if float in kinds and whole and abs(found) > 2**53:
            raise self.error(f"holds a setting {name!r} that is too large")
        return found


def write(path: str | os.PathLike, kind: str, arrays: dict, values: dict) -> None:
    """Write a file, whole or not at all; what was there is replaced at the end.

    It holds the `kind` of content, for which `read` asks, arrays of numbers and truth values by name, and settings and
    identity as `values`, whatever JSON holds. FileError if it cannot be written: no folder, no permission, a full disk,
    another run that writes it at this moment.
    """
    # The library takes the memory of an array in its own order, so each is put in C order first.
    arrays = {name: np.asarray(x, dtype=np.asarray(x).dtype.newbyteorder("="), order="C") for name, x in arrays.items()}
    header = {"checksum": _ZEROS.decode(), "version": VERSION, "kind": kind, "values": values}
    data = memoryview(safetensors.numpy.save(arrays, {"fem_diffusion": json.dumps(header, separators=(",", ":"))}))
    place = _checksum_place(data)
    assert place is not None
    write_bytes(path, data[:place], _digest(data, place), data[place + _DIGITS:])


def read(path: str | os.PathLike, kind: str, remedy: str) -> Content:
    """Read what `write` wrote; `remedy` is what a user does where it is of no use.

    FileError if it is not there, cannot be read, or is damaged, foreign, of another kind or version.
    """
    path = check_path(path)
    nothing = Content(path, remedy, {}, {})
    try:
        data = path.read_bytes()
    except OSError as error:
        raise nothing.error(f"cannot be read ({error.strerror or error})") from error
    place = _checksum_place(data)
    if place is None:
        raise nothing.error(f"is no file that fem_diffusion reads ({_looks_like(data)})")
    if data[place:place + _DIGITS] != _digest(memoryview(data), place):
        raise nothing.error("is damaged: its checksum does not fit its content")
    # Whoever made a checksum by hand gets an error of ours, too.
    try:
        header = json.loads(_header(data)["__metadata__"]["fem_diffusion"])
        version, found, values = header["version"], header["kind"], dict(header["values"])
        arrays = safetensors.numpy.load(data) if version == VERSION else {}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise nothing.error(f"is damaged ({error!r})") from error
    if version != VERSION:
        raise nothing.error(f"is of format version {version!r}, and this version of fem_diffusion reads {VERSION}")
    if found != kind:
        raise nothing.error(f"holds a {found}, where a {kind} is expected")
    return Content(path, remedy, arrays, values, data[place:place + _DIGITS].decode())


def write_bytes(path: str | os.PathLike, *parts: bytes | memoryview) -> None:
    """Write bytes to a file, whole or not at all; raises FileError as `write` does.

    The file is locked while it is written: of two runs that write one path at the same time, the second gets an error.
    """
    path = Path(os.path.realpath(check_path(path)))   # a link stays a link; its target is replaced
    partial = path.with_name(path.name + ".partial")
    try:
        descriptor = _open_locked(partial)
        with _cleared(descriptor, partial):
            _fill(descriptor, partial, parts)
            adopt(partial, path)
    except OSError as error:
        raise _failed("cannot be written", path, error) from error


@contextlib.contextmanager
def _cleared(descriptor: int, path: Path) -> Iterator[None]:
    """Close a file after its use, and remove it where that fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def _fill(descriptor: int, partial: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put bytes in place of what is in an open file, wait until they are on the disk, and read them back."""
    os.ftruncate(descriptor, 0)     # a killed run may have left one
    with open(descriptor, "wb", closefd=False) as file:
        for part in parts:
            file.write(part)
    os.fsync(descriptor)
    with contextlib.suppress(OSError, AttributeError):      # so that the disk is read, not the memory before it
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with open(partial, "rb") as file:
        found = _hash(iter(lambda: file.read(2**20), b""))
    if found != _hash(parts):
        raise OSError(errno.EIO, "what was written reads back differently")


def check_room(partial: Path, size: int) -> None:
    """Raise FileError unless so many bytes can be written under a name, which is empty then."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with _cleared(descriptor, partial):
            os.posix_fallocate(descriptor, 0, size)
            os.ftruncate(descriptor, 0)
    except OSError as error:
        raise _failed("cannot be written", partial, error) from error


def adopt(partial: Path, path: Path) -> None:
    """Give a whole file its final name, for good; raises OSError."""
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder with those above it, where it is not there; FileError where that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise _failed("cannot be made", Path(path), error) from error


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Keep other runs out for as long as the context lasts, and a file of this name; a killed run keeps nobody out.

    `what` is locked, for the message. FileError if another run holds the lock, or the file cannot be made.
    """
    path = check_path(path)
    try:
        descriptor = _open_locked(path)
    except BlockingIOError:
        raise FileError(f"{what} is in use by another run: wait until it ends, or name another one.") from None
    except OSError as error:
        raise _failed("cannot be made", path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Descriptor of a file, made where it is missing, with an exclusive lock; BlockingIOError where another has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:   # as some network file systems do
                    raise
                warnings.warn(f"The file system of {path} knows no locks: see to it that no other run writes there.",
                              stacklevel=4)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)   # whoever had the lock has renamed or removed the file meanwhile


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():   # not every one can flush a folder
            raise
    finally:
        os.close(descriptor)


def _failed(what: str, path: Path, error: OSError) -> FileError:
    if isinstance(error, BlockingIOError):
        return FileError(f"{path} {what}: another run writes it at this moment. Name another file, or wait.")
    made = "Look at that path" if path.parent.exists() else f"Make the folder {path.parent} first"
    remedies = {errno.ENOSPC: "Make room on the disk", errno.EDQUOT: "Make room in your quota",
                errno.ENOENT: made, errno.EACCES: "Ask for permission there",
                errno.EROFS: "That file system is read-only", errno.EISDIR: "That is a folder",
                errno.ENOTDIR: "A part of that path is a file",
                errno.EEXIST: "Move the file or broken link that is there away"}
    remedy = remedies.get(error.errno or 0, "Look at the disk")
    return FileError(f"{path} {what} ({error.strerror or error}). {remedy}, or name another place.")


def _checksum_place(data: bytes | memoryview) -> int | None:
    """Where the checksum's digits are; None where the bytes are no file of this format."""
    size = int.from_bytes(bytes(data[:8]), "little")
    if len(data) < 8 or size > len(data) - 8:
        return None
    found = bytes(data[8:8 + size]).find(_MARK)
    place = 8 + found + len(_MARK)
    return None if found < 0 or place + _DIGITS > len(data) else place


def _header(data: bytes) -> dict:
    """The JSON header of a safetensors file."""
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])


def _digest(data: memoryview, place: int) -> bytes:
    """Checksum of a file whose own digits are at `place`, as digits."""
    return _hash([data[:place], _ZEROS, data[place + _DIGITS:]])


def _hash(parts: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def _looks_like(data: bytes) -> str:
    """What a file of another format may be."""
    with contextlib.suppress(ValueError, KeyError, TypeError, UnicodeDecodeError):
        return f"its format is {_header(data)['__metadata__']['format']!r}, of a version before the present one"
    return next((what for start, what in _FOREIGN.items() if data.startswith(start)), "it is foreign or cut short")
