"""Every block of README, CONTRIBUTING and the pages is run or held against what is there.

Pages that take things as given get a small problem, and numbers with which a test takes seconds; tutorials have
tests of their own. A kind of block that is not known here fails.
"""

import configparser
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_tutorials
import torch
from blocks import PAGES, ROOT, TUTORIALS, blocks, run_block
from firedrake import (
    DirichletBC, Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver, RectangleMesh,
    TestFunction as Test, TrialFunction as Trial, UnitSquareMesh, dx, grad, inner,
)
from matplotlib import pyplot as plt

for _name in ("jinja2", "uvicorn", "pint"):
    pytest.importorskip(_name, reason="blocks of the pages need the extras monitor and units")
import fem_diffusion  # noqa: E402
from fem_diffusion import __main__ as command  # noqa: E402
from fem_diffusion.monitor import server  # noqa: E402
from fem_diffusion.monitor.file import read_bundle  # noqa: E402
from fem_diffusion.monitor.rules import read_rules  # noqa: E402

MAKEFILE = (ROOT / "Makefile").read_text()


# ## What pages take as given: a small problem in place of the reader's own


def _solver(mesh):
    """A reader's own solver, any function from Function to Function, its spaces and conditions."""
    V = FunctionSpace(mesh, "CG", 1)
    bcs = DirichletBC(V, 0, "on_boundary")
    m, u = Function(V), Function(V)
    a = inner(grad(Trial(V)), grad(Test(V))) * dx
    equation = LinearVariationalProblem(a, m * Test(V) * dx, u, bcs, constant_jacobian=True)
    solver = LinearVariationalSolver(equation, solver_parameters={"ksp_type": "preonly", "pc_type": "lu"})

    def my_solver(parameter):
        m.assign(parameter)
        solver.solve()
        return u.copy(deepcopy=True)
    return V, bcs, my_solver


def _readme():
    mesh = UnitSquareMesh(6, 6)
    V, bcs, my_solver = _solver(mesh)
    return {"mesh": mesh, "M": V, "U": V, "bcs": bcs, "my_solver": my_solver, "y": np.array([0.03, -0.01])}


def _problem(mesh=None, length=0.3, noise=0.005):
    V, bcs, my_solver = _solver(mesh or UnitSquareMesh(6, 6))
    prior = fem_diffusion.GaussianPrior(V, std=0.5, correlation_length=length, bcs=bcs)
    names = {name: getattr(fem_diffusion, name) for name in fem_diffusion.__all__}
    here = V.mesh().coordinates.dat.data_ro.max(axis=0)
    sensors = fem_diffusion.point_sensors(V, here * [(0.2, 0.5), (0.7, 0.1), (0.5, 0.5)])
    problem = fem_diffusion.InverseProblem(prior, my_solver, sensors, fem_diffusion.GaussianNoise(std=noise))
    truth = fem_diffusion.coefficients(prior.sample(seed=5))
    return names | {"M": V, "problem": problem, "y": problem.measurements(truth[None], seed=6)[0]}


def _posterior():
    names = _problem()
    model = fem_diffusion.fit(names["problem"], fem_diffusion.simulate(names["problem"], 200, seed=1))
    posterior = model.condition(names["y"])
    return names | {"posterior": posterior, "corrected": posterior.correct(400, seed=2)}


def _site():
    """A model of a town of 256 m x 84 m."""
    names = _problem(RectangleMesh(12, 6, 256, 84), length=80, noise=40)
    model = fem_diffusion.fit(names["problem"], fem_diffusion.simulate(names["problem"], 200, seed=1))
    return names | {"model": model, "dx": dx}


def _latents():
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"z": z, "y": z[:, :1], "TrainingOptions": fem_diffusion.TrainingOptions}


GIVEN = {"README.md": _readme, "formulations.md": _latents, "monitor.md": _site, "training.md": _problem,
         "trust.md": _posterior}
# Numbers of pages, and those with which a test takes seconds.
SMALLER = {
    "README.md": {"simulate(problem, 4000": "simulate(problem, 400", "simulate(family, 20000": "simulate(family, 400",
                  "random_points(mesh, 3000": "random_points(mesh, 100", "correct(2000": "correct(400"},
    "formulations.md": {"held_out=200, seeds=(0, 1, 2))":
                        "held_out=20, draws=19, seeds=(0,), budgets=(4,)), options=TrainingOptions(steps=20)"},
    "training.md": {"simulate(problem, 500": "simulate(problem, 100",
                    "fit(problem, pairs": "fit(problem, pairs, options=TrainingOptions(steps=20)"},
}


# ## What is done with a block, by its kind


