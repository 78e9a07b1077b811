"""The monitor answers, refuses, and loses nothing: by HTTP, from a file, under load, killed and started again."""

import json
import random
import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import along, make_bundle, reading
from servers import RULES, body, running, stamp

from fem_diffusion.__main__ import main
from fem_diffusion.monitor.file import read_bundle, write_bundle
from fem_diffusion.monitor.history import Reading, opened
from fem_diffusion.monitor.incoming import reading_of
from fem_diffusion.monitor.report import report_of
from fem_diffusion.monitor.rules import Rules, read_rules
from fem_diffusion.monitor.site import Site

pytest.importorskip("starlette", reason="the monitor's server is not installed: pip install 'fem_diffusion[monitor]'")
pytest.importorskip("uvicorn", reason="the monitor's server is not installed: pip install 'fem_diffusion[monitor]'")

ASSETS = Path(__file__).parents[2] / "fem_diffusion" / "monitor" / "assets"
LOW, HIGH = np.array([-1.0, 0.5, -0.3, 0.2]), np.array([2.5, 0.5, -0.3, 0.2])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("site"), bundle=make_bundle(exponential=True)) as found:
        yield found
        assert found.run.poll() is None, found.log()
    assert "Traceback" not in found.log()


def _read(name):
    return (ASSETS / name).read_text()


def test_nothing_comes_from_other_servers():
    for path in ASSETS.iterdir():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", path.read_text())) - {"http://www.w3.org"}
        assert not found, (path.name, found)


