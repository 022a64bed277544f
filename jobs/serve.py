"""What `ray job submit` starts: `aft-ray serve` with the arguments that follow. Runs under plain `python` too."""

import sys
from pathlib import Path

# The job's working directory holds the package; so does a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aft_ray.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
