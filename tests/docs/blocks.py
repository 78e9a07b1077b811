"""Blocks of Python in the pages, run as a reader would run them: from top to bottom, in an empty folder."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")])


def blocks(text):
    """The blocks of a page and the line in which each begins."""
    return [(found[1], text[:found.start()].count("\n") + 1)
            for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def run_page(page, folder, names=None, smaller=()):
    """Run all blocks of a page in one namespace, and return it.

    `names` are those that a page takes as given; `smaller` are pairs of texts, the second in place of the first, which
    make the numbers of a page small enough for a test.
    """
    names, text = dict(names or {}), page.read_text()
    for old, new in smaller:
        assert old in text, f"{page.name} no longer has {old!r}."
        text = text.replace(old, new)
    for block, line in blocks(text):
        exec(compile("\n" * line + block, str(page), "exec"), names)
    return names