def test_page_and_its_files(server):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css"),
                       ("/icon.svg", "image/svg+xml")):
        status, headers, text = server.ask("GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and text
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    # Whatever the page asks for is there.
    for name in re.findall(r'\$\("(\w+)"\)', _read("page.js")):
        assert f'id="{name}"' in _read("page.html"), name


def test_readings_alarm_acknowledgement_and_report(server):
    assert server.json("/api/state")["word"] == "No reading"
    assert server.ask("GET", "/report")[0] == 404
    assert server.ask("POST", "/api/readings", body(0, reading(LOW, 1)))[0] == 201
    state = server.settled()
    assert state["light"] == "green" and state["quantities"][0]["text"].endswith("g/s")
    quiet = server.json(f"/api/map?reading={state['map']}")
    assert len(quiet["mean"]) * 2 == len(server.json("/api/mesh")["corners"])

    assert server.ask("POST", "/api/readings", body(60, reading(HIGH, 2)))[0] == 201
    assert server.settled()["light"] == "yellow"     # one reading is not two
    assert server.ask("POST", "/api/readings", body(120, reading(HIGH, 3)))[0] == 201
    state = server.settled()
    assert state["light"] == "red" and "Close the valve." in state["sentences"][0]
    assert "in 2 readings in a row" in state["sentences"][0]
    assert np.mean(server.json(f"/api/map?reading={state['map']}")["mean"]) > 2 * np.mean(quiet["mean"])
    alarm, = state["alarms"]
    address = f"/api/alarms/{alarm['id']}/acknowledge"
    assert server.ask("POST", address, {"name": "Ada"})[0] == 200
    assert server.ask("POST", address, {"name": "Bob"})[0] == 409
    assert server.ask("POST", "/api/alarms/999/acknowledge", {"name": "Ada"})[0] == 404

    broken = reading(HIGH, 4)
    broken[1] += 30
    for i in (180, 240):
        assert server.ask("POST", "/api/readings", body(i, broken))[0] == 201
    state = server.settled()
    assert state["quantities"][0]["text"] is None and state["map"] is None     # never a number
    assert state["alarms"][0]["level"] == "trust" and "gauge 1" in state["alarms"][0]["message"]
    assert server.ask("GET", f"/api/map?reading={state['reading']['id']}")[0] == 404
    assert server.json("/api/series")["lines"][0][-1] is None

    status, headers, page = server.ask("GET", "/report")
    assert status == 200 and b"Close the valve." in page and b"Ada" in page and b"<script" not in page
    assert b"not to be trusted" in page
    status, _, past = server.ask("GET", f"/report?at={state['reading']['time'] - 200}")
    assert status == 200 and b"data:image/svg+xml" in past and b"unlike" not in past.split(b"<h2>Readings")[1]
    before = server.json(f"/api/state?at={state['reading']['time'] - 230}")
    assert before["past"] and before["quantities"][0]["text"] is not None and len(before["alarms"]) == 0


def test_a_reading_counts_once(server):
    data = body(300, reading(LOW, 5))
    assert server.ask("POST", "/api/readings", data)[0] == 201
    assert server.ask("POST", "/api/readings", data)[0] == 200
    assert server.ask("POST", "/api/readings", body(300, reading(LOW, 6)))[0] == 409


def test_what_comes_late_raises_no_alarm(server):
    server.settled()
    count = len(server.json("/api/state")["alarms"])
    for i in range(6):
        assert server.ask("POST", "/api/readings", body(-1000 + i, reading(HIGH, 50 + i)))[0] == 201
    assert len(server.settled()["alarms"]) == count


def _judged(folder, bundle, readings, rules=Rules()):
    """The site once it has judged readings, and its history."""
    with opened(folder / "h") as history:
        history.add(readings)
        site = Site(bundle, rules, history)
        site.start()
        while history.waiting():
            time.sleep(0.01)
        site.stop()
        yield site


def test_names_are_shown_as_text_not_as_markup(tmp_path):
    bundle = make_bundle()
    named = replace(bundle.sensors[0], name="<b>x</b>")
    bundle = replace(bundle, sensors=(named, *bundle.sensors[1:]))
    for site in _judged(tmp_path, bundle, [Reading(1.7e9, reading(LOW, 1))]):
        page = report_of(site)
    assert "<b>x" not in page and "&lt;b&gt;x" in page
    assert ".innerHTML" not in _read("page.js") and "insertAdjacent" not in _read("page.js")


def test_reports_show_bands_along_lines_and_where_slices_are(tmp_path):
    for name, bundle in (("line", along(make_bundle())), ("slice", make_bundle())):
        bundle = replace(bundle, area=replace(bundle.area, where="at z = 2 m" * (name == "slice")))
        (tmp_path / name).mkdir()
        for site in _judged(tmp_path / name, bundle, [Reading(1.7e9, reading(LOW, 1))]):
            page, shown = report_of(site), site.map(1)
            assert set(shown) == ({"bands"} if name == "line" else {"mean", "std"})
            assert ("The flux by place" if name == "line" else "those above and below it, too") in page
            assert site.mesh()["slice"] == bundle.area.where and site.mesh()["name"].endswith(bundle.area.where)


def _malformed(rng):
    """One request that is no good: method, path, body, headers."""
    kind = {"Content-Type": "application/json"}
    values = [b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 20000, b'{"time": 1}',
              json.dumps({"time": stamp(0), "values": {"gauge 9": 1}}).encode(),
              json.dumps({"time": stamp(0), "values": {"gauge 1": "a"}}).encode(),
              json.dumps({"time": stamp(10**9), "values": {"gauge 1": 1}}).encode(),
              b'{"time": "2020-01-01", "values": {"gauge 1": NaN}}',
              b'{"time": "2020-01-01", "values": {"gauge 1": 1e999}}', b"x" * (2**16 + 1),
              rng.randbytes(rng.randrange(200)), b'{"name": ""}', b'{"name": "a", "b": 1}']
    paths = ["/../../etc/passwd", "/api/state?at=nan", "/api/state?at=-1", "/api/map?reading=x", "/api/map",
             "/api/map?reading=1e400", "/api/map?reading=99999", "/api/series?from=x", "/report?at=" + "9" * 200,
             "/%00", "/page.js/..%2f..%2frules.toml", "/api/map?reading=0.5", "/assets/page.py", "/api/map?reading=-1",
             "/" + "a" * 5000, "/api/alarms/1e9/acknowledge"]
    choice = rng.randrange(5)
    if choice == 0:
        return "GET", rng.choice(paths), None, {}
    if choice == 1:
        return "POST", "/api/readings", rng.choice(values), kind
    if choice == 2:
        return "POST", f"/api/alarms/{rng.choice(['1', '-1', 'x', '9' * 40])}/acknowledge", rng.choice(values), kind
    if choice == 3:
        method = rng.choice(["PUT", "DELETE", "PATCH", "POST", "TRACE"])
        return method, rng.choice(["/", "/api/state", "/report", "/x"]), None, {}
    return "POST", "/api/readings", rng.choice(values), rng.choice(
        [{}, {"Content-Type": "text/plain"}, kind | {"Host": "evil.example"}, kind | {"Host": ""}])


def test_a_thousand_malformed_requests_get_clear_answers(server):
    rng, before = random.Random(1), server.json("/api/series")["times"]
    seen = set()
    for i in range(1000):
        method, path, data, headers = _malformed(rng)
        status, _, text = server.ask(method, path, data, headers)
        assert 400 <= status < 500, (method, path[:80], data and data[:80], status, text[:200])
        assert b"Traceback" not in text and b".py" not in text and len(text) < 2000
        if status not in (400, 405):
            assert json.loads(text)["error"].endswith("."), text
        seen.add(status)
    assert {400, 404, 405, 409, 413, 415, 422} - {409} <= seen
    assert server.json("/api/series")["times"] == before and server.run.poll() is None
    assert "Traceback" not in server.log()


def test_broken_connections_stop_nothing(server):
    for sent in (b"\x00" * 100, b"GET", b"GET / HTTP/1.1\r\n", b"POST /api/readings HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", b"A" * 100000,
                 b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            try:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                text = connection.recv(4096)
            except ConnectionError:
                text = b""
        assert b"Traceback" not in text and b" 500 " not in text
    assert server.json("/api/state") and "Traceback" not in server.log()


def test_token_keeps_strangers_out(tmp_path):
    secret = "a long secret, 16+"
    with running(tmp_path, bundle=make_bundle(), token=secret) as found:
        for path in ("/", "/api/state", "/page.js", "/report", "/api/map?reading=1"):
            assert found.ask("GET", path)[0] == 401
        assert found.ask("POST", "/api/readings", body(0, reading(LOW, 1)))[0] == 401
        assert found.ask("GET", "/api/state", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert found.ask("GET", "/api/state", headers={"Authorization": f"Bearer {secret}"})[0] == 200
        status, _, page = found.ask("GET", "/", headers={"Accept": "text/html"})
        assert status == 401 and b"<form" in page
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert found.ask("POST", "/token", b"token=wrong", form)[0] == 401
        status, headers, _ = found.ask("POST", "/token", b"token=a+long+secret%2C+16%2B", form)
        assert status == 303 and "HttpOnly" in headers["set-cookie"] and "SameSite=strict" in headers["set-cookie"]
        assert secret not in headers["set-cookie"]
        assert found.ask("GET", "/api/state", headers={"Cookie": headers["set-cookie"].split(";")[0]})[0] == 200


def test_starts_that_are_not_safe_or_cannot_work_are_refused_in_words(tmp_path, server, capsys, monkeypatch):
    write_bundle(tmp_path, make_bundle())
    rules, wrong, bad = tmp_path / "rules.toml", tmp_path / "wrong.toml", tmp_path / "bad.csv"
    rules.write_text(RULES)
    wrong.write_text(RULES.replace('"mean emission"', '"mean emissions"'))
    bad.write_text("time,gauge 77\n")

    def refused(*more, folder=tmp_path, given=rules):
        assert main(["monitor", str(folder), "--rules", str(given), *map(str, more)]) == 1
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text
    assert "FEM_DIFFUSION_TOKEN" in refused("--host", "0.0.0.0")
    assert "line 7" in refused(given=wrong)
    assert "cannot listen" in refused("--port", server.port) and "cannot listen" in refused("--port", 10**6)
    assert "certificate" in refused("--certificate", rules, "--key", rules, "--port", 0)
    assert "gauge 77" in refused("--readings", bad)
    assert "export it anew" in refused(folder=tmp_path / "none")
    monkeypatch.setenv("FEM_DIFFUSION_TOKEN", "short")
    assert "16 or more" in refused()


def test_kill_9_loses_nothing_that_was_acknowledged_and_no_alarm(tmp_path):
    with running(tmp_path, bundle=make_bundle(exponential=True)) as found:
        kept, failed = [], threading.Event()

        def post():
            for i in range(10**6):
                try:
                    if found.ask("POST", "/api/readings", body(i, reading(HIGH, i)))[0] == 201:
                        kept.append(i)
                except OSError:
                    break
            failed.set()
        sender = threading.Thread(target=post)
        sender.start()
        while len(kept) < 40:
            time.sleep(0.01)
        found.kill()
        sender.join()
        assert failed.is_set()
    with running(tmp_path) as again:
        again.settled()
        found = again.json("/api/series")
        times = {round(when - found["times"][0]) for when in found["times"]}
        assert set(kept) <= times
        alarms = [(alarm["raised"], alarm["ended"]) for alarm in again.json("/api/state")["alarms"]]
    # Alarms are those of a site that was never interrupted.
    bundle = read_bundle(tmp_path)
    rules = read_rules(tmp_path / "rules.toml", bundle.quantities)
    (tmp_path / "whole").mkdir()
    readings = [reading_of(body(i, reading(HIGH, i)), bundle.names) for i in range(len(times))]
    for site in _judged(tmp_path / "whole", bundle, readings, rules):
        assert alarms and alarms == [(alarm.raised, alarm.ended) for alarm in site.history.alarms()]


def _memory(run):
    """Resident memory in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text())[1]) / 1024


def _load(folder, seconds):
    """Ten readings a second, half of them by a file; how many came, and memory on the way."""
    path = folder / "readings.csv"
    path.write_text("time," + ",".join(f"gauge {i}" for i in range(5)) + "\n")
    with running(folder, "--readings", path, bundle=make_bundle(exponential=True)) as found:
        memory, begin = [], time.monotonic()
        for i in range(10 * seconds):
            y = reading(LOW, i)
            if i % 2:
                with open(path, "a") as file:
                    file.write(f"{stamp(i)},{','.join(map(str, y))}\n")
            else:
                assert found.ask("POST", "/api/readings", body(i, y))[0] == 201
            if i % 20 == 0:
                found.json("/api/state")
                memory.append(_memory(found.run))
            time.sleep(max(0.0, begin + (i + 1) / 10 - time.monotonic()))
        last = time.monotonic()
        while True:
            state = found.settled(120)
            if state["reading"]["id"] == 10 * seconds:
                break
            assert time.monotonic() < last + 120
            time.sleep(0.2)
        assert not state["problems"]
        return 10 * seconds, memory, time.monotonic() - last


def test_ten_readings_a_second_lose_nothing(tmp_path):
    count, memory, _ = _load(tmp_path, 4)
    assert count == 40 and memory


@pytest.mark.slow
def test_ten_readings_a_second_for_five_minutes_in_flat_memory(tmp_path):
    count, memory, behind = _load(tmp_path, 300)
    print(f"{count} readings, {behind:.1f} s behind at the end, memory {memory[15]:.0f} to {memory[-1]:.0f} MiB")
    assert max(memory[-15:]) < 1.1 * max(memory[10:25]) + 5


@pytest.mark.slow
def test_bodies_that_do_not_come_are_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /api/readings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


@pytest.mark.slow
def test_connections_on_which_nothing_comes_keep_nobody_out(server):
    for sent in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
        idle = []
        try:
            for _ in range(220):
                idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                idle[-1].sendall(sent)
            end = time.monotonic() + 60
            while server.ask("GET", "/api/state")[0] != 200:
                assert time.monotonic() < end
                time.sleep(0.5)
            assert idle[0].recv(4096) == b""     # closed
        finally:
            for connection in idle:
                connection.close()
