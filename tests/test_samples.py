"""Quantities of interest of samples: right values, and errors with a remedy."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    Constant, Function, FunctionSpace, MixedFunctionSpace, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace,
    assemble, dx, inner,
)
from mpi4py import MPI

from fem_diffusion.certificate import Certificate, pack_certificate, unpack_certificate
from fem_diffusion.errors import FileError, InputError, InstallError
from fem_diffusion.fields.coefficients import coefficients, owned_size
from fem_diffusion.files import Content
from fem_diffusion.samples import Samples, load_samples

LINE = FunctionSpace(UnitIntervalMesh(4), "CG", 1)


def _samples(V=LINE, n=40):
    return Samples(V, np.random.default_rng(V.comm.rank).standard_normal((n, owned_size(V))), np.ones((n, 2)))


def test_quantities_of_interest_are_mapped():
    samples = _samples()
    totals = samples.map(lambda m: assemble(m * dx))
    weights = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
    np.testing.assert_allclose(np.sort(totals), np.sort(samples.values @ weights), rtol=1e-12)
    np.testing.assert_array_equal(samples.map(coefficients), samples.values)
    assert samples.map(lambda m: np.ones((2, 3))).shape == (40, 2, 3)

    def careless(m):
        m.assign(0.0)
        return 1.0
    before = samples.values.copy()
    samples.map(careless)
    np.testing.assert_array_equal(samples.values, before)


def test_fields_are_made_once_and_only_when_asked_for():
    asked = []

    def values():
        asked.append(1)
        return np.arange(200.0).reshape(40, 5)
    samples = Samples.later(LINE, values, np.ones((40, 2)))
    assert len(samples) == 40 and "40 with 5 unknowns" in repr(samples) and not asked
    np.testing.assert_array_equal(coefficients(samples.mean()), np.arange(5) + 97.5)
    np.testing.assert_allclose(coefficients(samples.std()), np.std(5.0 * np.arange(40), ddof=1))
    np.testing.assert_allclose(coefficients(samples.quantile(0.25)), np.arange(5) + 5 * 9.75)
    assert len(asked) == 1
    with pytest.raises(AttributeError, match="variance"):
        samples.variance


@pytest.mark.parallel(2)
def test_on_two_ranks_fields_are_made_at_once():
    asked = []
    V = FunctionSpace(UnitIntervalMesh(4), "CG", 1)
    Samples.later(V, lambda: asked.append(1) or np.ones((3, owned_size(V))), np.ones((3, 1)))
    assert asked


@pytest.mark.parametrize("f, words", [
    (3, "f is 3: give a function"), (lambda m: None, "f gives object values"), (lambda m: "a", "f gives <U1 values"),
    (lambda m: [1.0] * (1 + (m.dat.data_ro[0] > 0)), "arrays of different shapes")])
def test_what_is_no_quantity_is_refused(f, words):
    with pytest.raises(InputError, match=words):
        _samples().map(f)


def test_probabilities_of_events_and_at_nodes():
    samples = _samples()
    share = samples.probability(lambda m: assemble(m * dx) > 0.1)
    assert share == (samples.map(lambda m: assemble(m * dx)) > 0.1).mean() and 0 < share < 1
    found = samples.probability(lambda m: m > 0.3)
    assert found.function_space() == LINE and found.name() == "probability"
    np.testing.assert_allclose(coefficients(found), (samples.values > 0.3).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(coefficients(samples.probability(lambda m: abs(m) < Constant(0.5))),
                               (np.abs(samples.values) < 0.5).mean(axis=0), rtol=1e-12)
    with pytest.raises(InputError, match="neither True or False nor a UFL condition: return one"):
        samples.probability(lambda m: 0.5)
    with pytest.raises(InputError, match="condition is 'm > 1'"):
        samples.probability("m > 1")
    with pytest.raises(InputError, match="no samples"):
        samples[:0].probability(lambda m: True)


def test_probabilities_of_vectors_numbers_and_what_has_no_nodes():
    mesh = UnitSquareMesh(2, 2)
    vectors = _samples(VectorFunctionSpace(mesh, "CG", 1))
    with pytest.raises(InputError, match=r"value shape \(2,\).* component\(i\), or compare"):
        vectors.probability(lambda m: m > 1)
    found = vectors.probability(lambda m: inner(m, m) > 1)
    pairs = vectors.values.reshape(40, -1, 2)
    np.testing.assert_allclose(coefficients(found), ((pairs**2).sum(2) > 1).mean(axis=0), rtol=1e-12)
    numbers = _samples(FunctionSpace(mesh, "R", 0))
    np.testing.assert_allclose(coefficients(numbers.probability(lambda m: m > 0)), (numbers.values > 0).mean(axis=0))
    for V in (FunctionSpace(mesh, "RT", 1), MixedFunctionSpace([FunctionSpace(mesh, "CG", 1)] * 2)):
        with pytest.raises(InputError, match=r"take component\(i\), or return True or False"):
            _samples(V).probability(lambda m: m[0] > 0)
    assert 0 <= _samples(FunctionSpace(mesh, "RT", 1)).probability(lambda m: bool(m.dat.data_ro[0] > 0)) <= 1


@pytest.mark.parallel(2)
def test_two_ranks_agree():
    samples = _samples()
    total = samples.map(lambda m: assemble(m * dx))
    share = samples.probability(lambda m: assemble(m * dx) > 0.0)
    assert MPI.COMM_WORLD.allgather((total.tolist(), share)) == [(total.tolist(), share)] * 2
    found = samples.probability(lambda m: m > 0.3)
    np.testing.assert_allclose(coefficients(found), (samples.values > 0.3).mean(axis=0))


def test_samples_go_to_arviz():
    pytest.importorskip("arviz")
    samples = _samples()
    data = samples.to_arviz(chains=4)
    np.testing.assert_array_equal(np.asarray(data["posterior"]["parameter"]), samples.values.reshape(4, 10, 5))
    np.testing.assert_array_equal(np.asarray(data["posterior"]["latents"]), np.ones((4, 10, 2)))
    with pytest.raises(InputError, match="40 samples are not 3 chains"):
        samples.to_arviz(chains=3)
    bare = Samples(LINE, samples.values, np.empty((40, 0))).to_arviz()
    assert list(bare["posterior"].data_vars) == ["parameter"]


def test_without_arviz_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(InstallError, match=r"pip install 'fem_diffusion\[arviz\]'"):
        _samples().to_arviz()


def test_it_says_what_it_is():
    assert repr(_samples()) == "Samples: 40 with 5 unknowns in <CG1 on a interval> and 2 latents"
    assert isinstance(_samples()[0], Function) and len(repr(_samples()[:3])) < 120


def test_a_certificate_without_the_light_of_its_residuals_or_with_a_wrong_one_is_refused(tmp_path):
    certificate = Certificate("weights", 1900, 0, 1400, 812.5, 0.3, None, None, 2.5, 0.4, 0.02, 61.0)
    packed = pack_certificate(certificate)
    for change, expected in ({}, certificate), ({"residuals": "red"}, replace(
            certificate, residuals="red")):
        assert unpack_certificate(Content(tmp_path, "", {}, {"it": packed | change}), "it") == expected
    with pytest.raises(FileError, match="neither green, yellow nor red"):
        unpack_certificate(Content(tmp_path, "Make it anew.", {}, {"it": packed | {"residuals": "blue"}}), "it")
    del packed["residuals"]
    with pytest.raises(FileError, match="residuals"):
        unpack_certificate(Content(tmp_path, "Make it anew.", {}, {"it": packed}), "it")


def test_a_certificate_stays_with_its_samples(tmp_path):
    certificate = Certificate("surrogate moves", 1900, 0, 1400, 812.5, None, 1.004, 0.91, 2.5, 0.4, 0.02, 61.0,
                              ("The measurement is unlike the training.",), "red")
    samples = replace(_samples(LINE), certificate=certificate)
    samples.save(tmp_path)
    for kept in (samples[2:], samples.component(0), load_samples(tmp_path, LINE)):
        assert kept.certificate == certificate
    words = repr(samples)
    assert "1,900 solves in 61 s" in words and "effective sample size 812" in words and "91% of the" in words
    assert "Pareto" not in words and "adjoint" not in words and words.endswith("unlike the training.")
    assert load_samples(tmp_path, LINE)[:1].certificate.notes == certificate.notes
