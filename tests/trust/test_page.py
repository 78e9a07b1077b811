"""The page says what the samples say, in numbers that people read, holds all it needs, and escapes what users name."""

import base64
import html
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from firedrake import (
    Function, FunctionSpace, SpatialCoordinate, UnitCubeMesh, UnitIcosahedralSphereMesh, UnitIntervalMesh,
    UnitSquareMesh, VectorFunctionSpace, assemble, dx,
)
from matplotlib import pyplot as plt

from fem_diffusion import (
    AdvectionDiffusion, Boundary, FileError, GaussianNoise, GaussianPrior, InputError, InstallError, InverseProblem,
    Physics, ProductPrior, coefficients, exact, point_sensors,
)
from fem_diffusion.certificate import Certificate
from fem_diffusion.page import words
from fem_diffusion.samples import Samples
from fem_diffusion.trust.check import Check
from fem_diffusion.trust.report import report

CERTIFICATE = Certificate("gradient moves", 1987, 320, 12345678, 812.3456789, None, 1.0071234, 0.8612345, 0.2912345,
                          1.0712345, 0.0123456, 73.123456, ("Two chains were restarted.",))
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
               None)


@dataclass(frozen=True)
class _Drawn:
    """A posterior as the report sees one."""

    problem: InverseProblem
    samples: Samples
    y: Any = None

    def sample(self, n, *, seed):
        return self.samples[:n]

    def __str__(self):
        return f"Drawn: {len(self.samples)} samples\nof a test"


def _problem(V, points, names=None):
    """Affine: an unknown source, seen through its concentration."""
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=0.3, reaction=lambda u: u), Boundary())
    return InverseProblem(GaussianPrior(V, std=0.4, correlation_length=0.4, mean=1.5), forward,
                          point_sensors(V, points, names=names), GaussianNoise(std=0.02))


def _posterior(V, points, names=None, n=200):
    problem = _problem(V, points, names)
    y, = problem.measurements(problem.prior.sample_many(1, seed=5), seed=3)
    return _Drawn(problem, exact(problem, y).sample(n, seed=1), y)


def _checked(posterior, light="green", verdict="trustworthy", *sentences):
    clean = posterior.problem.readings(posterior.samples.values[:50])
    found = dict(light=light, verdict=verdict, sentences=sentences or ("The samples explain the readings.",), solves=50,
                 readings=clean, y=posterior.y, noise_std=np.full(len(posterior.y), 0.02),
                 names=posterior.problem.names, sensor_p=np.linspace(1e-4, 1, len(posterior.y)))
    return Check(**dict.fromkeys(field.name for field in fields(Check)) | found)


@pytest.fixture(scope="module")
def square():
    return _posterior(FunctionSpace(UnitSquareMesh(12, 12), "CG", 1), [(0.2, 0.3), (0.5, 0.5), (0.8, 0.7)],
                      ["gate", "<script>alert(1)</script>", 'a$\\b$ & "co"'])


@pytest.fixture(scope="module")
def line():
    return _posterior(FunctionSpace(UnitIntervalMesh(20), "CG", 1), [0.2, 0.5, 0.7], ["gate", "hall", "roof"], n=60)


