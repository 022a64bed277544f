"""Runs `aft-ray train` with the given arguments, as the entry point of `ray job submit` or with plain `python`."""

import sys
from pathlib import Path

# The package lies beside this directory, in a checkout and in the working directory of a job.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aft_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
