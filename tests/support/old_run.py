"""A run directory that version 0.1 made: `tests/fixtures/run_of_0_1.tar.xz`, a run killed while it sampled round 2.

Beside the run directory the archive has the untrained model of 0.1 million parameters that the run began from. In the
run's config, `{place}` is replaced by the path of the directory that has both.
"""

import tarfile
from pathlib import Path

from aft_ray.storage.run_dir import RunDir

FIXTURE = Path(__file__).parents[1] / "fixtures/run_of_0_1.tar.xz"


def unpack_old_run(place: Path) -> RunDir:
    """Unpacks the archive into a directory. Returns the run directory."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(place, filter="data")
    config = place / "run/config.yaml"
    config.write_text(config.read_text().replace("{place}", str(place)))
    return RunDir(place / "run")
