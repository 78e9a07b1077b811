"""What long work tells: a progress bar, sparse lines where nobody watches it, and results in words."""

import logging
import sys

from tqdm import tqdm

__all__ = ["LOG", "bar", "tell"]

LOG = logging.getLogger("fem_diffusion")
LOG.addHandler(logging.NullHandler())
# Seconds between lines in a pipe or file.
_SPARSE = 10.0


class _Lines:
    """A stream on which a bar that repaints itself becomes lines."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, name: str, show: bool, initial: int = 0) -> tqdm:
    """Progress bar on standard error; in a pipe or file a line every ten seconds.

    Parameters
    ----------
    total, initial : int
        Number of steps, and of those done already.
    name : str
        What is done.
    show : bool
        Whether to show it at all: on rank 0, where the user has asked for it.

    Returns
    -------
    tqdm.tqdm
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(total=total, desc=name, disable=not show, initial=initial)
    return tqdm(total=total, desc=name, disable=not show, initial=initial, file=_Lines(), mininterval=_SPARSE,
                maxinterval=_SPARSE, ncols=100)


def tell(text: str, show: bool) -> None:
    """Log a result in words under "fem_diffusion"; write it to standard error where bars are shown and no one logs.

    Parameters
    ----------
    text : str
        One line.
    show : bool
        As for `bar`.
    """
    LOG.info(text)
    if show and not LOG.isEnabledFor(logging.INFO):
        tqdm.write(text, file=sys.stderr)
