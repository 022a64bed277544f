"""Process groups have the timeout of the run, whoever makes them; work of all ranks ends on all of them."""

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from aft_ray.training.process_groups import BackgroundGroup, set_default_timeout


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


def work_of_rank(rank, store, case, results):
    """A process of two: does some work in a background group, and puts the name and message of its error."""
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=30), rank=rank, world_size=2)
    group = BackgroundGroup(timeout_s=4)

    def work():
        if rank == 1 and case == "fails":
            raise OSError("the disk is full\nand here is a stack")
        return rank

    if rank == 1 and case == "ends":
        os._exit(1)
    try:
        results.put((rank, "returned", group.on_all_ranks(work)))
    except Exception as error:
        results.put((rank, type(error).__name__, str(error)))


@pytest.mark.parametrize("case", ["succeeds", "fails", "ends"])
def test_work_of_all_ranks_ends_on_all_and_tells_a_failure_from_a_rank_that_has_ended(case, tmp_path):
    """A failure ends the run; when a rank has ended, Ray Train starts all of them again."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = tmp_path / "store", case, results
    processes = [context.Process(target=work_of_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    ended = sorted(results.get(timeout=60) for _ in range(1 if case == "ends" else 2))
    for process in processes:
        process.join(60)
    if case == "succeeds":
        assert ended == [(0, "returned", [0, 1]), (1, "returned", [0, 1])]
    elif case == "fails":
        assert ended == [(0, "RankFailed", "the disk is full"), (1, "RankFailed", "the disk is full")]
    else:
        assert ended[0][:2] == (0, "RuntimeError")
