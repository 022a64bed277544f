"""A resumed run on nodes that share their scratch directory."""

import multiprocessing
import os
from datetime import timedelta

import torch.distributed as dist

from aft_ray.storage.run_dir import RunDir
from aft_ray.training.state.checkpoint import fetched_state

COMMON = "state/mp_rank_00_model_states.pt"
SHARD = "state/zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def node_of_one_rank(rank, run_dir, scratch, results):
    """One of two nodes, each with one rank, whose TMPDIR is the same directory."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TMPDIR": str(scratch)}
    store = f"file://{scratch}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    with fetched_state(RunDir(str(run_dir)), "rounds/0001/checkpoint", 60) as state:
        files = {
            path.relative_to(state.directory).as_posix(): path.read_text() for path in state.directory.rglob("*.pt")
        }
        results.put((rank, str(state.directory), files, state.universal))
    dist.destroy_process_group()


def test_nodes_that_share_a_scratch_directory_fetch_side_by_side(tmp_path):
    saved = tmp_path / "saved" / "state"
    saved.mkdir(parents=True)
    contents = {COMMON: "weights", SHARD.format(0): "shard 0", SHARD.format(1): "shard 1"}
    for name, text in contents.items():
        (tmp_path / "saved" / name).write_text(text)
    run_dir, path = RunDir(str(tmp_path / "run")), "rounds/0001/checkpoint"
    run_dir.write_manifest(path, run_dir.add_files(tmp_path / "saved", path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    nodes = [
        context.Process(target=node_of_one_rank, args=(rank, tmp_path / "run", scratch, results)) for rank in range(2)
    ]
    for node in nodes:
        node.start()
    (_, first, of_first, universal), (_, second, of_second, _) = sorted(results.get(timeout=60) for _ in nodes)
    for node in nodes:
        node.join(60)
        assert node.exitcode == 0
    assert not universal
    assert first != second
    assert of_first == {COMMON: "weights", SHARD.format(0): "shard 0"}
    assert of_second == {COMMON: "weights", SHARD.format(1): "shard 1"}
    assert list(scratch.glob("aft-ray-resume-*")) == []