class Reader:
    """Reads a page from top to bottom, in an empty folder."""

    def __init__(self, page):
        self.page, self.names, self.smaller = page, GIVEN.get(page.name, dict)(), dict(SMALLER.get(page.name, {}))
        self.output, self.end = "", 0

    def read(self, block):
        """Run a block, or hold it against what is there."""
        kinds = {"python": self.python, "toml": self.toml, "sh": self.shell, "text": self.layout,
                 "{toctree}": self.contents, "{include}": self.include, "indented": self.printed}
        assert block.kind in kinds, f"{block.kind!r} is no kind of block that is tested: say which, or test it here."
        kinds[block.kind](block)

    def python(self, block):
        """It runs, after those above it."""
        text = block.text
        for number in [number for number in self.smaller if number in text]:
            text = text.replace(number, self.smaller.pop(number))
        self.output = run_block(self.page, replace(block, text=text), self.names)
        self.end = block.end

    def printed(self, block):
        """What the block above it prints, where it follows at once; "..." stands for anything. Elsewhere no code."""
        if block.line != self.end + 1:
            with pytest.raises(SyntaxError):
                compile(block.text, "indented", "exec")
        else:
            parts = [r"\s+".join(map(re.escape, part.split())) for part in block.text.split("...")]
            assert re.search(r"\s*.*?\s*".join(parts), self.output, re.DOTALL), f"It prints:\n{self.output}"

    def toml(self, block):
        """Rules of the monitor, about quantities that the page has exported."""
        with open("rules.toml", "w") as file:
            file.write(block.text)
        rules = read_rules("rules.toml", read_bundle("site").quantities)
        assert rules.rules

    def shell(self, block):
        """Targets of make are there, and so are scripts, commands and their options."""
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                for word in words[1:]:
                    name, given, _ = word.partition("=")
                    assert f"$({name}" in MAKEFILE if given else f"\n{name}:" in MAKEFILE, line
            elif words[:3] == ["python", "-m", "fem_diffusion"]:
                self.names.setdefault("commands", []).append(words[3:])
            elif words != ["pip", "install", "."]:
                assert words[:1] == ["python"], f"{line!r} is no command that is tested."
                script = (ROOT / words[1]).read_text()
                for word in words[2:]:
                    assert f'"{word}"' in script, line

    def layout(self, block):
        """Files and folders that are there."""
        paths = re.findall(r"(?<![\w/.])[\w./]+(?:\.py|/)(?!\w)", block.text)
        assert len(paths) > 20
        for path in paths:
            assert (ROOT / path).exists() or (ROOT / "fem_diffusion" / path).exists(), path

    def contents(self, block):
        """Pages that are there; those in docs/generated are made by the build, which fails without one."""
        for name in filter(lambda line: line and line[0] != ":", block.text.splitlines()):
            assert name.startswith("generated/") or (self.page.parent / f"{name}.md").is_file(), name

    def include(self, block):
        """A page that is tested itself."""

    def close(self, monkeypatch):
        """Commands, once all that they need is there; the server listens to nobody."""
        assert not self.smaller, f"{self.page.name} no longer has {list(self.smaller)}."
        served = []
        monkeypatch.setattr(server, "serve", lambda site, host, port, *_: served.append(port))
        for words in self.names.get("commands", []):
            assert command.main(words) == 0
            assert served.pop() == int(words[words.index("--port") + 1])


def test_targets_of_make_and_extras_that_pages_name_are_there():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for page in [*PAGES, ROOT / ".github" / "workflows" / "tests.yml"]:
        text = page.read_text()
        for name in re.findall(r"(?:`|run: )make ([a-z][\w-]*)", text):
            assert f"\n{name}:" in MAKEFILE, f"{page.name}: make {name}"
        for name in ",".join(re.findall(r"pip install '?[\w.]*\[([\w,]*)\]", text)).split(","):
            assert not name or name in setup["options.extras_require"], f"{page.name}: the extra {name}"


def test_every_tutorial_has_a_test():
    tests = Path(test_tutorials.__file__).read_text()
    for page in TUTORIALS.glob("*.md"):
        kinds = {block.kind for block in blocks(page)}
        assert kinds == ({"{toctree}"} if page.stem == "index" else {"python"}), f"{page.name}: {kinds}"
        assert page.stem == "index" or f'= run("{page.stem}")' in tests, page.name


def test_blocks_are_found_whatever_their_fence(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n~~~sh\nls\n```\n~~~\n* b\n\n  ````python\n  x = 1\n  ```\n    y = 2\n  ````\n"
                    "\n    z\n\n    w\nend\n")
    assert [(block.kind, block.text) for block in blocks(page)] == [
        ("sh", "ls\n```\n"), ("python", "x = 1\n```\n  y = 2\n"), ("indented", "z\n\nw")]
    page.write_text("```python\nx = 1\n")
    with pytest.raises(AssertionError, match="never closed"):
        blocks(page)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != TUTORIALS],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_do_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(page)
    for block in blocks(page):
        reader.read(block)
    reader.close(monkeypatch)
    plt.close("all")
