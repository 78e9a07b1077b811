"""Commands: ``python -m fem_diffusion monitor MODEL_FOLDER --rules rules.toml``."""

import argparse
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from fem_diffusion.errors import FemDiffusionError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the status for the shell. An error is told in a sentence."""
    parser = argparse.ArgumentParser(prog="python -m fem_diffusion", description="Commands of fem_diffusion.")
    commands = parser.add_subparsers(dest="command", required=True)
    monitor = commands.add_parser(
        "monitor", help="a live page for operators",
        description="A live page for operators: readings in, state and alarms out. Where other machines may reach it, "
                    "the environment variable FEM_DIFFUSION_TOKEN holds the secret that they need.")
    monitor.add_argument("folder", type=Path, help="what model.export_monitor(folder, ...) wrote")
    monitor.add_argument("--rules", type=Path, required=True, help="TOML file of the rules that raise alarms")
    monitor.add_argument("--readings", type=Path, help="a CSV file that grows; others come by POST /api/readings")
    monitor.add_argument("--history", type=Path, help="SQLite file of readings and alarms (default: in the folder)")
    monitor.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    monitor.add_argument("--port", type=int, default=8050)
    monitor.add_argument("--certificate", type=Path, help="PEM file, for https")
    monitor.add_argument("--key", type=Path, help="PEM file of its key")
    given = parser.parse_args(arguments)
    if (given.certificate is None) != (given.key is None):
        parser.error("--certificate and --key belong together")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    try:
        _monitor(given)
    except FemDiffusionError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _monitor(given: argparse.Namespace) -> None:
    import torch

    from fem_diffusion.monitor.file import read_bundle
    from fem_diffusion.monitor.history import opened
    from fem_diffusion.monitor.incoming import Follower
    from fem_diffusion.monitor.rules import read_rules
    from fem_diffusion.monitor.server import serve
    from fem_diffusion.monitor.site import Site
    from fem_diffusion.page.template import check_template

    check_template()
    torch.set_num_threads(1)
    bundle = read_bundle(given.folder)
    rules = read_rules(given.rules, bundle.quantities)
    with ExitStack() as stack:
        history = stack.enter_context(opened(given.history or given.folder / "history.sqlite"))
        follower = None if given.readings is None else Follower(
            given.readings.absolute(), bundle.names, history, [sensor.unit for sensor in bundle.sensors])
        if follower is not None:
            follower.check()
        certificate = None if given.certificate is None else (str(given.certificate), str(given.key))
        serve(Site(bundle, rules, history, follower), given.host, given.port, os.environ.get("FEM_DIFFUSION_TOKEN"),
              certificate, lambda address: print(f"The monitor is at {address}", flush=True))


if __name__ == "__main__":
    sys.exit(main())
