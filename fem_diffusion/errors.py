"""Errors that a user can cause; each message ends with the remedy."""

__all__ = ["FemDiffusionError", "InputError", "DataError", "FileError", "SolveError", "InstallError"]


class FemDiffusionError(Exception):
    """Base class of every error that fem_diffusion raises for a user's mistake."""


class InputError(FemDiffusionError, ValueError):
    """An argument is of the wrong kind, shape, value or function space."""


class DataError(FemDiffusionError):
    """A data set is empty, inconsistent or does not fit its use."""


class FileError(FemDiffusionError):
    """A file is damaged, foreign, of another version, cannot be written, or does not fit its use."""


class SolveError(FemDiffusionError):
    """A forward problem has no solution that its solver finds."""


class InstallError(FemDiffusionError, ImportError):
    """The environment lacks something, or has a version or build that does not serve."""
