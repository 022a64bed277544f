"""`python -m aft_ray.operations.acceptance [NAME...] [--small]`: the acceptance suite where the CLI is not installed.

A name is that of a check or of a part: training, engine, run. The exit status is 1 if a check failed, 2 for a wrong
name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from aft_ray.config.run import ConfigError
from aft_ray.operations.acceptance.command import accept
from aft_ray.operations.acceptance.suite import CHECKS, Setting, run_here


def main() -> int:
    """Runs the checks that the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m aft_ray.operations.acceptance", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a check or a part; none: all checks")
    parser.add_argument("--small", action="store_true", help="tiny models; without a GPU, on the CPU")
    parser.add_argument("--storage", help="a directory that all nodes share, for run-two-nodes")
    parser.add_argument("--here", action="store_true", help="run one check in this process and print it as JSON")
    arguments = parser.parse_args()
    setting = Setting(arguments.small, arguments.storage)
    if arguments.here:
        (check,) = (one for one in CHECKS if [one.name] == arguments.names)
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there
            outcome = run_here(check, setting)
        print(outcome.as_json(), flush=True)
        # An engine that hangs must not keep a process that has said everything. Whoever started this one ends the rest.
        os._exit(0)
    try:
        return 0 if accept(arguments.names, setting, lambda line: print(line, flush=True)) else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
