"""Events in PETSc's log: `-log_view` tells the time of simulation, encoding, training and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager

from firedrake.petsc import PETSc

__all__ = ["event"]


@contextmanager
def event(name: str) -> Iterator[None]:
    """Log what is done in a block as the event ``fem_diffusion.<name>``."""
    with PETSc.Log.Event(f"fem_diffusion.{name}"):
        yield
