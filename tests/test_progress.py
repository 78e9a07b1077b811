"""What long work tells: few lines where nobody watches, and a result once, to whoever listens."""

import io
import logging
import subprocess
import sys
import time

from fem_diffusion import progress
from fem_diffusion.progress import LOG, bar, tell


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_few_whole_lines(capsys):
    with bar(1000, "training", True, initial=10) as steps:
        for _ in range(990):
            steps.update()
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert 1 <= len(lines) <= 3 and "\r" not in text
    assert lines[-1].startswith("training: 100%") and "1000/1000" in lines[-1]


def test_a_pipe_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SPARSE", 0.05)
    with bar(20, "training", True) as steps:
        for _ in range(20):
            time.sleep(0.02)
            steps.update()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 15 and all(line.startswith("training: ") for line in lines)


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with bar(3, "training", True) as steps:
        steps.update(3)
    assert stream.getvalue().count("\n") == 1 and "\r" in stream.getvalue() and "3/3" in stream.getvalue()


def test_who_asks_for_silence_gets_it(capsys):
    with bar(3, "training", False) as steps:
        steps.update(3)
    tell("done", False)
    assert capsys.readouterr().err == ""


def test_a_result_is_told_once_and_logged(capsys, caplog):
    assert LOG is logging.getLogger("fem_diffusion")
    tell("done", True)
    assert capsys.readouterr().err == "done\n"
    # Who logs at this level has it in the log, and not a second time.
    with caplog.at_level(logging.INFO, "fem_diffusion"):
        tell("done again", True)
        tell("done on another rank", False)
    assert capsys.readouterr().err == ""
    assert [record.getMessage() for record in caplog.records] == ["done again", "done on another rank"]


def test_no_logging_set_up_is_no_complaint():
    code = "from fem_diffusion.progress import LOG, tell; LOG.warning('unheard'); tell('done', True)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "done\n")
