"""Events in PETSc's log: `-log_view` tells the time of simulation, encoding, training and sampling."""

from firedrake.petsc import PETSc

__all__ = ["event"]


def event(name: str) -> PETSc.LogEvent:
    """The event ``fem_diffusion.<name>``, a context manager that logs what is done in its block."""
    return PETSc.Log.Event(f"fem_diffusion.{name}")
