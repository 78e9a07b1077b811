"""What every test needs: MPI processes can be started from the test process."""

import os
import subprocess


def pytest_sessionstart(session):
    """Hide from child processes what Open MPI 4 notes about this one.

    A process started alone writes OMPI_MCA_ess=singleton and more into the C environment, where os.environ does not
    see it. An mpiexec started from here, as mpi-pytest does, would read it
    and stop without a word.
    """
    from mpi4py import MPI

    if MPI.COMM_WORLD.size == 1:
        inherited = subprocess.run(["env", "-0"], capture_output=True, check=True).stdout.decode().split("\0")
        for name in {entry.partition("=")[0] for entry in inherited if entry} - set(os.environ):
            os.unsetenv(name)
