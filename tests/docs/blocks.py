"""Blocks of code in the pages, found by their fences or by their indent, and run as a reader would run them."""

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *TUTORIALS.glob("*.md")])


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes
    ----------
    line, end : int
        The lines, from one, of its fences; of a block without fences those before and after it.
    kind : str
        What its fence says; "indented" where it has none.
    """

    line: int
    end: int
    kind: str
    text: str


def blocks(path):
    """All blocks of a page, in their order."""
    lines, found, i, blank = [*path.read_text().split("\n"), ""], [], 0, True
    while i < len(lines):
        begin, fence = i, re.match(r"( *)(`{3,}|~{3,})(.*)$", lines[i])
        if fence:
            i += 1
            while i < len(lines) and not re.match(rf" *{fence[2][0]}{{{len(fence[2])},}} *$", lines[i]):
                i += 1
            assert i < len(lines), f"{path.name}, line {begin + 1}: this fence is never closed."
            text = "\n".join(line.removeprefix(fence[1]) for line in lines[begin + 1:i]) + "\n"
            found.append(Block(begin + 1, i + 1, fence[3].split(" ")[0].strip(), text))
        elif blank and re.match(r"    |\t", lines[i]):
            while i < len(lines) and (not lines[i].strip() or re.match(r"    |\t", lines[i])):
                i += 1
            found.append(Block(begin, i + 1, "indented", "\n".join(line[4:] for line in lines[begin:i])))
            i -= 1
        blank = not lines[i].strip()
        i += 1
    return found


def run_block(page, block, names):
    """Run a block of Python in a namespace; what it prints and warns of, as the reader sees it."""
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, kind, *_, **__: seen.write(f"{kind.__name__}: {message}\n")
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return seen.getvalue()


def run_page(page):
    """Run all blocks of Python of a page in one namespace, and return it."""
    names = {}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return names
