"""All that is measured of speed, in one table with a description of the machine, written to docs/performance.md.

It runs the scripts of this folder that compare ways through the same problem, and that of scaling. Compare the ratios:
each is of two ways in one run, by CPU time. Some of the three parts of the page can be measured again by themselves;
the others stay as they are in it.

    OMP_NUM_THREADS=1 python benchmarks/performance.py [--quick] [--parts states scaling fields] [--cells 31 99 316]
                                                       [--out docs/performance.md]
"""

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
# Names of the columns for our way and for the loop over a solver that is built once, with its default parameters.
OURS, LOOP = "block, ms", ("reused solver, ms", "loop, ms")
INTRODUCTION = "# Performance\n\n`make benchmark` writes this page.\n"
HEADINGS = {"states": "## States of many parameters", "scaling": "## From 1,000 to 1,000,000 unknowns",
            "fields": "## Fields"}
STATES = """
By `solve_many`, against a loop over one Firedrake solver that is built once, with its default parameters; CPU
milliseconds a sample, on one core.

| problem | unknowns | `solve_many`, ms | loop, ms | ratio |
|---|---|---|---|---|
"""
# What a profile says of the ratios that are small.
WHY = """
Where the operator depends on the parameter, a block has no right-hand sides to share: its members iterate with one
factorisation, scaled to each. At 16,129 unknowns (log-diffusivity) a profile shows about 14 pairs of triangular solves,
two thirds of the time, then the assembly of the member's own matrix, a fifth, and products with it: less than the
factorisation that the loop makes for each, but of the same order. Where a factorisation is cheap, as that of the
elastic demo with 1,122 unknowns, whose stiffness varies so much that 17 iterations are needed, the gain is about 3.
"""


def run(script, *options, echo=True):
    """Lines that a script prints, shown as they come."""
    lines = []
    with subprocess.Popen([sys.executable, str(HERE / script), *options], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("WARNING! There are options"):   # PETSc's last words
                break
            lines.append(line.rstrip())
            if echo:
                print(line.rstrip(), flush=True)
        process.communicate()
    if process.returncode:
        raise SystemExit(f"{script} failed with status {process.returncode}.")
    return lines


def table(lines):
    """Rows of a table in Markdown, each a dict by the names of its columns."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def machine():
    """What it ran on, in words."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, Python {platform.python_version()}, Firedrake "
            f"{version('firedrake')}, torch {version('torch')}")


def states(quick):
    """The table of ratios, with why some are small."""
    small, text = ("--cells", "16", "--samples", "16") if quick else (), STATES
    for script, kind in (("residuals.py", ""), ("forward.py", "advection-diffusion: "),
                         ("transient.py", "transient advection-diffusion, unknown ")):
        for row in table(run(script, *small)):
            loop = next(row[name] for name in LOOP if name in row)
            text += (f"| {kind}{row['problem']} | {row['unknowns']} | {row[OURS]} | {loop} | "
                     f"{float(loop) / float(row[OURS]):.1f} |\n")
    return text + WHY


def scaling(cells):
    """How time and memory grow."""
    return "\n" + "\n".join(run("scaling.py", "--words") + [""] + run("scaling.py", "--cells", *cells)) + "\n"


def fields(cells):
    """Modes, deviation, encoding, decoding and memory, of one size."""
    return "\nThe unit square, correlation length 0.1; CPU seconds on one core.\n\n" + "\n".join(
        f"- {line}" for line in run("scaling.py", "--details", cells)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, as a trial")
    parser.add_argument("--parts", nargs="+", choices=HEADINGS, default=[*HEADINGS], help="what is measured (again)")
    parser.add_argument("--cells", nargs="+", default=["31", "99", "316", "999"], help="sizes of the scaling")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "performance.md")
    options = parser.parse_args()
    former = options.out.read_text() if options.out.exists() else ""
    text = INTRODUCTION
    for part, heading in HEADINGS.items():
        if part in options.parts:
            measured = {"states": lambda: states(options.quick),
                        "scaling": lambda: scaling(["16", "24"] if options.quick else options.cells),
                        "fields": lambda: fields("24" if options.quick else "316")}[part]()
            text += f"\n{heading}\n\nOn {machine()}.\n{measured}"
        elif heading in former:
            text += "\n" + heading + former.split(heading)[1].split("\n## ")[0].rstrip() + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
