"""Process groups that are made without a timeout have the run's, whoever makes them."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from aft_ray.training.process_groups import set_default_timeout


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The group of this process alone, whose timeout is the run's, as Ray Train makes it."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # restored afterwards
    dist.init_process_group("gloo", f"file://{tmp_path}/store", timedelta(seconds=5000), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def timeouts():
    """The timeout of every group of this process, in seconds."""
    groups = distributed_c10d._world.pg_map
    return [one._get_backend(torch.device("cpu")).options._timeout.total_seconds() for one in groups]


@pytest.mark.usefixtures("world")
def test_every_way_to_make_a_group_gives_it_the_timeout_of_the_run():
    dist.new_group([0])
    assert min(timeouts()) < 5000  # torch's own default, which is why the run sets another
    before = len(timeouts())
    set_default_timeout(5000)
    dist.new_group(ranks=range(1))  # as DeepSpeed clones the world group
    distributed_c10d.new_group([0], backend="gloo")
    dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "sequence_parallel"))
    assert len(timeouts()) > before + 1
    assert set(timeouts()[before:]) == {5000}
    assert distributed_c10d._get_default_timeout("nccl") == timedelta(seconds=5000)


@pytest.mark.usefixtures("world")
def test_a_group_that_names_its_timeout_keeps_it():
    set_default_timeout(5000)
    dist.new_group([0], timeout=timedelta(seconds=7000))
    assert timeouts()[-1] == 7000
