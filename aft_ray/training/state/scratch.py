"""The scratch directory of a node: workers write their shards of a training state there before they are copied.

It is the temporary directory of the machine, which the environment variable TMPDIR names. Invariant: a run does not
begin to train on a node whose scratch directory cannot hold a training state of its workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

from aft_ray.config.run import RunConfig
from aft_ray.storage.room import check_room
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.process_groups import raise_on_every_rank

WAY_OUT = "set TMPDIR on every node, before Ray starts there, to a directory with more room"
# What a shard has beside its tensors, such as names and padding, as a share of it.
_OVERHEAD = 0.02


def scratch_directory(run_dir: RunDir, purpose: str) -> Path:
    """A path in the scratch directory that belongs to one run.

    It is the same after a restart, so what a killed worker left there is found and removed by its successor.
    """
    run = sha256(run_dir.uri().encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"aft-ray-{purpose}-{run}")


def check_scratch(config: RunConfig, run_dir: RunDir) -> None:
    """Removes what killed workers of the run left on this node, and checks the room for one training state.

    All ranks call it together, before anything is loaded.

    Raises:
        LoadingError: on every rank, if any node has too little room.
    """

    def check() -> None:
        if int(os.environ["LOCAL_RANK"]) == 0:
            shutil.rmtree(scratch_directory(run_dir, "checkpoint"), ignore_errors=True)
            first = dist.get_rank()  # Ray Train numbers the workers of a node one after the other
            ranks = range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))
            parameters = trained_parameters(config)
            needed = sum(state_bytes(config, parameters, rank, dist.get_world_size()) for rank in ranks)
            check_room(tempfile.gettempdir(), needed, "the training state that a round's workers write", WAY_OUT)

    raise_on_every_rank(check)


def state_bytes(config: RunConfig, parameters: int, rank: int, ranks: int) -> int:
    """The bytes of the files that a rank writes of a training state, at most.

    Args:
        parameters: the number of trained parameters.
    """
    half = config.model.dtype == "bfloat16"
    stage = max(config.training.zero_stage, 1) if half else config.training.zero_stage
    # Stage 3 saves the weights as float32 master weights alone, stages 1 and 2 both; rank 0 writes what all ranks have.
    common = (0 if stage == 3 else 2 if half else 4) * parameters + (8 * parameters if stage == 0 else 0)
    own = 12 * -(-parameters // ranks) if stage else 0
    return int((own + (common if rank == 0 else 0)) * (1 + _OVERHEAD))


def trained_parameters(config: RunConfig) -> int:
    """The number of parameters that a run trains: those of the model, or with `lora` those of the adapters."""
    from transformers import AutoModelForCausalLM

    from aft_ray.storage.model_files import load_model_config
    from aft_ray.training.model.lora import add_adapters

    with torch.device("meta"):  # the layers without their weights
        model = AutoModelForCausalLM.from_config(
            load_model_config(config), trust_remote_code=config.model.trust_remote_code
        )
        if config.lora is not None:
            add_adapters(model, config.lora, config.model.name)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
