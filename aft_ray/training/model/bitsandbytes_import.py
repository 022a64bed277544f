"""The one place where bitsandbytes is imported: it has the 8-bit optimizers and the 4-bit weights, and is optional."""

from __future__ import annotations

from typing import Any

from aft_ray.config.run import ConfigError, RunConfig


def import_bitsandbytes(setting: str) -> Any:
    """The bitsandbytes module.

    Args:
        setting: what needs it, such as "training.optimizer=adamw_8bit".

    Raises:
        ConfigError: it is not installed, or cannot be imported here.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        reason = "is not installed" if error.name == "bitsandbytes" else f"cannot be imported: {error}"
        raise ConfigError(
            f"{setting} needs bitsandbytes, which {reason}; install it on every node with pip install "
            f"'aft-ray[quantization]', or remove the setting"
        ) from None
    return bitsandbytes


def check_bitsandbytes(config: RunConfig) -> None:
    """Raises ConfigError when the run needs bitsandbytes and it cannot be imported."""
    if config.training.optimizer != "adamw":
        import_bitsandbytes(f"training.optimizer={config.training.optimizer}")
    if config.lora is not None and config.lora.quantize != "none":
        import_bitsandbytes(f"lora.quantize={config.lora.quantize}")
