"""One version everywhere."""

import configparser
import re

from blocks import ROOT

import fem_diffusion


def test_files_agree_on_the_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    changed = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert fem_diffusion.__version__ == setup["metadata"]["version"] == cited == changed
