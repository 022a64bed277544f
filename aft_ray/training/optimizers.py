"""AdamW: torch's, DeepSpeed's for states in CPU memory, or that of bitsandbytes with 8-bit states.

Invariant: an optimizer whose states were loaded from a checkpoint takes the very step that the saved one would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aft_ray.config.run import TrainingConfig
from aft_ray.training.model.bitsandbytes_import import import_bitsandbytes

# Under this key bitsandbytes hides quantized states in the `state_dict` of an optimizer, and its own loader finds them.
_HIDDEN = "__bnb_optimizer_quant_state__"


def build_optimizer(parameters: Sequence[torch.nn.Parameter], training: TrainingConfig) -> Any:
    """The optimizer of `training.optimizer` on some parameters, which DeepSpeed replaces by its shards of them.

    Raises:
        ConfigError: bitsandbytes is needed and cannot be imported.
    """
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "eps": training.eps,
        "weight_decay": training.weight_decay,
    }
    if training.optimizer != "adamw":
        library = import_bitsandbytes(f"training.optimizer={training.optimizer}").optim
        kind = library.AdamW8bit if training.optimizer == "adamw_8bit" else library.PagedAdamW8bit
        return kind(list(parameters), **settings)
    if training.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # C++, which is compiled at its first use

        return DeepSpeedCPUAdam(list(parameters), **settings)
    # One kernel reads and writes each state once, where the default makes copies: on a CPU it takes a quarter of the
    # time, and the same step.
    return torch.optim.AdamW(parameters, **settings, fused=True)


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group, without its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_states(optimizer: Any, settings: Sequence[dict[str, Any]]) -> None:
    """Gives the states that DeepSpeed has loaded the form that the optimizer itself would have given them.

    The checkpoint may come from another AdamW, which has other settings and another type of step count: a run may move
    its states to CPU memory and back.

    Args:
        settings: those of the optimizer before the checkpoint was loaded, from `group_settings`.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group |= own
    of_torch = isinstance(optimizer, torch.optim.AdamW)
    paged = hasattr(optimizer, "is_paged") and optimizer.is_paged  # bitsandbytes' have the attribute
    for parameter, state in optimizer.state.items():
        for key, tensor in state.pop(_HIDDEN, {}).items():  # ZeRO 1 and 2 load states without bitsandbytes' loader
            state[key] = tensor.to(parameter.device)
        if paged:
            _page(optimizer, parameter, state)
        if "step" in state:
            steps = float(state["step"])
            # The fused kernel reads the count on the parameter's device.
            state["step"] = torch.tensor(steps, device=parameter.device) if of_torch else int(steps)


def _page(optimizer: Any, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
    """Moves loaded states back into memory that the GPU may page out; bitsandbytes' loader leaves them on the GPU."""
    for key in ("state1", "state2"):
        loaded = state[key]
        if not getattr(loaded, "is_paged", False):
            state[key] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
            state[key].copy_(loaded)
