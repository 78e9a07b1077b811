"""Reports: bad rows and arguments get an error of ours with a remedy, and leave no file."""

import pytest

from fem_diffusion.comparison import convergence, plot_costs, plot_overview, summarise, write_csv, write_markdown
from fem_diffusion.errors import FileError, InputError


def row(sampler="a", budget=8, seed=0, **more):
    return dict(problem="p", base="gaussian", formulation="VP", sampler=sampler, budget=budget, alpha=0.0,
                coordinates="plain", nodes="n", evaluations=8, seed=seed, seconds=1.0, c2st=1.0, c2st_floor=0.5) | more


ROWS = [row(), row(seed=1), row("adaptive", 0), row("adaptive", 0, 1)]


@pytest.mark.parametrize("call", [
    lambda rows, path: summarise(rows), lambda rows, path: convergence(rows, "c2st"),
    lambda rows, path: write_markdown(rows, path, "c2st"),
    lambda rows, path: plot_costs(rows, "c2st", path, formulation="VP"),
    lambda rows, path: plot_overview(rows, "c2st", path)])
def test_bad_rows_are_refused(call, tmp_path):
    for rows, words in [(None, "of type NoneType"), ([], "There are no rows"), ([None], "they are no dicts"),
                        (ROWS[0], "of type dict"), ([{"problem": "p"}], "Row 0 lacks base"),
                        ([*ROWS, row(extra=1.0)], "Row 4 has other columns"),
                        ([row(c2st="x")], "Row 0 has 'x' for c2st"), ([row(budget=None)], "Row 0 has None for budget")]:
        with pytest.raises(InputError, match=words):
            call(rows, tmp_path / "file.png")


def test_other_bad_arguments_are_refused(tmp_path):
    path = tmp_path / "file.png"
    for call, words in [
            (lambda: convergence(ROWS, "mmd"), "score is 'mmd': choose one of 'c2st'"),
            (lambda: convergence(ROWS, None), "score is None"),
            (lambda: convergence(ROWS, "c2st", reference="adaptiv"), "sampler is 'adaptiv'"),
            (lambda: convergence(ROWS, "c2st", tolerance="small"), "tolerance"),
            (lambda: write_markdown(ROWS, path, "c2st", budget=9), "budget is 9: the rows have 0, 8"),
            (lambda: write_markdown(ROWS, path, "c2st", budget=8.0), "budget is 8.0"),
            (lambda: write_csv([], path), "no rows"), (lambda: write_csv([{}], path), "no rows"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VE"), "formulation is 'VE': choose one of 'VP'"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VP", base="plain"), "base is 'plain'"),
            (lambda: plot_costs(ROWS, "c2st", path, formulation="VP", title=3), "title is of type int"),
            (lambda: plot_overview(ROWS, "c2st_floor", path), "no c2st_floor_floor"),
            (lambda: write_csv(ROWS, None), "path is None"), (lambda: write_csv(ROWS, "a\0b"), "path is")]:
        with pytest.raises(InputError, match=words):
            call()
    path.write_text("")
    for bad, words in [(tmp_path / "none" / "a.png", "none is no folder: make it first"), (tmp_path, "is a folder"),
                       (path / "a.png", "is no folder")]:
        for call in (lambda: write_csv(ROWS, bad), lambda: write_markdown(ROWS, bad, "c2st"),
                     lambda: plot_costs(ROWS, "c2st", bad, formulation="VP"),
                     lambda: plot_overview(ROWS, "c2st", bad)):
            with pytest.raises(FileError, match=words):
                call()
    assert path.read_text() == "" and list(tmp_path.iterdir()) == [path]
