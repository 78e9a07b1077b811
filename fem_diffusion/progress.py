"""What long work tells: a progress bar, sparse lines where nobody watches it, and results in words."""

import logging
import sys
from threading import RLock

from tqdm import tqdm

__all__ = ["LOG", "bar", "tell"]

LOG = logging.getLogger("fem_diffusion")
LOG.addHandler(logging.NullHandler())
_SPARSE = 10.0   # seconds between lines in a pipe or file


class _Lines:
    """A stream on which a bar that repaints itself becomes lines."""

    def write(self, text: str) -> None:
        # A bar below another one moves the cursor up.
        if text := text.replace("\x1b[A", "").strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _Bar(tqdm):
    """A bar with a lock of this process alone: who waits for tqdm's own waits for ever for a child killed with it."""

    _lock = RLock()


def bar(total: int, name: str, show: bool, initial: int = 0) -> tqdm:
    """Progress bar on standard error, `initial` of `total` steps done; in a pipe or file a line every ten seconds.

    `show` it on rank 0, where the user has asked for it.
    """
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    if watched:
        return _Bar(total=total, desc=name, disable=not show, initial=initial)
    return _Bar(total=total, desc=name, disable=not show, initial=initial, file=_Lines(), mininterval=_SPARSE,
                maxinterval=_SPARSE, ncols=100)


def tell(text: str, show: bool) -> None:
    """Log a line under "fem_diffusion"; write it to standard error where bars are shown, by `show`, and no one logs."""
    LOG.info(text)
    if show and not LOG.isEnabledFor(logging.INFO):
        _Bar.write(text, file=sys.stderr)
