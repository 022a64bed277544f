"""DeepSpeed's configuration of a run, and the check of `training.deepspeed` against the installed DeepSpeed.

Invariants: `training.zero_stage` changes what is sharded and not what is computed; gradients are reduced and
accumulated in float32; importing this module imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError, TrainingConfig
from aft_ray.training.deepspeed_import import import_deepspeed

_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 takes gigabytes of buffers on every rank


def ds_config(training: TrainingConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration, with `training.deepspeed` merged into it.

    It has one gradient accumulation step, because the number of micro-batches differs between optimiser steps:
    `step.train_step` marks the last pass of each step itself.

    Args:
        dtype: "float32" or "bfloat16".
    """
    bfloat16 = dtype == "bfloat16"
    # Without ZeRO, DeepSpeed accumulates bfloat16 gradients in bfloat16. Stage 1 takes the same step in float32.
    stage = max(training.zero_stage, 1) if bfloat16 else training.zero_stage
    gpu = training.gpus_per_worker > 0
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "stage3_prefetch_bucket_size": _BUCKET,
        # Reductions run beside the backward pass, in a second bucket. Stages 0 and 1 reduce once, after the last
        # micro-batch, and a CPU has no streams.
        "overlap_comm": gpu and stage >= 2,
    }
    in_cpu_memory = {"device": "cpu", "pin_memory": gpu}
    if training.offload_optimizer:
        zero["offload_optimizer"] = in_cpu_memory
    if training.offload_parameters:
        zero["offload_param"] = in_cpu_memory
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # DeepSpeed would add up the bfloat16 gradients of the ranks in bfloat16, and the sum would depend on their
        # number.
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    return _merged(own, training.deepspeed)


def _merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both, those of `given` in place of equal ones; sections are merged key by key."""
    result: dict[str, Any] = {}
    for key, value in {**own, **given}.items():
        if key not in given and key.removeprefix("stage3_") in given:
            continue  # keys of stage 3 have two names, and DeepSpeed takes either, but not both
        before = own.get(key)
        result[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def config_lines(training: TrainingConfig, dtype: str) -> list[str]:
    """DeepSpeed's configuration as lines of YAML, for people."""
    import yaml

    return str(yaml.safe_dump(ds_config(training, dtype), sort_keys=False)).splitlines()


def check_options(training: TrainingConfig, dtype: str) -> None:
    """Raises ConfigError when the installed DeepSpeed does not know a key of `training.deepspeed`, or refuses a value.

    It gives the merged configuration to DeepSpeed's own classes. A key that none of them reads is unknown.
    """
    if not training.deepspeed:
        return
    from pydantic import ValidationError

    version = import_deepspeed().__version__
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    options = _Read(ds_config(training, dtype))
    try:
        DeepSpeedConfig(options)
    except ValidationError as error:
        raise ConfigError(_explain(error, training.deepspeed, version)) from None
    # DeepSpeed raises all of these for values that it cannot use; most of its messages name the key.
    except (
        DeepSpeedConfigError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        reason = first_line(error)
        raise ConfigError(f"DeepSpeed {version} refuses training.deepspeed: {reason}") from None
    for path, siblings in options.unread(training.deepspeed):
        raise ConfigError(_unknown(path, siblings, version))


class _Read(dict[str, Any]):
    """A configuration that remembers which of its keys were asked for."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({key: _Section(value) if isinstance(value, dict) else value for key, value in options.items()})
        self.asked_for: set[str] = set()

    def __copy__(self) -> _Read:
        return self  # DeepSpeed reads a shallow copy

    def __getitem__(self, key: str) -> Any:
        self.asked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked_for.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, as in any dict."""
        self.asked_for.add(key)
        return super().get(key, default)

    def unread(self, given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, set[str]]]:
        """The path of each key of `given` that was not asked for, and the names that were asked for beside it."""
        for key, value in given.items():
            if key not in self.asked_for and self.asked_for:  # else it was given to a class whole
                yield f"{prefix}{key}", self.asked_for
            elif isinstance(value, Mapping) and isinstance(below := super().get(key), _Read):
                yield from below.unread(value, f"{prefix}{key}.")


class _Section(_Read):
    """A section. DeepSpeed reads it key by key, or gives it whole to a class that refuses unknown keys itself."""

    def __iter__(self) -> Iterator[str]:
        self.asked_for.update(super().keys())
        return super().__iter__()


def _explain(error: Any, given: Mapping[str, Any], version: str) -> str:
    """The first error of one of DeepSpeed's classes as one sentence."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    section = next((key for key, value in given.items() if isinstance(value, Mapping) and location[0] in value), "")
    path = ".".join(filter(None, [section, *location]))
    if first["type"] == "extra_forbidden":
        return _unknown(path, _field_names(error.title, location[:-1]), version)
    problem = first["msg"][0].lower() + first["msg"][1:]
    return f"training.deepspeed.{path}={first['input']!r}: {problem}"


def _field_names(title: str, location: list[str]) -> set[str]:
    """The names and aliases of the fields of one of DeepSpeed's classes, or of a section inside it."""
    from typing import get_args

    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes = [DeepSpeedConfigModel]
    for one in classes:
        classes += one.__subclasses__()
    found = next(one for one in classes if one.__name__ == title)
    for part in location:
        annotation = found.model_fields[part].annotation
        found = next(one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields"))
    return {name for key, field in found.model_fields.items() for name in (key, field.alias) if name}


def _unknown(path: str, known: set[str], version: str) -> str:
    nearest = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "its documentation lists the known ones"
    return f"DeepSpeed {version} does not know training.deepspeed.{path}; {hint}"
