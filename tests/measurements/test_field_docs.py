"""The page on readings from the field does what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

from fem_diffusion import InputError

PAGE = Path(__file__).parents[2] / "docs" / "field_data.md"


@pytest.mark.filterwarnings("ignore:1 of 5 measurements are unlike")
def test_blocks_of_the_page_run_and_print_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, names = PAGE.read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    for shown in re.findall(r"^    (Measurements:.*|- .*row .*|- .*rows .*|Cross-validation:.*)$", text, re.MULTILINE):
        assert shown.strip() in printed, shown
    found = names["found"]
    assert found.outliers.sum() == 1 and found.outliers[4, 2] and not found.worst
    assert np.isnan(found.cleaned[4, 2]) and (tmp_path / "sensors.png").stat().st_size > 10000
    page = names["posteriors"][0].report("page.html", cross=found, measurements=names["measurements"], check=False,
                                         draws=50, solves=10, progress=False).read_text()
    for part in ("What the sensors say of each other", "probe 3 [K] at 2026-03-01T08:50 reads 0.336", "The file of",
                 "9.999 in row 6"):
        assert part in page, part
    with pytest.raises(InputError, match="cross is of type"):
        names["posteriors"][0].report("page.html", cross="yes")
