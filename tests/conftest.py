"""What every test needs: MPI processes can be started from the test process; rooms of torch alone do without MPI."""

import os
import shutil
import subprocess
import sys
import time

import pytest

BROWSER_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update")


def _world():
    """Communicator of all processes; None where mpi4py is missing."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    return MPI.COMM_WORLD


def pytest_sessionstart(session):
    """Hide from child processes what Open MPI 4 notes about this one.

    A process started alone writes OMPI_MCA_ess=singleton and more into the C environment, where os.environ does not
    see it. An mpiexec started from here, as mpi-pytest does, would read it
    and stop without a word.
    """
    world = _world()
    if world is not None and world.size == 1:
        inherited = subprocess.run(["env", "-0"], capture_output=True, check=True).stdout.decode().split("\0")
        for name in {entry.partition("=")[0] for entry in inherited if entry} - set(os.environ):
            os.unsetenv(name)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Let rank 0 alone report, as all run the same tests; `pytest_runtest_logreport` tells what fails on others."""
    world = _world()
    if world is not None and world.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let a test that fails on one rank fail on all, as ranks in different tests would wait for each other for ever."""
    report = yield
    world = _world()
    if world is not None and world.size > 1:
        _meet(world, report)
        outcomes = world.allgather(report.outcome)
        if report.outcome != "failed" and "failed" in outcomes:
            report.outcome, report.longrepr = "failed", f"failed on rank {outcomes.index('failed')} alone"
    return report


def _meet(world, report, seconds=60):
    """Wait for the other ranks; one whose test failed ends the run where they do not come, as they wait within it."""
    meeting, start = world.Ibarrier(), time.monotonic()
    while not meeting.Test():
        if report.failed and time.monotonic() - start > seconds:
            print(f"On rank {world.rank} alone, {report.nodeid}:\n{report.longreprtext}", file=sys.__stderr__,
                  flush=True)
            world.Abort(1)
        time.sleep(0.001)


def pytest_runtest_logreport(report):
    world = _world()
    if report.failed and world is not None and world.rank > 0:
        print(f"On rank {world.rank}, {report.nodeid}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave a parallel run through MPI alone.

    PetscFinalize waits for ever where pytest has kept an object alive on one rank and not on another.
    """
    world = _world()
    if world is not None and world.size > 1:
        from mpi4py import MPI

        sys.stdout.flush()
        sys.stderr.flush()
        status = world.allreduce(STATUS.get("exit", 1), MPI.MAX)
        MPI.Finalize()
        os._exit(status)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own; a test is skipped where Playwright or the browser is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed: apt-get install chromium")
    with playwright.sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"), executable_path=found, args=list(BROWSER_OPTIONS),
            viewport={"width": 1280, "height": 900})
        context.set_default_timeout(60_000)
        yield context
        context.close()


STATUS = {}


def pytest_sessionfinish(session, exitstatus):
    """Remember the outcome for the way out."""
    STATUS["exit"] = int(exitstatus)
