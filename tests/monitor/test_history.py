"""What is kept: readings once, alarms with their names, rows of a file in their order, through kills and restarts."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import datetime, timezone

import numpy as np
import pytest
from bundles import K, make_bundle

from fem_diffusion.errors import DataError, FileError
from fem_diffusion.monitor.bundle import Answer
from fem_diffusion.monitor.history import History, Reading, opened
from fem_diffusion.monitor.incoming import Follower, json_of, reading_of
from fem_diffusion.monitor.judge import TRUST, judge
from fem_diffusion.monitor.rules import Rule, Rules
from fem_diffusion.monitor.site import Site

NAMES = tuple(f"gauge {i}" for i in range(K))
T0 = 1.7e9


@pytest.fixture
def history(tmp_path):
    with opened(tmp_path / "history.sqlite") as found:
        yield found


def _stamp(seconds):
    return datetime.fromtimestamp(T0 + seconds, timezone.utc).isoformat()


def _add(history, *times, value=0.0):
    return history.add([Reading(T0 + t, np.full(K, value)) for t in times])


def test_readings_are_kept_once_and_judged_in_their_order(history):
    assert _add(history, 0, 10, 5) == ["new"] * 3
    assert _add(history, 10) == ["known"] and _add(history, 10, value=1.0) == ["other"]
    assert history.waiting() == 3
    bundle = make_bundle()
    late = []
    while (reading := history.next()) is not None:
        late.append(reading.late)
        result, changes = judge(bundle, Rules(), Answer(None, (), ("no",)), history.streaks())
        history.finish(reading, "model", result, [] if reading.late else changes)
    assert late == [False, False, True] and history.waiting() == 0
    assert history.at(T0 + 7).time == T0 + 5 and history.at(T0 - 1) is None and history.last().time == T0 + 10
    assert history.span() == (T0, T0 + 10)


def test_gaps_are_kept(history):
    y = np.arange(K, dtype=float)
    y[2] = np.nan
    history.add([Reading(T0, y)])
    np.testing.assert_array_equal(history.next().y, y)


def _play(history, rules, answers):
    """Judge answers one after the other; which alarms are on after each."""
    bundle, on = make_bundle(), []
    for i, answer in enumerate(answers):
        _add(history, i)
        reading = history.next()
        result, changes = judge(bundle, rules, answer, history.streaks())
        history.finish(reading, "model", result, changes)
        on.append([alarm.key for alarm in history.alarms() if alarm.ended is None])
    return on


def _known(share):
    """An answer in which so many of 100 samples of the first quantity are above 1."""
    values = np.zeros((100, 2))
    values[:share, 0] = 2.0
    return Answer(None, (), (), (), values, values)


def test_alarms_need_readings_in_a_row_and_end_when_the_rule_does_not_hold(history):
    rule = Rule(0, "mean emission", "g/s", True, 1.0, 0.9, 3, "Close it.")
    doubt = Answer(None, (), ("Broken.",))
    on = _play(history, Rules((rule,)), [_known(95), _known(95), _known(50), _known(90), _known(95), doubt, _known(95),
                                         doubt, _known(10), doubt, doubt, _known(10)])
    assert [rule.key in keys for keys in on] == [False] * 6 + [True] * 2 + [False] * 4
    assert [TRUST in keys for keys in on] == [False] * 10 + [True, False]   # two in a row
    first = [alarm for alarm in history.alarms() if alarm.key == rule.key]
    assert len(first) == 1 and first[0].message == "Close it." and (first[0].raised, first[0].ended) == (T0 + 6, T0 + 8)


def test_what_has_to_be_done_first_stands_first(history):
    """Alarms that are on, red before yellow, then ended ones that nobody has seen, then the others."""
    rules = [Rule(0, "mean emission", "g/s", True, 1.0, p, 1, "Close it.", level)
             for p, level in ((0.1, "alarm"), (0.2, "notice"), (0.3, "alarm"), (0.4, "notice"))]
    _play(history, Rules(tuple(rules)), [_known(95), _known(25)])
    assert [alarm.id for alarm in history.alarms()] == [1, 2, 3, 4]
    assert [alarm.ended is None for alarm in history.alarms()] == [True, True, False, False]
    history.acknowledge(3, "Ada")
    assert [alarm.id for alarm in history.alarms()] == [1, 2, 4, 3]


def test_alarms_are_acknowledged_once_by_a_name(history):
    rule = Rule(0, "mean emission", "g/s", True, 1.0, 0.9, 1, "Close it.")
    _play(history, Rules((rule,)), [_known(95)])
    alarm, = history.alarms()
    assert history.acknowledge(alarm.id, "Ada") is True and history.acknowledge(alarm.id, "Bob") is False
    assert history.acknowledge(99, "Ada") is None
    assert history.alarms()[0].by == "Ada"
    history.keep_only(set())
    assert history.alarms()[0].ended is not None


def test_series_are_thinned_out_but_keep_the_last(history):
    _play(history, Rules(), [_known(i) for i in range(25)])
    found = history.series(T0, T0 + 100, 10)
    assert 8 <= len(found) <= 10 and found[-1][0] == T0 + 24 and found == sorted(found, key=lambda row: row[0])
    assert len(history.series(T0, T0 + 100, 100)) == 25 and not history.series(0, 1, 10)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a").write_text("no database at all, by no means whatever" * 50)
    other = sqlite3.connect(tmp_path / "b")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    for name in "ab":
        with pytest.raises(FileError, match="--history"), opened(tmp_path / name):
            pass


def test_one_monitor_keeps_a_history(tmp_path):
    with opened(tmp_path / "h"), pytest.raises(FileError, match="in use"), opened(tmp_path / "h"):
        pass


def test_reading_of_json():
    found = reading_of({"time": _stamp(0), "values": {"gauge 1": 2, "gauge 3": None}}, NAMES)
    assert found.time == T0 and found.y[1] == 2 and np.isnan(found.y[[0, 2, 3, 4]]).all()


GOOD = {"time": "2020-01-01T00:00:00Z", "values": {"gauge 1": 1.0}}


@pytest.mark.parametrize("data", [
    None, [], 3, {}, {"time": 3}, GOOD | {"more": 1}, GOOD | {"values": []}, GOOD | {"values": {}},
    GOOD | {"values": {"gauge 9": 1}}, GOOD | {"values": {"gauge 1": "1"}}, GOOD | {"values": {"gauge 1": True}},
    GOOD | {"values": {"gauge 1": float("inf")}}, GOOD | {"values": {"gauge 1": float("nan")}},
    GOOD | {"values": {"gauge 1": 10**400}}, GOOD | {"time": "yesterday"}, GOOD | {"time": "2999-01-01T00:00:00Z"},
    GOOD | {"time": "1900-01-01T00:00:00Z"}, GOOD | {"time": "2" * 1000}, GOOD | {"time": None}])
def test_malformed_readings_are_refused(data):
    with pytest.raises(DataError, match=r"\.$"):
        reading_of(data, NAMES)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100000, b"{'a': 1}"])
def test_no_json(body):
    with pytest.raises(DataError):
        json_of(body)


def _follow(tmp_path, history, text):
    path = tmp_path / "readings.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    follower = Follower(path, NAMES, history)
    while follower.step():
        pass
    return path, follower


def test_a_growing_file_is_followed_row_by_row(tmp_path, history):
    path, follower = _follow(tmp_path, history, "time,gauge 3,gauge 0\n")
    with open(path, "a") as file:
        for part in (f"{_stamp(0)},1.5,", "2.5\n", f"{_stamp(1)},,nan\n\n"):
            file.write(part)
            file.flush()
            follower.step()
    assert history.waiting() == 2 and not follower.trouble and not history.problems(10)
    reading = history.next()
    assert reading.y[3] == 1.5 and reading.y[0] == 2.5 and np.isnan(reading.y[[1, 2, 4]]).all()
    again = Follower(path, NAMES, history)     # a restart goes on where the last one stopped
    assert again.step() == 0
    path.write_text(f"time,gauge 3,gauge 0\n{_stamp(2)},3,3\n")    # a new file under the old name
    again.step()
    assert history.waiting() == 3


def test_a_file_that_is_put_in_the_place_of_another_is_read_from_its_start(tmp_path, history):
    row = "{},{}\n".format
    path, follower = _follow(tmp_path, history, "time,gauge 0\n" + row(_stamp(0), 1))
    other = tmp_path / "other.csv"
    other.write_text("time,gauge 0\n" + row(_stamp(0), 1) + row(_stamp(1), 2) + row(_stamp(2), 3))
    other.replace(path)
    while follower.step():
        pass
    assert history.waiting() == 3 and not history.problems(10)     # one of them is known


def test_a_history_is_of_its_sensors(tmp_path, history):
    mine = [("gauge 0", "mg"), ("gauge 1", "mg")]
    history.claim(mine)
    history.claim(mine)
    for other in (mine[:1], mine[::-1], [("gauge 0", "g"), ("gauge 1", "mg")]):
        with pytest.raises(FileError, match="--history"):
            history.claim(other)


def test_clocks_that_go_back_are_told_and_raise_no_alarm(tmp_path, history):
    """After a summer's end the same hour comes twice: alarms of the second one would never come."""
    bundle = make_bundle()
    site = Site(bundle, Rules(), history)

    def judged(*times):
        history.add([Reading(T0 + t, np.zeros(K)) for t in times])
        while site._judge():
            pass
        return site.state()
    assert judged(0, 10)["light"] == "green"
    assert judged(1, 2)["light"] == "green"      # others come a little late
    state = judged(3)
    assert state["light"] == "grey" and "look at the clocks" in state["sentences"][0]
    assert judged(20)["light"] == "green"


