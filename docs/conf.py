"""Sphinx: pages of Markdown, one page for each public name, a gallery from the demos, notebooks from the tutorials.

Nothing is loaded from other servers. What is generated lies in docs/generated, made anew by each build.
"""

import ast
import importlib
import inspect
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before Firedrake
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

given, sys.argv = sys.argv, sys.argv[:1]     # PETSc would take Sphinx's options for its own
import firedrake  # noqa: E402, F401  before torch
sys.argv = given
import jupytext  # noqa: E402

import fem_diffusion  # noqa: E402

DOCS = ROOT / "docs"
GENERATED = DOCS / "generated"
# Packages whose names are public, and the chapters of the rooms in the order of the job.
PACKAGES = ("fem_diffusion", "fem_diffusion.diffusion", "fem_diffusion.trust", "fem_diffusion.comparison",
            "fem_diffusion.plot")
CHAPTERS = {
    "problem": "The problem", "prior": "Priors", "forward": "Forward problems", "observation": "Sensors",
    "measurements": "Measurements from files", "simulation": "Simulation", "model": "Models and posteriors",
    "samples": "Samples", "certificate": "Certificates", "reference": "References", "trust": "Trust",
    "plot": "Pictures", "monitor": "Live page for operators", "diffusion": "Diffusion (torch only)",
    "fields": "Fields and modes",
    "comparison": "The protocol of the paper (torch only)", "density_pde": "Diffusion as a PDE", "errors": "Errors",
}

project = "fem_diffusion"
author = copyright = "The fem_diffusion developers"
version = release = fem_diffusion.__version__
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results"]
default_role = "code"
nitpicky = False
autosummary_generate = False         # numpydoc loads it; the pages are written below
myst_enable_extensions = ["deflist", "attrs_inline"]
myst_heading_anchors = 4
autodoc_typehints = "none"      # the docstrings have the types
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "furo"
html_title = f"fem_diffusion {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False


def public_names():
    """Name to the package that shows it: each object once, by the shortest address."""
    seen, found = set(), {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) not in seen:
                seen.add(id(thing))
                found[f"{package}.{name}"] = thing
    return found


def home(address, thing):
    """Room of a public name."""
    package, _, name = address.rpartition(".")
    module = fem_diffusion._HOME.get(name, "") if package == "fem_diffusion" else package
    return module.split(".")[1]


def directive(thing):
    """The directive of autodoc for an object."""
    if inspect.isclass(thing):
        return "autoexception" if issubclass(thing, BaseException) else "autoclass"
    return "autofunction" if callable(thing) else "autodata"


def write(path, text):
    """Write a generated page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_api():
    """A page for each public name, in chapters of rooms."""
    names = public_names()
    rooms = {room: [a for a, thing in names.items() if home(a, thing) == room] for room in CHAPTERS}
    left = set(names) - {a for found in rooms.values() for a in found}
    assert not left, f"CHAPTERS in docs/conf.py has no chapter for {sorted(left)}."
    for room, found in rooms.items():
        lines = [f"# {CHAPTERS[room]}", ""]
        if room not in fem_diffusion.__all__:       # `report` and others are functions by that name
            lines += [inspect.cleandoc(importlib.import_module(f"fem_diffusion.{room}").__doc__).split("\n\n")[0], ""]
        lines += ["| name | what it is |", "|---|---|"]
        for address in sorted(found, key=str.lower):
            what = (inspect.getdoc(names[address]) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            own = not isinstance(names[address], (dict, tuple, list))
            lines.append(f"| [`{address.rpartition('.')[2]}`]({address}.md) | {what if own else 'a table'} |")
            write(GENERATED / "api" / f"{address}.md", f"# {address.rpartition('.')[2]}\n\n```{{eval-rst}}\n"
                  f".. {directive(names[address])}:: {address}\n```\n")
        pages = "\n".join(sorted(found, key=str.lower))
        lines += ["", "```{toctree}", ":hidden:", "", pages, "```", ""]
        write(GENERATED / "api" / f"{room}.md", "\n".join(lines))
    chapters = "\n".join(CHAPTERS)
    write(GENERATED / "api" / "index.md", "# Every public name\n\nThe rooms of the package, in the order in which a "
          f"job goes through them.\n\n```{{toctree}}\n:maxdepth: 1\n\n{chapters}\n```\n")


def write_gallery():
    """A page for each demo: what it says of itself, its picture, its source."""
    names = sorted(path.name for path in (ROOT / "demos").iterdir() if (path / f"{path.name}.py").exists())
    index = ["# Gallery", "", "Every demo is one command, checks its posterior, and leaves its pictures in "
             "`demos/<name>/output`.", ""]
    for name in names:
        tree = ast.parse((ROOT / "demos" / name / f"{name}.py").read_text())
        title, _, text = ast.get_docstring(tree).partition("\n")
        picture = f"![{title.rstrip('.')}](../../images/gallery/{name}.png)"
        index += [f"## [{title.rstrip('.')}]({name}.md)", "", picture, ""]
        text = text.strip().replace("\n    python demos", "\n::\n\n    python demos")
        lines = [f"# {title.rstrip('.')}", "", "```{eval-rst}", text, "```", "", picture, "",
                 "## Source", "",
                 f"```{{literalinclude}} ../../../demos/{name}/{name}.py", ":language: python", "```", ""]
        write(GENERATED / "gallery" / f"{name}.md", "\n".join(lines))
    index += ["```{toctree}", ":hidden:", "", *names, "```", ""]
    write(GENERATED / "gallery" / "index.md", "\n".join(index))


def write_notebooks():
    """A notebook of each tutorial, from the same source."""
    for page in sorted((DOCS / "tutorials").glob("*.md")):
        if page.stem != "index":
            notebook = jupytext.read(page)
            path = GENERATED / "notebooks" / f"{page.stem}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            jupytext.write(notebook, path)


def offer_notebook(app, name, source):
    """A line at the end of each tutorial."""
    folder, _, page = name.partition("/")
    if folder == "tutorials" and page != "index":
        source[0] += f"\n\n---\n\n[This page as a notebook](../generated/notebooks/{page}.ipynb)\n"


def setup(app):
    """Generate before Sphinx looks for sources."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    write_api()
    write_gallery()
    write_notebooks()
    app.connect("source-read", offer_notebook)
