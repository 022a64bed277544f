"""The DeepSpeed engine and its checkpoints. `training.deepspeed_config` has its configuration.

The default process group must exist before an engine is built. Invariants: no process group that DeepSpeed makes has
less than `training.timeout_s`; DeepSpeed writes nothing to stdout.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aft_ray.config.run import LoraConfig, ModelConfig, TrainingConfig
from aft_ray.training.deepspeed_config import ds_config as ds_config
from aft_ray.training.deepspeed_import import import_deepspeed
from aft_ray.training.forward.scoring import install_scoring, shares_prompts
from aft_ray.training.forward.scoring_check import check_scoring
from aft_ray.training.forward.sequence_parallel import join_sequence_parallel
from aft_ray.training.model.decoder_layers import compile_layers, keep_gathers_apart, recompute_activations
from aft_ray.training.model.loading import LoadingError, load_model
from aft_ray.training.model.lora import add_adapters, load_adapter
from aft_ray.training.optimizers import build_optimizer, group_settings, restore_states
from aft_ray.training.process_groups import set_default_timeout

_TAG = "state"  # the subdirectory of a checkpoint that DeepSpeed writes
# DeepSpeed's names of the files that one rank writes and loads: the optimizer's state, at stage 3 the module's too.
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(?:optim|model)_states\.pt$")


def build_engine(
    path: str | Path,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    lora: LoraConfig | None = None,
    adapter: Path | None = None,
    universal: bool = False,
) -> Any:
    """A DeepSpeed engine with AdamW on the model at `path`. All ranks call it together.

    Args:
        path: a Hugging Face model directory, or a name on the hub.
        lora: trains adapters instead of the weights.
        adapter: the directory from which the adapters are loaded; None for new ones, which change nothing yet.
        universal: `load_checkpoint` will be given a checkpoint that `convert_to_universal` has written.

    Raises:
        LoadingError: the files do not fit the model, or it cannot compute what the config asks for.
        ConfigError: `lora` names a layer that the model does not have.
        ScoringError: the model scores a response differently with padding behind it.
    """
    deepspeed = import_deepspeed()
    set_default_timeout(training.timeout_s)
    config = ds_config(training, model.dtype) | {"checkpoint": {"load_universal": universal}}
    module = load_model(
        path,
        model.dtype,
        trust_remote_code=model.trust_remote_code,
        config=config,
        attn_implementation=training.attn_implementation,
        quantize="none" if lora is None else lora.quantize,
    )
    if lora is not None:
        add_adapters(module, lora, str(path))
    if adapter is not None:
        load_adapter(module, adapter)
    install_scoring(module, join_sequence_parallel(training.sequence_parallel_size))
    recompute_activations(module, training.activation_checkpointing)
    if training.compile:
        compile_layers(module)
    with contextlib.redirect_stdout(sys.stderr):  # it prints when it compiles its operations
        optimizer = build_optimizer([p for p in module.parameters() if p.requires_grad], training)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if training.activation_checkpointing == "selective" and training.zero_stage == 3:
            keep_gathers_apart(engine.optimizer.parameter_offload)
        check_scoring(module, engine.device)
    if training.sequence_parallel_size > 1 and not shares_prompts(module):
        raise LoadingError(
            f"training.sequence_parallel_size={training.sequence_parallel_size} needs packed rows, which "
            f"{type(module).__name__} cannot compute; set it to 1"
        )
    return engine


def save_checkpoint(engine: Any, directory: str | Path, client_state: dict[str, Any]) -> None:
    """Writes this rank's shards of the trained parameters and of the optimizer. All ranks call it together.

    Args:
        client_state: values that `load_checkpoint` returns.
    """
    engine.save_checkpoint(
        str(directory), tag=_TAG, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )


def load_checkpoint(engine: Any, directory: str | Path) -> dict[str, Any]:
    """Restores the trained parameters and the optimizer. All ranks call it together.

    DeepSpeed unpickles what it reads, so `directory` must be a checkpoint that this run wrote itself.

    Returns:
        The client state that was given to `save_checkpoint`.

    Raises:
        FileNotFoundError: the directory holds no checkpoint.
    """
    settings = group_settings(engine.basic_optimizer)
    # Frozen parameters are not saved: they stay as `build_engine` loaded them.
    all_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    path, client_state = engine.load_checkpoint(
        str(directory), tag=_TAG, load_module_strict=all_trained, load_lr_scheduler_states=False
    )
    if path is None:
        raise FileNotFoundError(f"no DeepSpeed checkpoint in {directory}")
    restore_states(engine.basic_optimizer, settings)
    return dict(client_state)


def checkpoint_world_size(files: Sequence[str]) -> int | None:
    """The number of ranks that saved a checkpoint; None without ZeRO, whose state any number of ranks can load.

    Args:
        files: the names of its files.
    """
    return sum(name.endswith("_optim_states.pt") for name in files) or None


def rank_of_file(name: str) -> int | None:
    """The rank that loads a file of a checkpoint; None when all ranks load it."""
    match = _OF_RANK.search(name)
    return int(match.group(1)) if match else None


def convert_to_universal(directory: str | Path, output: str | Path, timeout_s: float) -> None:
    """Writes a checkpoint in DeepSpeed's universal format, one file per parameter, which any number of ranks can load.

    The conversion runs in a child process, so that its memory is freed.

    Raises:
        LoadingError: the conversion failed, or took longer than `timeout_s`.
    """
    arguments = ["--input_folder", str(Path(directory) / _TAG), "--output_folder", str(Path(output) / _TAG)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, "--inject_missing_state"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LoadingError(
            f"{directory} was not converted for another number of workers in training.timeout_s={timeout_s:.0f} s"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LoadingError(f"{directory} cannot be converted for another number of workers: {reason}")


def gathered(parameters: Sequence[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """A context in which ZeRO-3 parameters are whole on every rank. Does nothing for parameters that are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = import_deepspeed().zero.GatheredParameters(
        list(parameters), modifier_rank=None
    )
    return context
