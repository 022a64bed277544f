"""The timeout of process groups: none of a run has less than `training.timeout_s`.

DeepSpeed, and other libraries, make groups without a timeout, which then have torch's default of 10 minutes (NCCL) or
30. Ranks that run ahead of rank 0, which may stream weights for longer, would fail in such a group.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_default_timeout(timeout_s: float) -> None:
    """Gives every process group that this process makes from now on without a timeout this one, in seconds.

    A group that names its own timeout keeps it.
    """
    timeout = timedelta(seconds=timeout_s)
    # `new_group` reads these two module variables, also when it is called by `init_device_mesh` or under another name.
    # torch offers no function for it; a test compares the timeouts of groups with this one.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if not hasattr(distributed_c10d, name):
            raise RuntimeError(f"this version of torch has no {name}, by which groups get training.timeout_s")
        setattr(distributed_c10d, name, timeout)
