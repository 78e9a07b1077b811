"""Generative inversion for Firedrake: conditional diffusion models on finite element fields."""

import ast
import importlib
from pathlib import Path

__version__ = "0.2.0"

# Rooms are imported when a name is first used, so that the torch-only rooms work where Firedrake is missing. The names
# are those of the stub, which type checkers read.
_HOME = {name.name: line.module for line in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
         if isinstance(line, ast.ImportFrom) and line.module for name in line.names}
_TORCH_ONLY = ("fem_diffusion.comparison", "fem_diffusion.diffusion", "fem_diffusion.errors")
_FIREDRAKE = (2026, 10)

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fem_diffusion' has no attribute {name!r}")
    if not _HOME[name].startswith(_TORCH_ONLY):
        _check_firedrake()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _check_firedrake() -> None:
    """Raise InstallError where Firedrake is missing or too old."""
    from importlib.metadata import PackageNotFoundError, version
    from fem_diffusion.errors import InstallError

    wanted = ".".join(map(str, _FIREDRAKE))
    remedy = (f"Install Firedrake {wanted} or newer (`make install` in a clone of fem_diffusion does it) and activate "
              "its environment; fem_diffusion.diffusion alone works without it.")
    try:
        found = version("firedrake")
    except PackageNotFoundError:
        raise InstallError(f"fem_diffusion needs Firedrake, which is not installed here. {remedy}") from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < _FIREDRAKE:
        raise InstallError(f"fem_diffusion needs Firedrake {wanted} or newer; here is {found}. {remedy}")