def test_bad_rows_are_told_by_number_and_the_others_kept(tmp_path, history):
    rows = [_stamp(0) + ",1", "yesterday,1", _stamp(1) + ",a", _stamp(2) + ",1,2", _stamp(0) + ",7", _stamp(0) + ",1",
            _stamp(3) + ",1e999", _stamp(4) + ',"', _stamp(5) + ",1_0", _stamp(6) + ",4"]
    _follow(tmp_path, history, "time,gauge 0\n" + "\n".join(rows) + "\n")
    assert history.waiting() == 2
    told = {int(text.split()[1]): text for _, text in history.problems(20)}
    assert sorted(told) == [3, 4, 5, 6, 8, 9, 10] and "other values" in told[6]


def test_semicolons_and_decimal_commas(tmp_path, history):
    _follow(tmp_path, history, f"\ufefftime;gauge 0\r\n{_stamp(0)};1,25\r\n")
    assert history.next().y[0] == 1.25


@pytest.mark.parametrize("head", ["time,gauge 0,gauge 9\n", "when,gauge 0\n", "time,gauge 0,gauge 0\n", "time\n",
                                  b"time,\xff\n"])
def test_first_rows_that_do_not_fit_are_refused(tmp_path, history, head):
    _, follower = _follow(tmp_path, history, head)
    assert follower.trouble
    with pytest.raises(FileError):
        follower.check()


