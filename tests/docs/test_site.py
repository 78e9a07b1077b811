"""The site: a page for each public name and demo, warnings are errors, and pages that read well in a real browser."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT

for _name in ("sphinx", "jupytext", "numpydoc", "myst_parser", "furo"):
    pytest.importorskip(_name, reason="the site's packages are not installed: make docs brings them")


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """The site's configuration, which writes elsewhere."""
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GENERATED", tmp_path)
    return module


def test_every_public_name_has_a_page_in_a_chapter(conf, tmp_path):
    conf.write_api()
    pages = {path.stem.rpartition(".")[2] for path in (tmp_path / "api").glob("fem_diffusion.*.md")}
    names = {name for package in conf.PACKAGES for name in importlib.import_module(package).__all__}
    assert len(names) > 100 and names == pages
    chapters = "".join((tmp_path / "api" / f"{room}.md").read_text() for room in conf.CHAPTERS)
    for page in (tmp_path / "api").glob("fem_diffusion.*.md"):
        assert f"\n{page.stem}\n" in chapters, f"{page.stem} is in no chapter."


def test_every_demo_has_a_page_and_pictures_are_small(conf, tmp_path):
    conf.write_gallery()
    demos = {path.name for path in (ROOT / "demos").iterdir() if (path / f"{path.name}.py").exists()}
    assert len(demos) > 8 and demos == {path.stem for path in (tmp_path / "gallery").glob("*.md")} - {"index"}
    pictures = sorted((ROOT / "docs" / "images" / "gallery").glob("*.png"))
    assert {path.stem for path in pictures} == demos
    for path in pictures:
        assert path.stat().st_size < 150_000, f"{path.name} is large for a page: fewer pixels or colours."


def test_every_tutorial_becomes_a_notebook(conf, tmp_path):
    conf.write_notebooks()
    import json

    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        if page.stem != "index":
            cells = json.loads((tmp_path / "notebooks" / f"{page.stem}.ipynb").read_text())["cells"]
            code = [cell for cell in cells if cell["cell_type"] == "code"]
            assert len(code) == page.read_text().count("```python\n") > 2, page.stem


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; warnings are errors."""
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(out)],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


PAGES = {"home": "index.html", "name": "generated/api/fem_diffusion.fit.html",
         "demo": "generated/gallery/heat_conduction.html"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_pages_read_well_in_a_browser(browser, site, scheme, width):
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    heads = {}
    for what, name in PAGES.items():
        page.goto((site / name).as_uri())
        heads[what] = page.locator("h1").first.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window."
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(int(part) for part in colour[4:-1].split(",")[:3]) / 3
        assert bright < 60 if scheme == "dark" else bright > 200, (name, colour)
        broken = page.evaluate("[...document.images].filter(i => i.src && (!i.complete || !i.naturalWidth)).length")
        assert broken == 0, name
        page.screenshot(path=str(site / f"{what}-{scheme}-{width}.png"))
    assert heads["home"].startswith("fem_diffusion") and heads["name"].startswith("fit")
    assert heads["demo"].startswith("Can I trust it?")
    page.close()
    assert not errors
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), "Something comes from another server."


@pytest.mark.slow
def test_search_finds_a_name(browser, site):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=amortised_gap")
    page.wait_for_selector("#search-results li")
    assert "amortised_gap" in page.locator("#search-results").inner_text()
    page.close()


def test_no_page_names_another_server():
    """Links lead elsewhere; sources of scripts, styles and pictures do not."""
    for path in [*Path(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md"),
                 *(ROOT / "docs" / "_static").glob("*")]:
        text = path.read_text()
        assert "](http" not in text.replace("[", "\n[") or "![" not in "".join(
            line for line in text.splitlines() if "](http" in line), path.name
        assert "url(http" not in text and "src=\"http" not in text, path.name
