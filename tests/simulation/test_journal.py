"""A journal of expensive evaluations: what is there is not computed again, and what does not fit is refused."""

import numpy as np
import pytest
from mpi4py import MPI

from fem_diffusion.errors import FileError, InputError
from fem_diffusion.simulation.journal import Journal


class Solver:
    """Counts its rows, fails where it is told to, and has no answer to negative numbers."""

    def __init__(self, fail_after=np.inf, power=2):
        self.rows, self.fail_after, self.power = 0, fail_after, power

    def __call__(self, z):
        if self.rows + len(z) > self.fail_after:
            raise KeyboardInterrupt
        self.rows += len(z)
        return np.where(z[:, :1] < -1, np.nan, np.hstack([z, z**self.power]))


def _run(journal, solver, blocks=6, seed=1):
    """A walk whose next question depends on the last answer."""
    rng, z, found = np.random.default_rng(seed), np.zeros((4, 3)), []
    for _ in range(blocks):
        answer = journal.ask(z, solver)
        found.append(answer)
        z = 0.5 * np.nan_to_num(answer[:, 3:]) + rng.standard_normal((4, 3))
    return np.array(found)


@pytest.mark.parallel([1, 2])
def test_a_killed_run_goes_on_and_computes_nothing_twice_but_one_row():
    folder = MPI.COMM_WORLD.bcast(_folder())
    wanted = _run(Journal(None), Solver())
    assert np.isnan(wanted).any()
    first = Solver(fail_after=13)
    with pytest.raises(KeyboardInterrupt):
        _run(Journal(folder), first)
    assert first.rows == 12
    journal, again = Journal(folder), Solver()
    np.testing.assert_array_equal(_run(journal, again), wanted)
    assert again.rows == 12 + 1
    assert (journal.asked, journal.found) == (6, 3)
    whole = Solver()
    np.testing.assert_array_equal(_run(Journal(folder), whole), wanted)
    assert whole.rows == 1


def _folder():
    import tempfile
    return tempfile.mkdtemp() if MPI.COMM_WORLD.rank == 0 else None


def test_another_run_and_another_solver_are_refused(tmp_path):
    _run(Journal(tmp_path), Solver())
    with pytest.raises(FileError, match="belongs to another run: .* Delete it with the later ones, or the whole"):
        _run(Journal(tmp_path), Solver(), seed=2)
    journal = Journal(tmp_path)
    with pytest.raises(FileError, match="another run"):
        journal.ask(np.zeros((3, 3)), Solver())
    z = np.ones((4, 3))
    Journal(tmp_path / "b").ask(2 * z, Solver())
    with pytest.raises(FileError, match="computed by another forward problem"):
        Journal(tmp_path / "b").ask(2 * z, Solver(power=3))


def test_a_damaged_block_is_refused_and_computed_again_where_it_is_deleted(tmp_path):
    wanted = _run(Journal(tmp_path), Solver())
    file = tmp_path / "answers-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileError, match="is damaged.* Delete it"):
        _run(Journal(tmp_path), Solver())
    file.unlink()
    solver = Solver()
    np.testing.assert_array_equal(_run(Journal(tmp_path), solver), wanted)
    assert solver.rows == 4 + 1


def test_what_is_no_block_is_refused():
    with pytest.raises(InputError, match="give \\(B, m\\)"):
        Journal(None).ask(np.zeros(3), Solver())
    with pytest.raises(InputError, match="one row for each of the 4"):
        Journal(None).ask(np.zeros((4, 3)), lambda z: z[:2])
    assert repr(Journal(None)) == "Journal in memory: 0 blocks, 0 of them from a former run"
