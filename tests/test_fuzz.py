"""Spoiled and forged files of every kind: an error of ours, no crash, no hang, no silent difference."""

import signal
import warnings
from contextlib import contextmanager

import numpy as np
import pytest

from fem_diffusion.errors import FemDiffusionError, FileError
from specimens import KINDS, forged, specimens, spoiled

LIMIT = 20      # seconds for one file, which takes some milliseconds


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with warnings.catch_warnings():
        # So little training warns of this and that.
        warnings.simplefilter("ignore")
        return specimens(tmp_path_factory.mktemp("files"))


@contextmanager
def alarm(seconds):
    """An exception where something hangs."""
    def stop(*_):
        raise TimeoutError(f"no end after {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


NUMBERS = [pytest.param(60, id="few"), pytest.param(2000, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_as_they_were_written(files, kind):
    specimen = files[kind]
    np.testing.assert_array_equal(specimen.use(), specimen.use())
    assert np.isfinite(specimen.use()).all()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_defect_of_the_bytes_is_noticed(files, kind, number):
    specimen, rng = files[kind], np.random.default_rng([KINDS.index(kind), number])
    try:
        for i in range(number):
            broken = spoiled(specimen.content, rng)
            specimen.path.write_bytes(broken)
            with alarm(LIMIT), pytest.raises(FileError, match="is damaged|is no file that fem_diffusion reads"):
                specimen.use()
            assert specimen.path.read_bytes() == broken, "a file that cannot be read was changed"
    finally:
        specimen.path.write_bytes(specimen.content)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_file_ends_in_one_of_our_errors_or_works(files, kind, number):
    """Sizes, types, names and shapes that contradict each other, under a checksum that fits."""
    specimen, rng, refused = files[kind], np.random.default_rng([KINDS.index(kind), 1, number]), 0
    try:
        for i in range(number):
            specimen.path.write_bytes(forged(specimen.content, rng))
            try:
                with alarm(LIMIT), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    specimen.use()
            except FemDiffusionError:
                refused += 1
    finally:
        specimen.path.write_bytes(specimen.content)
    assert refused > number / 3
