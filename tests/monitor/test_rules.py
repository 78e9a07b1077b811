"""Rules are read with their units; a mistake is told with its line."""

import numpy as np
import pytest

from fem_diffusion.errors import FemDiffusionError
from fem_diffusion.monitor.bundle import Quantity
from fem_diffusion.monitor.rules import read_rules

QUANTITIES = Quantity("emission", "g/s"), Quantity("highest", "mg/m³", True)
GOOD = """# rules of a site
[page]
title = "Works"
silent_after = 60

[[rule]]
quantity = "emission"
above = 2
unit = "g/s"
probability = 0.9
readings = 3
message = '''Close
the valve.'''

[[rule]]
quantity = "highest"
below = -0.5
probability = 0.5
message = "Look."
level = "notice"
"""


def _read(tmp_path, text):
    path = tmp_path / "rules.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rules(path, QUANTITIES)


def test_rules_are_read(tmp_path):
    found = _read(tmp_path, GOOD)
    first, second = found.rules
    assert found.title == "Works" and found.silent_after == 60 and found.unlike == 0.01
    assert first.condition.replace("\u00a0", " ") == "emission above 2 g/s" and first.readings == 3
    assert second.quantity == 1 and not second.above and second.readings == 1 and second.level == "notice"
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert first.share(values) == 0.5 and second.share(values) == 0.0
    assert first.key != second.key


@pytest.mark.parametrize("old, new, line, words", [
    ('title = "Works"', "title = 3", 3, "text in quotes"), ('title = "Works"', 'title = " "', 3, "empty"),
    ("silent_after = 60", "silent_after = 0", 4, "1 to 1e"), ("silent_after = 60", "silentafter = 60", 4, "unknown"),
    ('quantity = "emission"', 'quantity = "emissions"', 7, "no quantity of the model"),
    ("above = 2", "above = 2\nbelow = 3", 6, "one of above and below"), ("above = 2", "above = nan", 8, "finite"),
    ("above = 2", 'above = "2"', 8, "a number"), ('unit = "g/s"', 'unit = "kg/s"', 9, "in the unit of the model"),
    ("probability = 0.9", "probability = 90", 10, "between 0 and 1"), ("probability = 0.9", "", 6, "no probability"),
    ("probability = 0.9", "probability = true", 10, "a number"), ("readings = 3", "readings = 0", 11, "1 to 1000"),
    ("readings = 3", "readings = 2.5", 11, "whole number"), ('level = "notice"', 'level = "red"', 20, '"alarm" or'),
    ('message = "Look."', 'message = ""', 19, "empty"), ("[page]", "[pages]", 2, "unknown"),
    ('quantity = "highest"\nbelow = -0.5\nprobability = 0.5',
     'quantity = "emission"\nabove = 2\nprobability = 0.9', 15, "there twice")])
def test_mistakes_are_told_by_line(tmp_path, old, new, line, words):
    assert old in GOOD
    with pytest.raises(FemDiffusionError, match=words) as caught:
        _read(tmp_path, GOOD.replace(old, new, 1))
    assert f"line {line}:" in str(caught.value)


@pytest.mark.parametrize("text, words", [
    ("[page", r"line 1"), ("a = 1\n\n[[rule]\n", "line 3"), (b"title = '\n\xff'", "line 2"), (b"#" * 2**19, "KiB"),
    ("rule = 3", "line 1"), ("[rule]\nx = 1", r"\[\[rule\]\]"), ("page = 3", r"\[page\]"),
    ("a = " + "[" * 100000, "TOML")])
def test_what_is_no_rule_file_is_refused(tmp_path, text, words):
    with pytest.raises(FemDiffusionError, match=words):
        _read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(FemDiffusionError, match="TOML file of rules"):
        read_rules(tmp_path / "none.toml", QUANTITIES)
