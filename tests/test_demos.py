"""The demos run, leave their pictures, and meet the errors that the project promises."""

import importlib.util
from pathlib import Path

import pytest

DEMOS = Path(__file__).parent.parent / "demos"


def _run(case, folder):
    """Rows of the demo's table and Monte Carlo errors of its reference."""
    file = DEMOS / "boundary_flux" / "boundary_flux.py"
    specification = importlib.util.spec_from_file_location("boundary_flux", file)
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    demo.draw_setup(folder)
    rows, reference_errors = demo.run(case, folder, progress=False)
    for picture in ("setup", f"flux_{case}", f"predictive_{case}"):
        assert (folder / f"{picture}.png").stat().st_size > 10000
    assert "Readings and predictions" in (folder / f"report_{case}.html").read_text()
    assert len(rows) == 12 and len({tuple(row[:2]) for row in rows}) == 12
    return rows, reference_errors


def test_gaussian_flux_is_the_exact_posterior(tmp_path):
    for *_, mean_error, std_error, distance in _run("gaussian", tmp_path)[0]:
        assert mean_error < 0.01 and std_error < 0.03 and distance < 1.5


@pytest.mark.slow
def test_positive_flux_is_the_monte_carlo_posterior(tmp_path):
    rows, reference_errors = _run("positive", tmp_path)
    for *_, mean_error, std_error, _ in rows:
        assert mean_error < 0.015 and std_error < 0.04
    for errors in reference_errors:
        assert max(errors) < 0.01
