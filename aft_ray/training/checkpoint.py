"""The training state of a round: what a worker group needs to go on after it, wherever it starts again.

Invariant: a checkpoint counts only with its manifest, which rank 0 writes when every rank's files are there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from aft_ray.run_dir import RunDir
from aft_ray.training import deepspeed


def save(engine: Any, run_dir: RunDir, round_number: int, rank: int) -> None:
    """Saves this rank's shards; Ray Train merges them into one directory of the run. All ranks call it together."""
    path = run_dir.checkpoint(round_number)
    if rank == 0:
        run_dir.delete(path)
    dist.barrier()
    with tempfile.TemporaryDirectory(prefix="aft-ray-checkpoint-", dir=run_dir.staging()) as scratch:
        deepspeed.save(engine, Path(scratch), {"round": round_number})
        ray.train.report(
            {"round": round_number},
            checkpoint=ray.train.Checkpoint.from_directory(scratch),
            checkpoint_dir_name=path.removeprefix("rounds/"),
        )
    if rank == 0:
        run_dir.write_manifest(path)