@pytest.fixture(scope="module")
def page(square, tmp_path_factory):
    """A page with all its parts, and its text."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    corrected = replace(square.samples, certificate=CERTIFICATE)
    found = report(square, path, threshold=1.6, samples=corrected, check=_checked(square, "yellow", "too wide"),
                   question="Is it <script>alert(2)</script>?", name="<b>source</b>", units="W/m³", mesh_units="m",
                   reading="temperature [K]", boundaries=[1])
    assert found == path
    return path.read_text()


class _Reader(HTMLParser):
    """Tags that are open, what is visible, and the sources of images."""

    VOID = {"meta", "img", "br", "path", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.tags, self.addresses = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.images += [(value, dict(attributes)["alt"]) for name, value in attributes if (tag, name) == ("img", "src")]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


def _read(page):
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def _text(page):
    return re.sub(r"[ \n]+", " ", " ".join(_read(page).text))


def test_the_page_has_all_its_parts(page):
    text = _text(page)
    for part in ("What the readings tell of the", "Take care: too wide", "The samples explain the readings",
                 "Readings and predictions", "Certificate", "What was run", "gradient moves", "1,987",
                 "Two chains were restarted.", "Firedrake", "PyTorch", "PETSc", "fem_diffusion", "Seed",
                 "1,987 for the correction; 50 for the check", "Measured: temperature [K]"):
        assert part in text, part
    assert [alt.partition(" of ")[0] for _, alt in _read(page).images] == [
        "Map", "Map", "Map", "Map", "Map", "Map", "Mean, 95 % band and single samples",
        "Mean, 95 % band and single samples", "Each measured reading beside the interval that the samples predict."]


def test_the_page_needs_no_network(page):
    reader = _read(page)
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"data:[^\"]*", "", page))
    for source, _ in reader.images:
        picture = base64.b64decode(source.partition(",")[2]).decode()
        assert all(address.startswith(("#", "data:image/png")) for address in re.findall(r'href="([^"]*)"', picture))
        assert "<script" not in picture and "<text" not in picture


def test_what_users_name_is_escaped(page):
    text = _text(page)
    assert "<script" not in page and "<b>" not in page
    for name in ("<script>alert(1)</script>", "<script>alert(2)</script>", "<b>source</b>", 'a$\\b$ & "co"'):
        assert name in text


def test_no_number_is_longer_than_people_read(page):
    for number in re.findall(r"\d[\d.,]*\d", _text(page)):
        assert len(re.sub(r"\D", "", number.replace(",", "") if "." not in number else number)) <= 8
        assert max(map(len, re.split(r"[.,]", number))) <= 6, number
    assert "12,345,678" in page and "812" in page and "812.34" not in page


def test_the_page_is_small(page):
    assert len(page.encode()) < 1.5e6


def test_sentences_are_those_of_the_samples(square, page):
    samples, text = square.samples, _text(page)
    average = samples.map(lambda m: assemble(m * dx))
    assert words.plus_minus(average.mean(), average.std(ddof=1), "W/m³") in text
    somewhere = samples.probability(lambda m: bool(m.dat.data_ro.max() > 1.6))
    assert f"exceeds 1.6\u00a0W/m³ somewhere is {words.chance(somewhere, 200)}" in text
    assert f"that its average does, {words.chance((average > 1.6).mean(), 200)}" in text
    D = FunctionSpace(samples.V.mesh(), "DG", 0)
    share = np.mean([(Function(D).interpolate(m).dat.data_ro > 1.6).mean() for m in samples])
    assert f"the domain where it does is {words.percent(share)}" in text
    mean = samples.mean()
    most = np.argmax(mean.dat.data_ro)
    assert f"{words.number(mean.dat.data_ro[most], 'W/m³')}, at {words.place(_nodes(samples.V)[most], 'm')}" in text


def _nodes(V):
    return np.stack([coefficients(Function(V).interpolate(x)) for x in SpatialCoordinate(V.mesh())], axis=1)


def test_readings_stand_beside_their_predictions(line, tmp_path):
    check = _checked(line)
    text = _text(report(line, tmp_path / "a.html", check=check).read_text())
    predicted = check.readings[:, 0].mean(), np.sqrt(check.readings[:, 0].var(ddof=1) + 0.02**2)
    off = words.tenths((line.y[0] - predicted[0]) / predicted[1])
    assert f"gate conflicts {words.number(line.y[0])} {words.plus_minus(*predicted)} {off}" in text
    # Without a check predictions are made for the page.
    alone = _text(report(line, tmp_path / "b.html", check=False, solves=30).read_text())
    assert "Not checked" in alone and "30 for the predictions" in alone
    broken = replace(line, y=line.y + np.array([0, 1.0, 0]))
    assert "1 of 3 readings lies outside" in _text(report(broken, tmp_path / "c.html", check=False).read_text())
    silent = replace(line, y=None)
    assert "holds no measurement" in report(silent, tmp_path / "d.html", check=False).read_text()


@pytest.mark.parametrize("light, word, shape", [("green", "Trustworthy", "<circle"), ("yellow", "Take care", "<path"),
                                                ("red", "Do not rely on it", "<path")])
def test_lights_differ_in_word_and_shape(line, tmp_path, light, word, shape):
    page = report(line, tmp_path / "a.html", check=_checked(line, light, "biased", "It is off.")).read_text()
    assert f"{word}: biased" in page and f'class="verdict {light}"' in page and "It is off." in page
    assert page.partition('role="img"')[2].partition(">")[2].strip().startswith(shape)


def test_an_answer_may_be_trustworthy_with_care(line, tmp_path):
    page = report(line, tmp_path / "a.html", check=_checked(line, "yellow")).read_text()
    assert "<strong>Trustworthy, with care</strong>" in page


def test_corrected_samples_speak_by_their_certificate(line, tmp_path):
    corrected = replace(line.samples, certificate=CERTIFICATE)
    text = _text(report(line, tmp_path / "a.html", samples=corrected).read_text())
    assert "Corrected" in text and "R-hat" in text and "1.007" in text and "Not checked" not in text


CONFLICT = "The measurement is in conflict with the problem."


@pytest.mark.parametrize("change, light, word, sentence", [
    ({}, "green", "Corrected", "Two chains were restarted."),
    ({"residuals": "red", "ess": 35.0, "notes": (CONFLICT,)}, "red",
     "Corrected: the measurement conflicts with the problem", CONFLICT),
    ({"residuals": "yellow", "notes": ("The noise is smaller.",)}, "yellow", "Corrected, with care", "The noise is"),
    ({"ess": 99.0, "notes": ("The samples are rough.",)}, "yellow", "Corrected, with care", "The samples are rough."),
    ({"rhat": 1.06, "notes": ("The samples are rough.",)}, "yellow", "Corrected, with care", "The samples are rough."),
    ({"unseen": 0.31, "notes": ()}, "yellow", "Corrected, with care",
     "Modes that are drawn from the prior add up to 0.31\u00a0noise standard deviations to a reading"),
    ({"unseen": np.nan, "rhat": None}, "green", "Corrected", "samples of the finite element posterior")])
def test_the_light_of_corrected_samples_is_that_of_their_certificate(line, tmp_path, change, light, word, sentence):
    corrected = replace(line.samples, certificate=replace(CERTIFICATE, **change))
    page = report(line, tmp_path / "a.html", samples=corrected).read_text()
    assert f'class="verdict {light}"' in page and f"<strong>{word}</strong>" in page
    assert sentence in page.partition('class="verdict')[2].partition("</section>")[0]


@pytest.mark.parametrize("space, points, given, parts", [
    (lambda: FunctionSpace(UnitIntervalMesh(20), "CG", 1), [0.2, 0.7], dict(threshold=1.6), ["Along its length"]),
    (lambda: FunctionSpace(UnitCubeMesh(3, 3, 3), "CG", 1), [(0.2, 0.3, 0.4)], dict(threshold=1.6),
     ["Mean, z = 0.5", "Mean, x = 0.5", "Along the line (0, 0.5, 0.5) to (1, 0.5, 0.5)"]),
    (lambda: FunctionSpace(UnitCubeMesh(3, 3, 3), "CG", 1), [(0.2, 0.3, 0.4)], dict(slices=[("y", 0.25)]),
     ["Standard deviation, y = 0.25"])])
def test_any_dimension_has_its_pictures(space, points, given, parts, tmp_path):
    text = _text(report(_posterior(space(), points, n=30), tmp_path / "a.html", check=False, **given).read_text())
    for part in parts:
        assert part in text.replace("\u00a0", " "), part
    assert "What is the unknown" in text


def _without_solver(V, values):
    """A posterior of a parameter that is read as it is."""
    prior = GaussianPrior(V, 1.0, 0.5) if not isinstance(V, ProductPrior) else V
    problem = InverseProblem(prior, lambda m: m, lambda m: m.dat[0].data_ro.ravel()[:1], GaussianNoise(std=0.1))
    return _Drawn(problem, Samples(prior.V, values(prior), np.zeros((30, 0))))


def test_vectors_numbers_and_several_unknowns_have_their_pictures(tmp_path):
    mesh = UnitSquareMesh(4, 4)
    vector = _without_solver(VectorFunctionSpace(mesh, "CG", 1), lambda prior: prior.sample_many(30, 0))
    text = _text(report(vector, tmp_path / "a.html", check=False, threshold=1.0, name="wind").read_text())
    somewhere = np.linalg.norm(vector.samples.values.reshape(30, -1, 2), axis=2).max(axis=1) > 1
    assert f"the magnitude of the wind exceeds 1 somewhere is {words.chance(somewhere.mean(), 30)}" in text
    assert "Probability of more than 1" in text
    rate = GaussianPrior(FunctionSpace(mesh, "R", 0), 0.5)
    both = _without_solver(ProductPrior([GaussianPrior(FunctionSpace(mesh, "CG", 1), 1.0, 0.5), rate]),
                           lambda prior: prior.sample_many(30, 0))
    page = report(both, tmp_path / "b.html", check=False, name=["source", "rate"], units=["K", "1/s"],
                  threshold=[None, 0.2]).read_text()
    rates = both.samples.component(1).values[:, 0]
    text = _text(page)
    assert f"The rate is {words.plus_minus(rates.mean(), rates.std(ddof=1), '1/s')}" in text
    assert f"exceeds 0.2\u00a01/s with a probability of {words.percent((rates > 0.2).mean())}" in text
    assert "What are the source and the rate" in text and "Does the rate exceed" in text
    with pytest.raises(InputError, match="one for each"):
        report(both, tmp_path / "c.html", check=False, threshold=0.2)


def test_what_cannot_be_drawn_is_told(tmp_path):
    V = FunctionSpace(UnitIcosahedralSphereMesh(1), "CG", 1)
    drawn = _without_solver(V, lambda prior: prior.sample_many(30, 0))
    text = _text(report(drawn, tmp_path / "a.html", check=False).read_text())
    assert "A map cannot be drawn: plot_samples draws no surfaces in space" in text and "Averaged over" in text


def test_a_check_that_cannot_be_made_is_told(line, tmp_path, monkeypatch):
    def check(posterior, **given):
        raise InputError("The noise has no density: give one.")
    monkeypatch.setattr("fem_diffusion.trust.report.check", check)
    text = _text(report(line, tmp_path / "a.html").read_text())
    assert "Not checked" in text and "The noise has no density" in text


def test_the_check_is_made_where_none_is_given(line, tmp_path):
    text = _text(report(line, tmp_path / "a.html").read_text())
    assert "Trustworthy" in text and "for the check" in text and "for the predictions" not in text


@pytest.mark.parametrize("given, message", [
    (dict(lines=[[0, 1]]), r"each of lines has the shape"),
    (dict(lines=1), "lines is 1: give a sequence, such as"),
    (dict(lines=[[(3, 3), (5, 5)]]), r"ends at \(3.0, 3.0\), which is outside the mesh: move it there, between"),
    (dict(lines=[[(0, 0), (5, 5)]]), r"ends at \(5.0, 5.0\), which is outside the mesh: move it there, between"),
    (dict(lines=[[(0, 0), (0, 0)]]), "one point: give different ones"),
    (dict(boundaries=1), r"boundaries is 1: give a sequence, such as \(1,\)"),
    (dict(boundaries="on_boundary"), "boundaries is 'on_boundary': give a sequence"),
    (dict(boundaries=(1, 9)), "boundary is 9, which the mesh does not have .* give one of its markers"),
    (dict(slices=[("z", 0.5)]), "mesh of three dimensions, .* leave slices out"),
    (dict(name=""), "name is empty: give a word"), (dict(reading=" "), "reading is empty: give a word")])
def test_places_that_are_not_there_and_empty_names_are_refused_before_a_check(square, tmp_path, monkeypatch, given,
                                                                              message):
    monkeypatch.setattr("fem_diffusion.trust.report.check", None)
    with pytest.raises(InputError, match=message):
        report(square, tmp_path / "a.html", samples=square.samples, **given)
    assert not list(tmp_path.iterdir())


def test_places_are_refused_where_no_unknown_has_them(line, tmp_path):
    with pytest.raises(InputError, match="lines and boundaries are for bands of a scalar field on a mesh of two"):
        report(line, tmp_path / "a.html", check=False, lines=[[(0.1,), (0.9,)]])
    cube = _posterior(FunctionSpace(UnitCubeMesh(2, 2, 2), "CG", 1), [(0.2, 0.3, 0.4)], n=5)
    for given, message in ((dict(slices=[("z", 3.0)]), "slice is at z = 3 and the mesh lies between 0 and 1"),
                           (dict(slices=("z", 0.5)), "slice is 'z': give a coordinate and its value"),
                           (dict(boundaries=[1]), "boundary is drawn of meshes in a plane")):
        with pytest.raises(InputError, match=message):
            report(cube, tmp_path / "a.html", check=False, **given)
    mesh = UnitSquareMesh(3, 3)
    vector = _without_solver(VectorFunctionSpace(mesh, "CG", 1), lambda prior: prior.sample_many(30, 0))
    with pytest.raises(InputError, match="no unknown is one: leave them out"):
        report(vector, tmp_path / "a.html", check=False, boundaries=[1])
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused_and_leave_no_page(line, tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    for given, error, message in [
            (dict(threshold="x"), InputError, "threshold is 'x'"), (dict(name=["a", "b"]), InputError, "2 entries"),
            (dict(samples=line.samples[:1]), InputError, "at least 2"), (dict(question=3), InputError, "question is"),
            (dict(samples=line.samples.values), InputError, "samples is of type"), (dict(seed=-1), InputError, "seed"),
            (dict(path=tmp_path / "no" / "a.html"), FileError, "make it first"), (dict(solves=1), InputError, "solves"),
            (dict(check="green"), InputError, "check is of"),
            (dict(path=tmp_path), FileError, "is a folder"), (dict(units=3), InputError, "units is of type")]:
        with pytest.raises(error, match=message):
            report(line, **{"path": path, "check": False} | given)
    with pytest.raises(InputError, match="posterior.problem"):
        report(line.samples, path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InstallError, match=re.escape("pip install 'fem_diffusion[report]'")):
        report(line, path, check=False)
    assert not list(tmp_path.iterdir())


def test_figures_of_the_user_are_left_alone(line, tmp_path):
    mine = plt.figure()
    report(line, tmp_path / "a.html", check=False, samples=line.samples[:10])
    assert plt.get_fignums() == [mine.number]
    plt.close("all")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_it_on_a_phone_without_sideways_scrolling(page, tmp_path):
    """Headless windows are not narrower than 500 pixels, frames are."""
    frame = html.escape(page, quote=True)
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" width="390" height="800" style="border:0" srcdoc="{frame}"></iframe><script>'
        'onload = () => { const d = document.getElementById("f").contentDocument; document.title = '
        '[d.documentElement.clientWidth, d.documentElement.scrollWidth, d.images.length, '
        '[...d.images].filter(i => i.complete && i.naturalWidth > 100).length].join(" "); }</script>')
    run = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--dump-dom",
                          f"--user-data-dir={tmp_path}/user", f"file://{tmp_path}/frame.html"], capture_output=True,
                         text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", run.stdout)
    assert title, run.stderr[-2000:]
    assert title[1] == "390 390 9 9"


@pytest.mark.parallel(2)
def test_two_ranks_write_one_page():
    from pathlib import Path
    from tempfile import TemporaryDirectory

    for mesh, points in ((UnitIntervalMesh(20), [0.2, 0.7]), (UnitSquareMesh(6, 6), [(0.2, 0.3)])):
        posterior, comm = _posterior(FunctionSpace(mesh, "CG", 1), points, n=30), mesh.comm
        with TemporaryDirectory() as folder:
            path = report(posterior, Path(comm.bcast(folder)) / "a.html", check=_checked(posterior), threshold=1.6)
            text = _text(path.read_text())
            comm.barrier()
        assert "cannot be drawn" not in text and "MPI ranks 2" in text
        average = posterior.samples.map(lambda m: assemble(m * dx))
        assert words.plus_minus(average.mean(), average.std(ddof=1)) in text
