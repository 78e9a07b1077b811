"""Checks at the door give the value in one type, or say what is wrong and what to do."""

import argparse
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fem_diffusion.checks import (
    check_array, check_callable, check_file, check_number, check_readings, check_text, read_arguments,
    together,
)
from fem_diffusion.errors import FileError, InputError


@pytest.mark.parametrize("x", [2, np.int64(2), np.float32(2), Fraction(2)])
def test_numbers_become_floats(x):
    found = check_number(x, "x", above=1)
    assert found == 2.0 and type(found) is float


@pytest.mark.parametrize("x", [None, True, np.True_, "2", 2j, np.nan, np.inf, 10**400, np.array([2.0]), 1])
def test_what_is_no_number_is_refused(x):
    with pytest.raises(InputError, match="x is .*give a number that is above 1"):
        check_number(x, "x", above=1)


@pytest.mark.parametrize("x", [[1, 2], (1.0, 2.0), np.array([1, 2], np.float32), torch.tensor([1.0, 2.0]), range(1, 3)])
def test_arrays_are_copied_in_double_precision(x):
    found = check_array(x, "x", ("k",))
    assert found.tolist() == [1.0, 2.0] and found.dtype == float
    found[:] = 0
    assert list(x) == [1, 2]


@pytest.mark.parametrize("x, words", [
    ([True], "bool"), (["1"], "<U1"), ([None], "object"), ([1j], "imaginary"), ([[1], [1, 2]], "no array"),
    (1.0, "shape"),
    ([1, np.nan, np.inf], "of b, c that are not finite"), ([1e200], "of a that are not finite, or beyond 1e[+]100"),
])
def test_what_is_no_array_of_numbers_is_refused(x, words):
    with pytest.raises(InputError, match=words):
        check_array(x, "x", ("k",), names="abc")


def test_callables_and_texts():
    assert check_callable(np.exp, "f", "a function", 1) is np.exp and check_text("a", "label") == "a"
    for f, words in ((int, "f is <class 'int'>"), (3, "f is 3: give a function"),
                     (lambda: 1, "does not take 1 arguments")):
        with pytest.raises(InputError, match=words):
            check_callable(f, "f", "a function", 1)
    with pytest.raises(InputError, match="label is of type int: give a string"):
        check_text(3, "label")


def test_files_need_a_folder_that_can_be_written(tmp_path, monkeypatch):
    assert check_file(str(tmp_path / "a")) == tmp_path / "a" and check_file("a") == Path("a").absolute()
    for path in (None, 3, "", b"a", "a\0"):
        with pytest.raises(InputError, match="path is .*give the name of a file"):
            check_file(path)
    for path, words in ((tmp_path / "no" / "a", "no is no folder: make it first"), (tmp_path, "is a folder: add")):
        with pytest.raises(FileError, match=words):
            check_file(path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FileError, match="no permission to write"):
        check_file(tmp_path / "a")


class Two:
    """A communicator of two ranks; the other one brings what it was given."""

    size = 2

    def __init__(self, other):
        self.other = other

    def allgather(self, mine):
        return [mine, self.other]


def test_an_error_on_another_rank_is_raised_here_too():
    assert together(Two(None), lambda: 3) == 3
    with pytest.raises(InputError, match="there"):
        together(Two(InputError("there")), lambda: 3)
    with pytest.raises(InputError, match="here"):
        together(Two(None), lambda: check_array(None, "here", ()))


def test_scripts_refuse_misspelt_options_and_folders_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=tmp_path / "new" / "folder")
    monkeypatch.setattr("sys.argv", ["script", "-ksp_view", "cg"])
    assert read_arguments(parser).output.is_dir()
    (tmp_path / "file").write_text("")
    for given, words in ((["--ouput", "x"], "unrecognized arguments: --ouput"),
                         (["--output", str(tmp_path / "file" / "x")], "name another folder")):
        monkeypatch.setattr("sys.argv", ["script", *given])
        with pytest.raises(SystemExit):
            read_arguments(parser)
        assert words in capsys.readouterr().err


def test_what_is_behind_a_mask_is_no_number():
    y = np.ma.masked_array([1.0, 1e9, 3.0], [False, True, False])
    np.testing.assert_array_equal(check_readings(y, 3), [1.0, np.nan, 3.0])
    with pytest.raises(InputError, match="masked"):
        check_array(y, "y", ("k",))
    np.testing.assert_array_equal(check_array(y[:1], "y", ("k",)), [1.0])   # nothing is masked
