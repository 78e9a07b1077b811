"""A monitor in a process of its own, and requests to it."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from fem_diffusion.monitor.file import write_bundle

RULES = """
[page]
title = "Works in the valley"
silent_after = 60

[[rule]]
quantity = "mean emission"
above = 5
unit = "g/s"
probability = 0.9
readings = 2
message = "Close the valve."
"""
START = time.time() - 86400


def stamp(seconds):
    """A time so many seconds after yesterday at this hour."""
    return datetime.fromtimestamp(START + seconds, timezone.utc).isoformat()


def body(seconds, y):
    """A reading (k,) for the monitor."""
    return {"time": stamp(seconds), "values": {f"gauge {i}": None if x != x else float(x) for i, x in enumerate(y)}}


@dataclass
class Server:
    """A running monitor."""

    run: subprocess.Popen
    port: int
    folder: Path

    def ask(self, method, path, data=None, headers=None):
        """Status, headers and body of a request; JSON is sent where there are data."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {} if data is None else {"Content-Type": "application/json"}
            raw = data if isinstance(data, (bytes, type(None))) else json.dumps(data).encode()
            connection.request(method, path, raw, sent | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, path):
        """What an address holds."""
        status, _, text = self.ask("GET", path)
        assert status == 200, text
        return json.loads(text)

    def settled(self, seconds=60):
        """The state once all readings are judged."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.json("/api/state")
            if state["reading"] is not None and not state["waiting"]:
                return state
            time.sleep(0.05)
        raise AssertionError(f"readings wait: {state['waiting']}")

    def log(self):
        """What the monitor has told."""
        return (self.folder / "log").read_text()

    def kill(self):
        """End it at once."""
        self.run.kill()
        self.run.wait()


def start(folder, *more, bundle=None, rules=RULES, token=None):
    """Start a monitor of a folder, which gets the bundle and the rules."""
    if bundle is not None:
        write_bundle(folder, bundle)
    (folder / "rules.toml").write_text(rules)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"FEM_DIFFUSION_TOKEN": token} if token else {})
    with open(folder / "log", "w") as log:
        run = subprocess.Popen([sys.executable, "-m", "fem_diffusion", "monitor", str(folder), "--rules",
                                str(folder / "rules.toml"), "--port", "0", *map(str, more)], stdout=log, stderr=log,
                               env=environment)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = re.search(r"The monitor is at http://[\w.\[\]:]*:(\d+)/", (folder / "log").read_text())
        if found:
            return Server(run, int(found[1]), folder)
        if run.poll() is not None:
            break
        time.sleep(0.05)
    run.kill()
    run.wait()
    raise AssertionError((folder / "log").read_text())


@contextlib.contextmanager
def running(folder, *more, **given):
    """A monitor as long as the context lasts."""
    server = start(folder, *more, **given)
    try:
        yield server
    finally:
        server.run.terminate()
        server.run.wait(30)
