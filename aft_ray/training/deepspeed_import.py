"""The one place where deepspeed is imported, since it must be set up before and after that."""

from __future__ import annotations

import logging
import os
from typing import Any


def import_deepspeed() -> Any:
    """The deepspeed module, set up for the CPU where there is no GPU, and with its logger away from stdout."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Its logger writes to stdout. Without handlers its records go to the root logger, like those of this process.
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    return deepspeed