def test_first_row_may_say_the_units_of_the_sensors(tmp_path, history):
    path = tmp_path / "readings.csv"
    path.write_text(f"time,gauge 1 [mg/l]\n{_stamp(0)},2\n")
    follower = Follower(path, NAMES, history, ["mg/l"] * K)
    follower.step()
    assert history.next().y[1] == 2
    with pytest.raises(FileError, match="write the readings in that unit"):
        Follower(path, NAMES, history, ["kg/l"] * K).check()


def test_long_lines_and_missing_files_stop_nothing(tmp_path, history):
    path, follower = _follow(tmp_path, history, "time,gauge 0\n" + "9" * 2**21 + f"\n{_stamp(0)},1\n")
    assert history.waiting() == 1 and "too long" in history.problems(5)[-1][1]
    path.unlink()
    assert follower.step() == 0 and "cannot be read" in follower.trouble


KEEPER = """
import sys
import numpy as np
from fem_diffusion.monitor.history import History, Reading
history = History(sys.argv[1])
for i in range(100000):
    history.add([Reading(1.7e9 + i, np.full(5, float(i)))])
    print(i, flush=True)
"""


def test_kill_9_loses_no_reading_that_was_acknowledged(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KEEPER, str(tmp_path / "h")], stdout=subprocess.PIPE,
                          text=True) as run:
        while int(run.stdout.readline()) < 30:
            pass
        time.sleep(0.05)
        os.kill(run.pid, signal.SIGKILL)
        last = int((run.stdout.read().split() or ["30"])[-1])
    history = History(tmp_path / "h")
    assert history.waiting() >= last + 1
    assert [history.reading(i + 1).time for i in range(last + 1)] == [1.7e9 + i for i in range(last + 1)]
    history.close()


def test_results_hold_numbers_that_json_knows(history):
    _play(history, Rules(), [_known(5)])
    _, result = history.result(1)
    assert result.quantities[0][0] == pytest.approx(0.1) and json.loads(result.text())["doubts"] == []
